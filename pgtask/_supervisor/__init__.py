"""The supervisor: a parent without an event loop that keeps N workers running."""
