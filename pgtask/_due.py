"""The rules of a schedule that is due: which of its times start a task, and when to look again.

Invariant: of a schedule, the times that start a task become later and later; none of them is before `next_at`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from pgtask._cron import last_times, next_time

__all__ = ["DueSchedule", "Firing", "plan_firing"]

MAX_LATE = timedelta(minutes=1)
"""The age from which an occurrence is missed with `missed="skip"`: a restart of the workers takes less."""

RETRY = timedelta(seconds=1)
"""The time until another look at a task that must end before the next occurrence."""


class DueSchedule(NamedTuple):
    """A schedule whose next time has come. `is_running`: the task of its last occurrence waits or runs."""

    name: str
    cron: str
    zone: str
    missed: str
    max_missed: int
    overlap: str
    next_at: datetime
    is_paused: bool
    is_running: bool


class Firing(NamedTuple):
    """What becomes of it: `times` start a task each, `next_at` is the next one that may, nothing happens to it before
    `look_at`, and `skipped_at` is a time that was left out."""

    times: list[datetime]
    next_at: datetime
    look_at: datetime
    skipped_at: datetime | None = None


def plan_firing(one: DueSchedule, now: datetime) -> Firing:
    """Return what to do with a schedule at a time of the database. Raises `CronError`."""
    if one.next_at > now:  # the clock went back
        return Firing([], one.next_at, one.next_at)
    keeps_all = one.missed == "all"
    following = next_time(one.cron, one.zone, one.next_at)
    times = [one.next_at]
    if following <= now:  # more than one time has passed
        following = next_time(one.cron, one.zone, now)
        times = last_times(one.cron, one.zone, one.next_at, now, one.max_missed if keeps_all else 1)
        if not times:  # the rules of the zone have changed since
            return Firing([], following, following)
    skipped = one.next_at if times[0] > one.next_at else None
    is_missed = one.missed == "skip" and now - times[-1] > MAX_LATE
    waits = one.overlap == "skip" and one.is_running
    if one.is_paused or is_missed or (waits and not keeps_all):
        return Firing([], following, following, times[-1])
    if waits:
        return Firing([], times[0], now + RETRY, skipped)
    if one.overlap == "skip" and len(times) > 1:
        return Firing(times[:1], times[1], now + RETRY, skipped)
    return Firing(times, following, following, skipped)
