"""Rates and counts of limits as people write them: `200/s`, `3000/min`, `5/10s`, `none`.

Invariant: a text that cannot be read raises `ValueError`, which says what was expected.
"""

from __future__ import annotations

import re
from datetime import timedelta

from pgtask._durations import parse_duration
from pgtask.errors import DefinitionError
from pgtask.limits import Rate

__all__ = ["parse_count", "parse_rate"]

MAX_COUNT = 1_000_000
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?|[0-9]*\.[0-9]+)\s*/\s*(.+)")


def parse_count(text: str) -> int | None:
    """Return how many steps run at once; None for `none`."""
    if text == "none":
        return None
    if not text.isascii() or not text.isdigit() or int(text[:9]) > MAX_COUNT:
        raise ValueError("must be a whole number, or none")
    return int(text)


def parse_rate(text: str, *, burst: float | None = None, of: str | None = None) -> Rate | None:
    """Return the rate; None for `none`."""
    if text == "none":
        return None
    if (found := _RATE.fullmatch(text.strip())) is None:
        raise ValueError("must be a number and a time, as 200/s, 3000/min or 5/10s; or none")
    try:
        seconds = parse_duration(found[2] if found[2][0].isdigit() else f"1{found[2]}")
        return Rate(float(found[1]), per=timedelta(seconds=seconds), burst=burst, of=of)
    except DefinitionError as error:
        raise ValueError(str(error)) from None
    except OverflowError:
        raise ValueError("this time is too long") from None
