"""Times that Postgres can store and Python cannot: the years after 9999, and those before 1.

Invariant: on a connection that allows far times, the times of a row never make it unreadable, and a time that was read
is written back to the microsecond.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

__all__ = ["FarTime", "allow_far_times", "from_microseconds", "to_microseconds"]

TIMEOUT = 15.0  # seconds

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_POSTGRES_EPOCH = 946_684_800_000_000  # 2000-01-01 in microseconds since 1970
_MAX_DATETIME, _MIN_DATETIME = datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)
_POSTGRES_ZERO = _EPOCH + timedelta(microseconds=_POSTGRES_EPOCH)
# The times that Python has too, and that are no infinity, lie between these; in microseconds since 2000.
_MIN_TIME = (_MIN_DATETIME - _POSTGRES_ZERO) // timedelta(microseconds=1)
_MAX_TIME = (_MAX_DATETIME - _POSTGRES_ZERO) // timedelta(microseconds=1)
_INFINITY = 2**63 - 1
_DAY = 86_400_000_000
_CYCLE = 146_097  # days in which the calendar repeats, 400 years


class FarTime(datetime):
    """A time that no datetime can hold. It compares as the last or first datetime, and prints its true value:
    `57881-11-29T06:40:00Z`, or `0044-03-15T12:00:00Z BC`."""

    microseconds: int

    def __new__(cls, microseconds: int) -> FarTime:
        time = super().__new__(cls, *(_MAX_DATETIME if microseconds > 0 else _MIN_DATETIME).timetuple()[:6], tzinfo=UTC)
        time.microseconds = microseconds
        return time

    def __str__(self) -> str:
        days, rest = divmod(self.microseconds, _DAY)
        cycles, days = divmod(days, _CYCLE)
        time = _EPOCH + timedelta(days=days, microseconds=rest)
        year = time.year + 400 * cycles
        shown = f"{year:04}" if year > 0 else f"{1 - year:04}"
        return f"{shown}-{time:%m-%dT%H:%M:%S}Z" + (" BC" if year <= 0 else "")


def from_microseconds(microseconds: int) -> datetime:
    """Return the time so many microseconds after 1970, or an infinity. Raises `OverflowError` beyond these."""
    if abs(microseconds) == _INFINITY:
        return _MAX_DATETIME if microseconds > 0 else _MIN_DATETIME
    if not -_INFINITY < microseconds - _POSTGRES_EPOCH < _INFINITY:
        raise OverflowError(microseconds)
    try:
        time = _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return FarTime(microseconds)
    return FarTime(microseconds) if time in (_MAX_DATETIME, _MIN_DATETIME) else time


def to_microseconds(time: datetime) -> int:
    """Return the microseconds since 1970, as `from_microseconds` takes them."""
    if isinstance(time, FarTime):
        return time.microseconds
    if time in (_MAX_DATETIME, _MIN_DATETIME):
        return _INFINITY if time == _MAX_DATETIME else -_INFINITY
    return (time - _EPOCH) // timedelta(microseconds=1)


async def allow_far_times(connection: Any) -> None:
    """Make a connection read and write `timestamptz` by the functions below."""
    async with asyncio.timeout(TIMEOUT):  # asyncpg asks the server about the type
        await connection.set_type_codec(
            "timestamptz", schema="pg_catalog", format="tuple", encoder=_encode, decoder=_decode
        )


def _decode(value: tuple[int]) -> datetime:
    """Read a time; the infinities are the last and the first of Python's times, as in asyncpg, but aware."""
    microseconds = value[0]
    if _MIN_TIME < microseconds < _MAX_TIME:
        return _POSTGRES_ZERO + timedelta(0, 0, microseconds)
    if abs(microseconds) >= _INFINITY:
        return _MAX_DATETIME if microseconds > 0 else _MIN_DATETIME
    return from_microseconds(microseconds + _POSTGRES_EPOCH)


def _encode(time: datetime) -> tuple[int]:
    if isinstance(time, FarTime):
        return (time.microseconds - _POSTGRES_EPOCH,)
    if time.tzinfo is None:  # asyncpg's infinities
        time = time.replace(tzinfo=UTC) if time in (datetime.max, datetime.min) else time.astimezone(UTC)
    since = time - _POSTGRES_ZERO
    microseconds = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    if _MIN_TIME < microseconds < _MAX_TIME:
        return (microseconds,)
    microseconds = to_microseconds(time)
    if abs(microseconds) == _INFINITY:
        return (_INFINITY if microseconds > 0 else -_INFINITY - 1,)
    return (microseconds - _POSTGRES_EPOCH,)
