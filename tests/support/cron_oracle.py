"""A second opinion on the times of a cron expression: slow, and by other means than pgtask and its library.

It reads a zone minute by minute near its changes, tries each date and each time of day, and looks which moments show
them on the clock on the wall.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from random import Random
from typing import NamedTuple
from zoneinfo import ZoneInfo

MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
MINUTE, STEP, DAY = timedelta(minutes=1), timedelta(hours=3), timedelta(days=1)

OLD = (  # five years from 2010
    *("Pacific/Apia", "Australia/Lord_Howe", "Africa/Casablanca", "Europe/Dublin", "America/St_Johns", "Africa/Cairo"),
    *("America/Sao_Paulo", "Asia/Gaza", "Asia/Amman", "Europe/Istanbul", "Europe/Moscow", "Asia/Tehran"),
    *("America/Caracas", "Antarctica/Casey", "Pacific/Fiji"),
)
NEW = (  # five years from 2022
    *("Europe/Berlin", "Europe/London", "America/New_York", "America/Los_Angeles", "Asia/Tokyo", "Asia/Kolkata"),
    *("Asia/Kathmandu", "Australia/Sydney", "Pacific/Auckland", "Pacific/Chatham", "America/Havana", "Asia/Beirut"),
    *("America/Santiago", "Africa/El_Aaiun", "America/Nuuk"),
)
ZONES = {**dict.fromkeys(OLD, datetime(2010, 1, 1, tzinfo=UTC)), **dict.fromkeys(NEW, datetime(2022, 1, 1, tzinfo=UTC))}
YEARS = 5


class Span(NamedTuple):
    """A time in which a zone has one offset."""

    start: datetime
    end: datetime
    offset: timedelta

    def shows(self, shown: datetime) -> datetime | None:
        """Return the moment of this span at which the clock on the wall shows a time."""
        moment = shown.replace(tzinfo=UTC) - self.offset
        return moment if self.start <= moment < self.end else None


def _offset(zone: ZoneInfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).replace(tzinfo=UTC) - moment


@lru_cache
def spans(name: str) -> list[Span]:
    """Return the spans of a zone: its five years and a week around them."""
    zone, first = ZoneInfo(name), ZONES[name] - 7 * DAY
    last = ZONES[name].replace(year=ZONES[name].year + YEARS) + 7 * DAY
    found, start, offset, moment = [], first, _offset(zone, first), first
    while moment < last:
        if _offset(zone, moment + STEP) != offset:
            change = next(at for at in (moment + n * MINUTE for n in range(1, 181)) if _offset(zone, at) != offset)
            found.append(Span(start, change, offset))
            start, offset = change, _offset(zone, change)
            moment = change
        else:
            moment += STEP
    return [*found, Span(start, last, offset)]


def windows(name: str) -> list[tuple[datetime, datetime]]:
    """Return the day and a half around each change of a zone in its five years, or its first three days."""
    first, last = ZONES[name], ZONES[name].replace(year=ZONES[name].year + YEARS)
    changes = [span.start for span in spans(name)[1:] if first < span.start < last]
    return [(change - 0.75 * DAY, change + 0.75 * DAY) for change in changes] or [(first, first + 3 * DAY)]


def oracle(cron: str, name: str, first: datetime, last: datetime) -> list[datetime]:
    """Return the times of an expression after `first`, until `last`."""
    minute, hour, day, month, weekday = cron.upper().split()
    minutes, hours = sorted(_numbers(minute, 0, 59)), sorted(_numbers(hour, 0, 23))
    months = _numbers(month, 1, 12, MONTHS, 1)
    fits_day, fits_weekday = _day_test(day), _weekday_test(weekday)
    both = day.startswith("*") or weekday.startswith("*")
    is_fixed = not minute.startswith("*") and not hour.startswith("*")
    found: set[datetime] = set()
    here = [one for one in spans(name) if one.end > first - 2 * DAY and one.start < last + 2 * DAY]
    at = first.date() - 2 * DAY  # Apia went over a whole day
    while at <= last.date() + DAY:
        fits = [fits_day(at), fits_weekday(at)]
        if at.month in months and (all(fits) if both else any(fits)):
            for shown in (datetime.combine(at, time(h, m)) for h in hours for m in minutes):
                moments = [moment for one in here if (moment := one.shows(shown)) is not None]
                if is_fixed:
                    moments = moments[:1] or [_end_of_gap(here, shown)]
                found.update(moments)
        at += DAY
    return sorted(moment for moment in found if first < moment <= last)


def _end_of_gap(here: list[Span], shown: datetime) -> datetime:
    later = (one.start for one in here if (one.start + one.offset).replace(tzinfo=None) > shown)
    return next(later, datetime.max.replace(tzinfo=UTC))


def _numbers(field: str, low: int, high: int, names: list[str] | None = None, base: int = 0) -> set[int]:
    def number(text: str) -> int:
        return names.index(text) + base if names is not None and text in names else int(text)

    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        begin, dash, end = span.partition("-")
        if span == "*":
            first, last = low, high
        elif dash:
            first, last = number(begin), number(end)
        else:
            first = number(begin)
            last = high if step else first
        found.update(range(first, last + 1, int(step or 1)))
    return found


def _day_test(field: str) -> Callable[[date], bool]:
    if field == "L":
        return lambda at: (at + DAY).day == 1
    if field == "LW":
        return lambda at: at.weekday() < 5 and all((at + n * DAY).weekday() > 4 for n in range(1, _left(at) + 1))
    days = _numbers(field, 1, 31)
    return lambda at: at.day in days


def _left(at: date) -> int:
    return calendar.monthrange(at.year, at.month)[1] - at.day


def _weekday_test(field: str) -> Callable[[date], bool]:
    def weekday(at: date) -> int:
        return (at.weekday() + 1) % 7

    if field.endswith("L"):
        return lambda at: weekday(at) == int(field[:-1]) % 7 and _left(at) < 7
    if "#" in field:
        wanted, count = field.split("#")
        return lambda at: weekday(at) == min(_numbers(wanted, 0, 7, DAYS)) % 7 and (at.day - 1) // 7 + 1 == int(count)
    days = {number % 7 for number in _numbers(field, 0, 7, DAYS)}
    return lambda at: weekday(at) in days


# --- expressions


def expressions(count: int, seed: int = 8) -> Iterator[str]:
    """Yield expressions of all kinds, of which many meet the hours in which clocks change."""
    random = Random(seed)
    for _ in range(count):
        minute = random.choice([_one(random, 0, 59), _one(random, 0, 59), _some(random, 0, 59), "0", "30", "*/15", "*"])
        hour = random.choice([_one(random, 0, 4), _one(random, 0, 23), _some(random, 0, 23), "0-4", "*/2", "*", "*"])
        day = random.choice(["*", "*", "*", _one(random, 1, 28), _some(random, 1, 31), "L", "LW", "*/2"])
        month = random.choice(["*", "*", "*", _some(random, 1, 12), random.choice(MONTHS), "3,4,9-11"])
        weekday = random.choice(["*", "*", "0", "7", "MON-FRI", _some(random, 0, 7), "SUN#2", "5L", "6#1", "*/2"])
        yield f"{minute} {hour} {day} {month} {weekday}"


def _one(random: Random, low: int, high: int) -> str:
    return str(random.randint(low, high))


def _some(random: Random, low: int, high: int) -> str:
    first, last = sorted((random.randint(low, high), random.randint(low, high)))
    return random.choice([f"{first}-{last}", f"{first},{last}", f"{first}-{last}/{random.randint(1, 7)}", f"{first}/5"])
