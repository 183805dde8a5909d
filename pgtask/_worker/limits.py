"""limits: claim tasks that wait for their limits, as far as these allow.

Theory of operation. A limit is a row (020_limits.sql), declared by the code of the apps. A worker that has claimed a
task beside the limit of its step (most are inserted so) has it wait: its row then lies in an index of its own. A claim
of a limit leases what may start, by one statement that counts the leased rows of each key. This stage decides when to
send it: at once after a notification, after the end of a step of the limit, and while there are more keys to look at;
at the time at which a rate allows the next start; else after a pause, which grows while nothing waits.

Invariants: what runs under a key is counted in the leased rows, never here; a worker without limits sends nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import msgspec

from pgtask._backoff import Backoff
from pgtask._fastpath import Outcomes, TaskLease
from pgtask._lease_clock import lease_clock
from pgtask._lease_token import lease_token
from pgtask._log import EventLog
from pgtask._postgres.connection import was_rolled_back
from pgtask._postgres.limits import declaration
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask.errors import DatabaseUnavailable, DataRefused, RowsLocked, StatementTimeout
from pgtask.limits import Limit

__all__ = ["Limits"]

log = EventLog("pgtask.limits")

MIN_KEYS, MAX_KEYS = 20, 300  # that one claim looks at
MAX_FREED = 100  # keys of ended steps that the next claim looks at first
BUSY_PAUSE = 0.01  # seconds after a claim that another worker's claim of the limit has kept from running, at most
FULL_PAUSE = 0.1  # seconds between two looks at keys that wait for others to end
MIN_IDLE, MAX_IDLE = 0.2, 5.0  # seconds between two looks while nothing waits
MAX_LEASED = 20_000  # leases that are remembered
MAX_NOTES = 10_000  # of ended steps that the database has not taken yet
_NEVER = float("inf")


class _KnownLimit(msgspec.Struct):
    """A limit as this worker knows it, and the round of its keys that the next claim begins or continues."""

    name: str
    next_at: float = 0.0  # when to claim next (monotonic seconds)
    freed: list[str] = []  # keys under which a step has ended since the last claim
    idle: Backoff = msgspec.field(default_factory=lambda: Backoff(MIN_IDLE, MAX_IDLE))
    reads: int = MIN_KEYS  # keys that the next claim looks at
    after: str | None = None  # the key behind which the round goes on; None: it begins
    has_found: bool = False
    full: int = 0  # keys whose tasks wait for others to end
    waits_until: float = _NEVER  # when the first key may go on that waits for a time (monotonic seconds)


class Limits:
    """The claims of limits of one worker, over the connection of its other claims."""

    def __init__(
        self,
        link: Link,
        claim: Claim,
        limits: Iterable[Limit],
        *,
        worker: bytes,
        queues: Sequence[str],
        lease_timeout: float,
        max_step_bytes: int,
    ) -> None:
        self._link, self._claim = link, claim
        self._declared = {limit.name: limit for limit in limits}
        self._worker = worker
        self._queues = list(queues) or None
        self._lease_timeout, self._max_step_bytes = lease_timeout, max_step_bytes
        self._known = {name: _KnownLimit(name) for name in sorted(self._declared)}
        self._is_written = not self._declared
        self._had_turn = False
        self._leased: set[TaskLease] = set()  # under a limit; some of them may have left without an outcome
        self._notes: list[tuple[str, str, float]] = []

    @property
    def is_used(self) -> bool:
        """Return whether there are limits, of this app or of another one."""
        return bool(self._known)

    @property
    def names(self) -> list[str]:
        return list(self._known)

    @property
    def due_at(self) -> float:
        """The time of the next claim (monotonic seconds)."""
        return min((one.next_at for one in self._known.values()), default=_NEVER)

    def learn(self, names: Iterable[str]) -> None:
        """Learn which limits have rows. One that no code declares any more may still have tasks that wait."""
        for name in {*names, *self._declared} - self._known.keys():
            self._known[name] = _KnownLimit(name)
        for name in self._known.keys() - {*names, *self._declared}:
            del self._known[name]
        self.look_soon()

    def look_soon(self) -> None:
        """Claim at once: tasks may have come, or a limit may have changed."""
        for one in self._known.values():
            one.idle.reset()
            one.next_at = 0.0

    def note_outcomes(self, outcomes: Outcomes) -> None:
        """Note that steps have ended: their keys may go on."""
        if self._leased:
            for lease in outcomes.leases():
                if lease.limit_key is not None:
                    self._leased.discard(lease)
                    self._note_free(lease.limit_key)

    def _note_free(self, key: str) -> None:
        one = self._known.get(key.partition(" ")[0])
        if one is not None:
            one.next_at = 0.0
            if len(one.freed) < MAX_FREED and key not in one.freed:
                one.freed.append(key)

    # --- claims

    def is_due(self, *, others_wait: bool) -> bool:
        """Return whether the next claim is one of a limit. Where other tasks wait as well, the two take turns."""
        self._had_turn = not (self._had_turn and others_wait) and self.due_at <= time.monotonic()
        return self._had_turn

    async def claim(self, most: int, *, suspects: bool) -> tuple[list[Any], UUID, float]:
        """Claim up to `most` tasks of the limit whose turn it is. Returns as `Claim.claim_batch` does; each row ends
        with the key of its limit, and the failed tries in a row of that key."""
        token, sent = lease_token(self._worker), lease_clock()
        if not self._is_written:
            await self._link.run("limits/declare", *declaration(self._declared.values()))
            self._is_written = True
        now = time.monotonic()
        one = min(self._known.values(), key=lambda known: known.next_at)
        first, one.freed = one.freed, []
        parameters = (
            *(one.name, self._queues, sorted(self._claim.paused_queues), most, token, self._lease_timeout),
            *(self._max_step_bytes, self._claim.foreign.pattern, suspects, first, one.after, one.reads),
        )
        try:
            answer, *rows = await self._link.once("limits/claim", *parameters)
        except DatabaseUnavailable as error:
            one.next_at = now + (FULL_PAUSE if isinstance(error, RowsLocked | StatementTimeout) else 0.0)
            if not was_rolled_back(error):
                self._claim.recover(token)
            return [], token, sent
        self._plan(one, answer, rows, most)
        return rows, token, sent

    def _plan(self, one: _KnownLimit, answer: Any, rows: list[Any], most: int) -> None:
        """Decide when to claim from a limit again."""
        now = time.monotonic()
        if answer[2]:
            one.next_at = now + BUSY_PAUSE * random.uniform(0.2, 1.0)
            return
        one.after = answer[1]
        one.full += answer[3]
        if answer[5] is not None:
            one.waits_until = min(one.waits_until, now + answer[5])
        one.has_found = one.has_found or bool(rows)
        one.reads = max(MIN_KEYS, one.reads // 2) if len(rows) >= most else min(MAX_KEYS, 2 * one.reads)
        if len(rows) >= most or one.after is not None:
            one.next_at = now if rows else now + BUSY_PAUSE / 5
            return
        pause = one.idle.next()
        if one.has_found or one.full:
            one.idle.reset()
            pause = FULL_PAUSE
        one.next_at = min(now + pause, one.waits_until)
        one.full, one.has_found, one.waits_until = 0, False, _NEVER

    # --- what ended steps have shown

    async def write_notes(self, notes: list[tuple[str, str, float]]) -> None:
        """Write what steps have shown about their keys: before their outcomes, or another one could start meanwhile. If
        the database is unavailable it keeps them for the next call."""
        self._notes = (self._notes + notes)[-MAX_NOTES:]
        if not self._notes:
            return
        try:
            await self._link.once("limits/note", *_columns(self._notes))
        except (DatabaseUnavailable, RowsLocked, StatementTimeout):
            return
        except DataRefused as error:
            log.error("limits.refused", error=str(error))
        self._notes = []

    def mark(self, leases: Iterable[TaskLease], rows: Iterable[Any]) -> None:
        """Give leases the keys of their limits."""
        for lease, row in zip(leases, rows, strict=True):
            lease.limit_key, lease.limit_failures = row[8], row[9]
            self._leased.add(lease)
        if len(self._leased) > MAX_LEASED:  # many were lost, or released
            self._leased = {lease for lease in self._leased if lease.is_open}


def _columns(notes: list[tuple[str, str, float]]) -> tuple[list[Any], ...]:
    """Sum up notes key by key, as parameters of limits/note.sql."""
    sums: dict[str, list[Any]] = {}
    for key, kind, number in notes:
        of_key = sums.setdefault(key, [0, False, None, None])
        if kind == "failed":
            of_key[0] += 1
        elif kind == "ended":
            of_key[0], of_key[1] = 0, True
        elif kind == "paused":
            of_key[2] = max(of_key[2] or 0.0, number)
        else:
            of_key[3] = (of_key[3] or 0.0) + number
    rows = [(key, *of_key) for key, of_key in sorted(sums.items())]
    return tuple(list(column) for column in zip(*rows, strict=True))
