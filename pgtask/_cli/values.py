"""Values on the command line of `pgtask`: their text read, and refused with what was expected."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from datetime import timedelta

__all__ = ["age", "seconds", "whole"]


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def parse_whole(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            span = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {span}")
        return number

    parse_whole.__name__ = "whole number"
    return parse_whole


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, zero or more, less than {10**9:,}")
    return number


seconds.__name__ = "number of seconds"


def age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age, as 45s, 90m, 12h, 30d or 8w")
    return timedelta(seconds=min(float(found[1]) * _UNITS[found[2]], 1e12))


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
