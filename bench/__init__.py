"""Benchmarks of pgtask. `python -m bench --help` lists them; `docs/performance.md` explains how to read them."""
