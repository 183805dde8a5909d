"""What is read of a fleet, and served: pages of counters, metrics, health."""
