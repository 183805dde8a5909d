"""Times and sizes as people read them."""

from __future__ import annotations

from datetime import datetime

from pgtask._postgres.times import FarTime, to_microseconds

__all__ = ["format_elapsed", "format_number", "format_rate", "format_size", "format_time", "relative_time"]

_UNITS = ((60.0, "m"), (3600.0, "h"), (86_400.0, "d"), (365.25 * 86_400, "y"))


def relative_time(time: datetime, now: datetime) -> str:
    """Return `in 5m`, `3s ago`, `now` or `never`, in the largest unit of which there are at least two."""
    if time.year in (1, 9999) and not isinstance(time, FarTime):
        return "never" if time > now else "long ago"
    seconds = (to_microseconds(time) - to_microseconds(now)) / 1e6
    number, unit = abs(seconds), "s"
    for size, name in _UNITS:
        if abs(seconds) >= 2 * size:
            number, unit = abs(seconds) / size, name
    if number < 1:
        return "now"
    return f"in {number:.0f}{unit}" if seconds > 0 else f"{number:.0f}{unit} ago"


def format_time(time: datetime, now: datetime, what: str = "") -> str:
    """Return a time in UTC with its distance from `now`, and the event `what` where the label does not name it."""
    shown = str(time) if isinstance(time, FarTime) else f"{time:%Y-%m-%d %H:%M:%S} UTC"
    return f"{shown} ({what}{' ' if what else ''}{relative_time(time, now)})"


def format_size(octets: int) -> str:
    """Return a size such as `512 bytes`, `8.0 kB` or `1.2 GB`."""
    number, unit = float(octets), "bytes"
    for name in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1024, name
    return f"{number:.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"


def format_number(value: float | None) -> str:
    """Return a number or a rate as `1,234`, `9.5` or `-`, which is unknown."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"


def format_elapsed(seconds: float) -> str:
    """Return a measured time in a fitting unit: `66 us`, `1.5 s`, `2 h 5 min`."""
    for unit, scale, below in (("us", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 120.0)):
        if seconds < below * (1 - 0.0005):
            return f"{seconds / scale:.3g} {unit}"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def format_rate(per_second: float) -> str:
    """Return a rate in the unit in which it is at least 1, as `--rate` of `pgtask limit` takes it, or else the time of
    each: `10/s`, `6/min`, `1 per 10 min`."""
    if per_second >= 1 - 1e-9:
        return f"{_significant(per_second)}/s"
    if 60 * per_second >= 1 - 1e-9:
        return f"{_significant(60 * per_second)}/min"
    each = 1 / per_second
    unit, seconds = ("min", 60.0) if each < 3599 else ("h", 3600.0) if each < 172_799 else ("d", 86_400.0)
    return f"1 per {_significant(each / seconds)} {unit}"


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
