"""The command `pgtask`, as `python -m pgtask`."""

from pgtask._cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
