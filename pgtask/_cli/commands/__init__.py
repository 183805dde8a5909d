"""The commands of `pgtask`, one file for each; `_cli/main.py` lists them.

Each file has `SUMMARY`, its line in the help of `pgtask`; `HELP`, the text of its own help; `add_arguments(parser)`;
and `run(args)`, which returns the exit code.
"""
