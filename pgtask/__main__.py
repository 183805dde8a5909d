"""`python -m pgtask` is the command `pgtask`."""

from pgtask._cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
