"""Time spans in text: `90`, `90s`, `5m`, `1h30m`, `2d`; on every command line, in variables and files.

Invariant: a number without a unit is seconds, everywhere.
"""

from __future__ import annotations

import re

__all__ = ["DURATION_EXAMPLES", "MAX_SECONDS", "parse_duration"]

DURATION_EXAMPLES = "90s, 5m, 1h30m or 2d"
MAX_SECONDS = 10**9
"""Seconds, not quite 32 years: every span on a command line or in a setting is shorter."""

_UNITS = {"w": 604_800.0, "d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_WORDS = {"w": "w", "d": "d", "h": "h", "m": "m|min", "s": "s|sec", "ms": "ms"}
# The greater units come first, each once at most: 5m5m is a typing error.
_PARTS = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?) ?(?:{words})(?![a-z]) ?)?" for words in _WORDS.values()))
_NUMBER = re.compile(r"([0-9]+\.?|[0-9]*\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Return the seconds, zero or more. Raises `ValueError`; the caller checks `MAX_SECONDS`, with its own message."""
    text = text.strip()
    found = _PARTS.fullmatch(text)
    if text and found is not None:
        sizes = zip(found.groups(), _UNITS.values(), strict=True)
        return sum(float(number) * size for number, size in sizes if number is not None)
    if _NUMBER.fullmatch(text):
        return float(text)
    raise ValueError(f"expected a time span such as {DURATION_EXAMPLES}")
