"""Scenarios: one module for each command of `python -m bench`, and helpers that belong to one of them."""
