"""The two commands, `pgtask-supervisor` and `pgtask`."""
