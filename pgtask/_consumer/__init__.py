"""The inside of a `Consumer`: the leases it holds, and the statements it sends."""
