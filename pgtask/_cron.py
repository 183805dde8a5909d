"""The times of a cron expression in a time zone, in the sense of Debian's cron.

The library cronsim parses, and finds the next date and time of day that fits, without a zone. What a zone makes of it
is here:

- An expression with a fixed time (neither its minute nor its hour begins with `*`) happens once for each date and time
  of day that it names. Where the clock goes forward over it, it happens when the gap ends; where the clock goes back,
  the first of the two counts.
- All others, and those with seconds, go by the clock on the wall: they happen whenever that shows a time that fits. A
  time in a gap does not exist, and one that comes twice happens twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import takewhile
from typing import Any

__all__ = ["CronError", "check_cron", "check_zone", "last_times", "next_time", "times_after"]

MAX_CACHED = 2000  # results: many schedules may have one expression, and fall due together
_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_SINGLE = re.compile(r"\b(\w+)-\1/\d+")  # a range of one, which cronsim would take for its first number onwards
_SECOND, _DAY = timedelta(seconds=1), timedelta(days=1)


class CronError(Exception):
    """An expression or a zone that cannot be used; its text says why, and what helps."""


@lru_cache(maxsize=MAX_CACHED)
def check_cron(cron: str) -> None:
    """Raise `CronError` unless the expression is valid and happens again and again."""
    try:
        next(times_after(cron, "UTC", datetime(2000, 1, 1, tzinfo=UTC)))
    except StopIteration:
        raise CronError("it never happens; name a date that exists") from None


def check_zone(name: str) -> None:
    """Raise `CronError` unless this computer knows the time zone."""
    _zone(name)


@lru_cache(maxsize=MAX_CACHED)
def next_time(cron: str, zone: str, after: datetime) -> datetime:
    """Return the first time of an expression later than `after`, in UTC. Raises `CronError`."""
    try:
        return next(times_after(cron, zone, after))
    except (StopIteration, OverflowError):
        raise CronError("it does not happen again") from None


def last_times(cron: str, zone: str, first: datetime, until: datetime, limit: int) -> list[datetime]:
    """Return the last times of an expression from `first`, which is one, until a time: `limit` at most, in their order.

    It reads as much of the past as it needs, not all since `first`, which may be years ago. Raises `CronError`.
    """
    span = timedelta(minutes=1)
    while True:
        start = max(first - _SECOND, until - span)
        found = list(takewhile(lambda time: time <= until, times_after(cron, zone, start)))
        if len(found) >= limit or start < first:
            return found[-limit:]
        span *= 4


def times_after(cron: str, zone: str, after: datetime) -> Iterator[datetime]:
    """Yield the times of an expression later than `after`, in UTC, without end unless it happens no more. Raises
    `CronError`."""
    text = _SINGLE.sub(r"\1", _ALIASES.get(cron.strip().lower(), cron))
    clock = _zone(zone)
    try:
        if _has_fixed_time(text):
            yield from _fixed_times(text, clock, after)
        else:
            yield from _times_on_the_wall(text, clock, after)
    except _library().CronSimError as error:
        raise CronError(
            f"{str(error)[:1].lower()}{str(error)[1:]}; write it as minute hour day month weekday"
        ) from None


def _library() -> Any:
    try:
        import cronsim
    except ImportError:
        raise CronError("schedules need the package cronsim: pip install 'pgtask-supervisor[schedules]'") from None
    return cronsim


@lru_cache(maxsize=1000)
def _zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo  # few programs have schedules

    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError):  # absent, no path within the database, no such key
        raise CronError("this computer knows no such time zone; name one as Europe/Berlin, or UTC") from None


def _has_fixed_time(cron: str) -> bool:
    fields = cron.split()
    return len(fields) == 5 and not fields[0].startswith("*") and not fields[1].startswith("*")


def _fixed_times(cron: str, zone: tzinfo, after: datetime) -> Iterator[datetime]:
    last = after
    for shown in _library().CronSim(cron, after.astimezone(zone).replace(tzinfo=None)):
        time = shown.replace(tzinfo=zone).astimezone(UTC)
        if time.astimezone(zone).replace(tzinfo=None) != shown:
            time = _gap_end(shown, zone)
        if time > last:  # not those of the hour that comes twice, nor two that a gap moves to its end
            last = time
            yield time


def _gap_end(shown: datetime, zone: tzinfo) -> datetime:
    """Return the end of the gap in which a time of day does not exist."""
    # Python reads such a time by the offset from before the gap, or from after it: it lies between these two.
    early, late = (shown.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (1, 0))
    return _first_change(early, late, zone) or late


def _times_on_the_wall(cron: str, zone: tzinfo, after: datetime) -> Iterator[datetime]:
    start, is_found = after.astimezone(UTC).replace(microsecond=0), False
    while True:
        # Up to the next change of the offset, the clock on the wall is a clock without a zone.
        offset = start.astimezone(zone).utcoffset() or timedelta(0)
        shown = (start + offset).replace(tzinfo=None)
        for next_shown in _library().CronSim(cron, shown - _SECOND if is_found else shown):
            time = (next_shown - offset).replace(tzinfo=UTC)
            if (change := _first_change(start, time, zone)) is not None:
                start, is_found = change, True  # a time at the very change is one
                break
            start, is_found = time, False
            yield time
        else:
            return


def _first_change(start: datetime, end: datetime, zone: tzinfo) -> datetime | None:
    """Return the first time after `start`, until `end`, at which a zone changes its offset. No zone changes it twice in
    a day."""
    offset = start.astimezone(zone).utcoffset()
    while start < end:
        step = min(start + _DAY, end)
        if step.astimezone(zone).utcoffset() != offset:
            return _bisect(start, step, zone)
        start = step
    return None


def _bisect(before: datetime, after: datetime, zone: tzinfo) -> datetime:
    """Return the time of the only change of offset between two times, to the second."""
    offset = before.astimezone(zone).utcoffset()
    while after - before > _SECOND:
        middle = before + (after - before) // 2
        middle = middle.replace(microsecond=0)
        if middle.astimezone(zone).utcoffset() == offset:
            before = middle
        else:
            after = middle
    return after
