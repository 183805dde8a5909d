"""schedules: start the tasks of the schedules whose time has come. No worker leads.

Theory of operation. Each worker of an app that has schedules knows the earliest time at which one of them is due, by
the clock of the database, and looks then. It plans in Python what the schedules that are due start, and sends one
statement that inserts their tasks and moves the schedules to their next times: if they are still at the time that was
planned for, and no other worker moves them. So a time starts its tasks once, whichever worker comes first, and a death
before the commit leaves it to the next worker that looks.

Invariants: without schedules, and in a burst, this stage sends nothing; what it cannot start stays in its row with the
reason, and holds up no other schedule.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from pgtask._backoff import Backoff
from pgtask._cron import CronError
from pgtask._due import DueSchedule, Firing, plan_firing
from pgtask._log import EventLog
from pgtask._occurrences import occurrence_id
from pgtask._postgres.schedules import declaration
from pgtask._postgres.store import Link
from pgtask.errors import DatabaseUnavailable, DataRefused, RowsLocked, StatementTimeout
from pgtask.schedules import Schedule

__all__ = ["Schedules"]

log = EventLog("pgtask.schedules")

MAX_INTERVAL = 100.0  # seconds between two looks: the clock of the database may have gone forward
MIN_INTERVAL = 0.05  # seconds between two looks
RECHECK = 1.0  # seconds until another look at what another worker moves, or what has failed
MAX_JITTER = 0.05  # seconds by which a worker looks later, so that seldom two plan the same
MAX_DUE = 1000  # schedules in one look
MAX_OCCURRENCES = 1000  # after so many the rest of the schedules waits for the next look
MAX_PLANNING = 0.02  # seconds, the same
MAX_FAILURES = 12  # of statements in one look, enough to find one culprit among them
INITIAL_PAUSE, MAX_PAUSE = 0.5, 5.0  # seconds before another look after a failure


class _Planned(NamedTuple):
    """A schedule that is due, and what becomes of it."""

    schedule: DueSchedule
    firing: Firing


class Schedules:
    """The looks of one worker of `app` over the connection of its claims."""

    def __init__(self, link: Link, app: str, schedules: Mapping[str, Schedule]) -> None:
        self._link = link
        self._app = app
        self._schedules = schedules
        self._pauses = Backoff(INITIAL_PAUSE, MAX_PAUSE)
        self._is_declared = False
        self.due_at = 0.0 if schedules else float("inf")
        """When to look again (monotonic seconds)."""

    async def look(self) -> bool:
        """Declare the schedules of the app at the first look; start what is due. Return whether there are new tasks. If
        the database is unavailable, look again later."""
        try:
            if not self._is_declared:
                await self._declare()
            started = await self._start_due()
        except DatabaseUnavailable:
            self.due_at = time.monotonic() + self._pauses.next()
            return False
        self._pauses.reset()
        return started

    async def _declare(self) -> None:
        rows = await self._link.once("schedules/declared", self._app, list(self._schedules))
        known = [row for row in rows if row[0] is not None]
        wanted = declaration(self._app, self._schedules, known, rows[0][13])
        if wanted is not None:
            for name, other in wanted.taken.items():
                log.warning("schedule.taken", schedule=name, app=self._app, before=other)
            changed = await self._link.once("schedules/declare", *wanted.arguments)
            if declared := [name for name, is_removed in changed if not is_removed]:
                log.info("schedules.declared", names=_shown(declared))
            if removed := [name for name, is_removed in changed if is_removed]:
                log.info("schedules.removed", names=_shown(removed))
        self._is_declared = True

    async def _start_due(self) -> bool:
        rows = await self._link.once("schedules/find_due", self._app, MAX_DUE, random.getrandbits(62))
        now, look_at = rows[0][:2]
        due = [DueSchedule(*row[2:]) for row in rows if row[2] is not None]
        planned, failed = _plan(due, now)
        for schedule, reason in failed:
            await self._put_off(schedule, reason)
        started, is_sure = await self._fire(planned) if planned else (0, True)
        skipped = [one.schedule.name for one in planned if one.firing.skipped_at is not None]
        if skipped and is_sure:  # else the worker that has moved them says so
            log.info("schedules.skipped", names=_shown(skipped))
        looks = [one.firing.look_at for one in planned]
        if len(planned) + len(failed) < len(due) or len(due) == MAX_DUE:
            self.due_at = 0.0  # there may be more
        elif failed or not is_sure:
            self.due_at = time.monotonic() + RECHECK
        else:
            self._wait_until(min([*looks, *([look_at] if look_at is not None else [])], default=None), now)
        return started > 0

    def _wait_until(self, look_at: datetime | None, now: datetime) -> None:
        """Set the time of the next look."""
        seconds = MAX_INTERVAL if look_at is None else (look_at - now).total_seconds()
        jitter = random.uniform(0.0, MAX_JITTER)
        self.due_at = time.monotonic() + min(max(seconds, MIN_INTERVAL), MAX_INTERVAL) + jitter

    async def _fire(self, planned: list[_Planned]) -> tuple[int, bool]:
        """Start the tasks of schedules, and move these, all at once; if that fails, in halves, until the culprit is
        alone, which is put off. Return how many tasks are new, and whether all schedules are moved: another worker that
        moves one may die before it commits."""
        started = moved = failures = 0
        portions = [planned]
        while portions and failures < MAX_FAILURES:
            portion = portions.pop(0)
            try:
                ((tasks, schedules),) = await self._link.once("schedules/fire", *_columns(portion))
                started, moved = started + tasks, moved + schedules
            except (DataRefused, RowsLocked, StatementTimeout) as error:
                failures += 1
                if len(portion) == 1:
                    await self._put_off(portion[0].schedule, str(error))
                else:
                    middle = len(portion) // 2
                    portions += [portion[:middle], portion[middle:]]
        return started, moved == len(planned)

    async def _put_off(self, schedule: DueSchedule, reason: str) -> None:
        log.error("schedule.failed", schedule=schedule.name, error=reason)
        await self._link.once("schedules/put_off", schedule.name, reason)


def _shown(names: Sequence[str]) -> str:
    """Return the names as far as a line of the log has room."""
    return ", ".join(sorted(names))[:500]


def _plan(due: Sequence[DueSchedule], now: datetime) -> tuple[list[_Planned], list[tuple[DueSchedule, str]]]:
    """Plan what schedules start, until that has taken long, or is much. Return also those that cannot be planned."""
    planned: list[_Planned] = []
    failed: list[tuple[DueSchedule, str]] = []
    occurrences, began = 0, time.monotonic()
    for schedule in due:
        try:
            firing = plan_firing(schedule, now)
        except CronError as error:
            failed.append((schedule, str(error)))
            continue
        planned.append(_Planned(schedule, firing))
        occurrences += len(firing.times)
        if occurrences >= MAX_OCCURRENCES or time.monotonic() - began > MAX_PLANNING:
            break
    return planned, failed


def _columns(planned: Sequence[_Planned]) -> list[list[Any]]:
    """Return the arguments of fire.sql."""
    rows = [
        (
            *(one.schedule.name, one.schedule.next_at, one.firing.next_at, one.firing.look_at),
            one.firing.times[-1] if one.firing.times else None,
            one.firing.skipped_at,
            "{" + ",".join(str(occurrence_id(one.schedule.name, at)) for at in one.firing.times) + "}",
        )
        for one in planned
    ]
    return [list(column) for column in zip(*rows, strict=True)]
