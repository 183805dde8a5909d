"""claim: take due tasks in batches, highest priority first; within it the lane with the oldest task, oldest first.

Invariants: a claim never takes more than was asked for; each claim batch has a token of its own, which nobody else has
ever held; when nothing is due this stage knows when to look next.

A *lane* is a queue and a priority. One cheap statement, the *look*, finds the lanes that have due tasks, and when the
next of the others falls due; claims then go lane by lane. While a lane is being drained that picture is refreshed ten
times a second, so a task of higher priority, or an older one in another queue, waits no longer than that for its turn.

Each lane has a *floor*: its first task at the look, then the last one that was claimed. Claims start there, since what
lies before it in the index is mostly the entries of finished tasks, which stay for as long as any transaction of the
server might see them. The floor is a hint, not the truth (a task that comes back keeps its old time), so the next look
starts at the beginning again; where that has become slow, looks get rarer: they take a twentieth of the time at most.
"""

from __future__ import annotations

import logging
import os
import time
from operator import itemgetter
from typing import Any
from uuid import UUID

import msgspec

from pgtask._events import log_event
from pgtask._postgres.store import Link
from pgtask.errors import DatabaseUnavailable

__all__ = ["Claim"]

log = logging.getLogger("pgtask.claim")

REFRESH = 0.1  # seconds; also when a due task could not be taken because somebody has locked its row
LOOK_SHARE = 20  # while a lane is being drained, looks are this many times their own duration apart, but not more than
RAREST_REFRESH = 60.0  # seconds
DEBOUNCE = 0.01  # seconds between two looks, however many notifications come
SLOWEST_LOOK = 1.0  # seconds that a look is taken to last at most when something calls for the next one
FLOOR_SLACK = 1e-4  # seconds; times come as floats, which are a tenth as exact as that for some centuries
MOST_EXPIRED = 1000
AFTER_OUTAGE = 10.0  # seconds that others are given to come back, before their leases are taken for those of the dead
MOST_CLAIM_BYTES = 16 * 1024 * 1024  # of steps in one claim; a guess from the batches before
_DUE = itemgetter(5)


class _Lane(msgspec.Struct):
    queue: str
    priority: int
    floor: float  # seconds since the epoch, by the clock of the database


class Claim:
    """Finds and takes due tasks over `link`. `poll` is the longest time between two looks without a notification."""

    def __init__(
        self,
        link: Link,
        *,
        worker: bytes,
        queues: tuple[str, ...],
        lease_timeout: float,
        max_step_bytes: int,
        shortest_poll: float,
        longest_poll: float,
    ) -> None:
        self._link = link
        self._worker = worker
        self._queues = list(queues)
        self._lease_timeout = lease_timeout
        self._max_step_bytes = max_step_bytes
        self._shortest_poll, self._longest_poll = shortest_poll, longest_poll
        self._poll = shortest_poll
        self._lanes: list[_Lane] = []
        self._looked = -1.0
        self._look_took = self._last_took = 0.0
        self._hinted = False  # since the last look began
        self._expire_at = 0.0
        self._mean_bytes = 0.0
        self._lost_tokens: list[UUID] = []
        self.look_at = 0.0
        """When to look again (monotonic seconds), unless a hint comes first."""
        self.next_due: float | None = None
        """When the next waiting task of the served queues falls due (monotonic seconds), as of the last look."""

    def hint(self) -> None:
        """Something may have become due: look at once, unless a known lane is being drained anyway."""
        self._hinted = True
        self._poll = self._shortest_poll
        if not self._lanes:
            self.look_at = min(self.look_at, self._next_look())

    def _next_look(self) -> float:
        """The earliest time for a look when something calls for one."""
        return self._looked + max(DEBOUNCE, min(self._look_took, SLOWEST_LOOK))

    def due_in(self, seconds: float) -> None:
        """A task was put off by this worker: look when it falls due."""
        due = time.monotonic() + seconds
        self.look_at = min(self.look_at, max(due, self._next_look()))
        self.next_due = due if self.next_due is None else min(self.next_due, due)

    @property
    def wanted(self) -> bool:
        """Whether a claim may find something now."""
        return bool(self._lanes) or time.monotonic() >= self.look_at

    async def claim(self, limit: int) -> tuple[list[Any], UUID, float]:
        """Up to `limit` rows (id, step, tried, claims, size, due) of one lane, oldest first; their token; and the
        monotonic time from which their lease counts. Empty when nothing is due, when what is due is locked by others,
        or when the database went away.

        Raises `DatabaseRefused`.
        """
        while self._lost_tokens:
            await self._recover(self._lost_tokens[-1])
        if not self._lanes or time.monotonic() >= self.look_at:
            await self.look()
        token = UUID(bytes=self._worker + os.urandom(8))
        sent = time.monotonic()
        if not self._lanes:
            return [], token, sent
        if self._mean_bytes:
            limit = max(1, min(limit, int(MOST_CLAIM_BYTES / self._mean_bytes)))
        lane = self._lanes[0]
        try:
            rows = await self._link.once(
                *("claim", lane.queue, lane.priority, limit, token),
                *(self._lease_timeout, self._max_step_bytes, lane.floor),
            )
        except DatabaseUnavailable:
            self._lost_tokens.append(token)
            return [], token, sent
        rows.sort(key=_DUE)
        self._took(lane, rows, limit)
        return rows, token, sent

    def _took(self, lane: _Lane, rows: list[Any], limit: int) -> None:
        """Learn from a claim of `limit`: the lane may be empty now, and how large steps are."""
        if len(rows) < limit:
            self._lanes.remove(lane)
        if rows:
            lane.floor = rows[-1][5] - FLOOR_SLACK
            self._poll = self._shortest_poll
            sample = rows[:: 1 + len(rows) // 20]
            self._mean_bytes += 0.2 * (sum(len(row[1] or "") for row in sample) / len(sample) - self._mean_bytes)
        if not self._lanes:
            again = self._next_look()
            if not rows and not self._hinted:  # others hold what is due: not at once
                again = max(again, self._looked + REFRESH)
            self.look_at = min(self.look_at, again)

    async def _recover(self, token: UUID) -> None:
        """Give back what a claim took whose reply was lost with the connection; nobody else knows of it."""
        released = await self._link.run("claim_recover", token)
        self._lost_tokens.remove(token)
        if released:
            log_event(log, logging.WARNING, "claim.recovered", tasks=len(released))

    async def look(self) -> None:
        """Free expired leases when it is time, then see which lanes are due and when the next one will be."""
        self._hinted = False
        if time.monotonic() >= self._expire_at:
            await self._expire()
        if self._queues:
            rows = await self._link.run("lanes_of_queues", self._queues)
        else:
            rows = await self._link.run("lanes")
        self._looked = now = time.monotonic()
        took = rows[0][4] if rows else 0.0
        # By the clock of the database, since ours counts the steps that held up the loop; and the lesser of two, since
        # its own counts what it waited for.
        self._look_took, self._last_took = min(took, self._last_took), took
        due = [_Lane(queue, priority, first - FLOOR_SLACK) for queue, priority, wait, first, _ in rows if wait <= 0]
        self._lanes = sorted(due, key=lambda lane: (-lane.priority, lane.floor, lane.queue))
        later = min((wait for _, _, wait, *_ in rows if wait > 0), default=None)
        self.next_due = None if later is None else now + later
        if due:
            self.look_at = now + max(REFRESH, min(LOOK_SHARE * self._look_took, RAREST_REFRESH))
            self.next_due = now
        else:
            self._poll = min(self._poll * 2, self._longest_poll)
            self.look_at = min(now + self._poll, self._expire_at)
            if later is not None:
                self.look_at = min(self.look_at, now + later)
        if self._hinted:  # in the meantime, perhaps for what this look did not see
            self.look_at = min(self.look_at, self._next_look())

    async def _expire(self) -> None:
        """Free the leases that have run out. Nobody's lease made after this look ends within one lease timeout, so to
        look again then, or when the next one known ends, misses none.

        While the database was away nobody could renew: whose lease ended meanwhile may well be alive, and gives it back
        itself, without a charge for its task. A crash is what is left after that."""
        try:
            await self._link.open()  # which finds out whether it was lost
            if time.monotonic() < (patient := self._link.lost_at + min(AFTER_OUTAGE, self._lease_timeout)):
                self._expire_at = patient
                return
            ((freed, following),) = await self._link.once("expire", MOST_EXPIRED)
        except DatabaseUnavailable:
            self._expire_at = time.monotonic() + REFRESH
            return
        wait = self._lease_timeout / 2
        if following is not None:
            wait = min(wait, max(following, 0.0) + 0.01)
        if freed:
            log_event(log, logging.WARNING, "lease.expired", tasks=freed)
        self._expire_at = time.monotonic() + (0 if freed >= MOST_EXPIRED else wait)
