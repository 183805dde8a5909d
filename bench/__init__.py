"""The benchmarks of pgtask; `python -m bench --help` says what there is, `docs/performance.md` how to read it."""
