"""The two commands, `pgtask` (main.py) and `pgtask-supervisor` (supervisor.py)."""
