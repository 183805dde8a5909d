"""What is behind a `Consumer`: the leases it holds, and what it sends."""
