"""expired: free the leases that have ended.

Invariant: no lease that is made after such a statement ends within one lease timeout, so it is enough to send it again
when the next known lease ends, or after half of that time.

The index of leases keeps dead entries as that of the lanes does. Where reading it has become slow, this stage reads
from a *floor*, the time of the last statement: what had ended before that is free, except for rows that were locked. A
sweep finds those (sweep.py).

A statement may also be slow since it frees many leases, beside triggers for instance. One that the server cancels is
sent again with a tenth of its limit, and only one with a limit of 1 is taken for one that reads too much.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from pgtask._log import EventLog
from pgtask._postgres.store import Link
from pgtask._postgres.writer import MAX_TIME
from pgtask._worker.sweep import PORTION_TIME, SLOW_HINT, Sweep
from pgtask.errors import DatabaseUnavailable, StatementTimeout

__all__ = ["ExpiredLeases"]

log = EventLog("pgtask.claim")

# Seconds from the end of a lease until this worker frees it: leases that were renewed in one statement end some
# milliseconds apart, and are divided into groups together.
EXPIRE_DELAY = 0.1
RETRY_DELAY = 0.1  # seconds after a loss of the connection
MAX_EXPIRED = 1000  # leases in one statement; less after one that was too slow
SLOW = 0.05  # seconds of a statement that reads all, twice in a row, from which on a floor pays
# Seconds after an outage in which other workers may renew or release their leases, before these count as those of dead
# workers: longer than the longest pause between two tries of a worker.
OUTAGE_GRACE = 10.0
# Seconds before the first statement from which the floor counts if the server has cancelled the statement that was to
# find it.
UNKNOWN_AGE = 60.0
_ALL = float("-inf"), float("inf"), float("-inf")


class _Freed(NamedTuple):
    """The answer of a statement, and whether it has reached its limit, so that more may have ended."""

    tasks: int
    following: float | None
    now: float
    took: float
    is_full: bool


class ExpiredLeases:
    """Frees ended leases over `link`; `lease_timeout` is that of the leases of this worker."""

    def __init__(self, link: Link, lease_timeout: float) -> None:
        self._link = link
        self._lease_timeout = lease_timeout
        self._free_at = 0.0
        self._sweep: Sweep | None = None  # while it uses a floor
        self._floor = float("inf")  # by the clock of the database,
        self._floor_at = 0.0  # and by ours
        self._next_end = float("-inf")  # no known lease ended before it, as of the last statement
        self._last_took = 0.0
        self._limit = MAX_EXPIRED

    @property
    def due_at(self) -> float:
        """The time at which to call `free` (monotonic seconds)."""
        return self._free_at if self._sweep is None else min(self._free_at, self._sweep.due_at)

    def free_soon(self) -> None:
        """Let the next call of `free` send its statement, whether or not a lease ends."""
        self._free_at = 0.0

    async def free(self) -> None:
        """Free the leases that have ended.

        During an outage no worker can renew: a worker whose lease ended meanwhile may well be alive, and releases it by
        itself, which does not count against its task. A lease that is still there after that belongs to a dead worker.
        """
        try:
            await self._link.open()  # finds out whether the connection was lost
            if time.monotonic() < (grace_ends := self._link.lost_at + OUTAGE_GRACE):
                self._put_off(grace_ends)
                return
            if time.monotonic() >= self._free_at:
                await self._free_from_floor()
            if self._sweep is not None and self._sweep.is_due:
                await self._free_behind(self._sweep)
        except DatabaseUnavailable:
            self._put_off(time.monotonic() + RETRY_DELAY)

    def _put_off(self, until: float) -> None:
        self._free_at = max(self._free_at, until)
        if self._sweep is not None:
            self._sweep.due_at = max(self._sweep.due_at, until)

    async def _free_from_floor(self) -> None:
        """Free what has ended since the floor, or all; learn when the next lease ends."""
        sent = time.monotonic()
        span = _ALL if self._sweep is None else (self._floor, sent - self._floor_at, float("-inf"))
        following_from = float("-inf") if self._sweep is None else self._next_end
        try:
            freed = await self._expire(*span, following_from)
        except StatementTimeout:
            self._pass_floor(sent)
            return
        if freed is None or freed.is_full:
            self._free_at = 0.0
            return
        following, now = freed.following, freed.now
        wait = self._lease_timeout / 2
        if following is not None:
            wait = min(wait, max(following, 0.0) + EXPIRE_DELAY)
        self._free_at = time.monotonic() + wait
        self._floor, self._floor_at = now, sent
        self._next_end = now + self._lease_timeout if following is None else now + min(following, self._lease_timeout)
        if self._sweep is None and not freed.tasks and min(freed.took, self._last_took) > SLOW:
            self._sweep = Sweep()
        self._last_took = freed.took

    async def _expire(self, *bounds: float) -> _Freed | None:
        """Free leases between these bounds. Return None if that was too slow, so that the next try frees fewer. Raise
        `StatementTimeout` if it was too slow for a single one."""
        limit = self._limit
        try:
            ((tasks, following, now, took),) = await self._link.once("expire", limit, *bounds)
        except StatementTimeout:
            if limit == 1:
                raise
            self._limit = max(1, limit // 10)
            return None
        if is_full := tasks >= limit:
            self._limit = min(MAX_EXPIRED, 2 * limit)
        if tasks:
            log.warning("lease.expired", tasks=tasks)
        return _Freed(tasks, following, now, took, is_full)

    def _pass_floor(self, sent: float) -> None:
        """Read from a later time on, and leave the rest to a sweep, since the server has cancelled what was `sent` at
        that time."""
        self._floor, self._floor_at, self._next_end = float("inf"), sent, float("-inf")
        if self._sweep is None:
            log.warning("expire.slow", hint=SLOW_HINT)
            self._sweep = Sweep()
            self._floor_at -= UNKNOWN_AGE
        else:
            self._free_at = time.monotonic() + self._lease_timeout / 2

    async def _free_behind(self, sweep: Sweep) -> None:
        """Free leases behind the floor, for some milliseconds; give it up where reading all has become fast."""
        spent, is_swept = 0.0, False
        try:
            while spent < PORTION_TIME and not is_swept:
                portion = sweep.next_portion()
                freed = await self._expire(float("inf"), *portion, float("inf"))
                spent += MAX_TIME if freed is None else freed.took
                is_swept = freed is not None and not freed.is_full and sweep.record(portion, freed.took)
        except StatementTimeout:
            sweep.divide(portion)
            spent = MAX_TIME
        sweep.rest(spent)
        if is_swept and sweep.took < SLOW:
            self._sweep, self._last_took = None, 0.0
