"""Tasks and workflows that are benchmarked, and the apps that run them."""
