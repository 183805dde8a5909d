"""Lines of progress, on stderr, so that stdout holds the card alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress", "print_progress"]

Progress: TypeAlias = Callable[[str], None]


def print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
