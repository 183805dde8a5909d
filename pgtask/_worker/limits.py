"""limits: claim tasks that wait for their limits, as far as these allow.

Theory of operation. A limit is a row (020_limits.sql), declared by the code of the apps. A worker that has claimed a
task beside the limit of its step (most are inserted so) has it wait: its row then lies in an index of its own. A claim
of a limit leases what may start, by one statement that counts the leased rows of each key. This stage decides when to
send it: at once after a notification, after the end of a step of the limit, and while there are more keys to look at;
at the time at which a rate allows the next start; else after a pause, which grows while nothing waits.

Short steps under a limit of how many run at once need no claim of it. They run in a turn (hold.py), which has their
keys locked meanwhile.

Invariants: what runs under a key is counted in the leased rows, never here; a worker without limits sends nothing.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import msgspec

from pgtask._backoff import Backoff
from pgtask._fastpath import Dispatcher, Outcomes, TaskLease
from pgtask._lease_clock import lease_clock
from pgtask._lease_token import lease_token
from pgtask._log import EventLog
from pgtask._postgres.connection import was_rolled_back
from pgtask._postgres.held import HeldTransaction
from pgtask._postgres.limits import declaration
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, DataRefused, RowsLocked, StatementTimeout
from pgtask.limits import Limit

__all__ = ["Limits"]

log = EventLog("pgtask.limits")

MIN_KEYS, MAX_KEYS = 20, 300  # that one claim looks at
MAX_FREED = 100  # keys of ended steps that the next claim looks at first
BUSY_PAUSE = 0.01  # seconds between two portions of a round, and the least after a claim that found another one at work
MIN_PAUSE = 0.05  # seconds between the beginnings of two rounds that a notification requests
MAX_PAUSE = 5.0  # seconds between two rounds while nothing waits
MAX_FULL_PAUSE = 1.0  # the same while tasks wait for others of their key to end, perhaps in another worker
MAX_REFUSED = 60.0  # seconds between two claims that the database refuses
FORGET_INTERVAL = 60.0
MAX_LEASED = 20_000  # leases that are remembered
MAX_NOTES = 10_000  # of ended steps that the database has not taken yet
MAX_CHARGE = 1e15  # units
_NEVER = float("inf")

_Waiting = tuple[TaskLease, str, float]
"""A lease, the key for which its task has to wait, and its cost."""


class HeldLimits(msgspec.Struct):
    """The held leases of a turn as their limits see them."""

    runs: list[TaskLease]
    waiting: list[_Waiting] = []
    left: list[TaskLease] = []  # another turn or claim has their keys, or their class has not proved that it is short
    limited: int = 0  # of all of them, how many have limits that turns obey

    @property
    def are_mostly_limited(self) -> bool:
        return 2 * self.limited > len(self.runs) + len(self.waiting) + len(self.left)

    @property
    def are_mostly_left(self) -> bool:
        return len(self.left) > len(self.runs) + len(self.waiting)


class _KnownLimit(msgspec.Struct):
    """A limit as this worker knows it, and the round of its keys that the next claim begins or continues."""

    name: str
    next_at: float = 0.0  # when to claim next (monotonic seconds)
    freed: list[str] = []  # keys under which a step has ended since the last claim
    pauses: Backoff = msgspec.field(default_factory=lambda: Backoff(2 * MIN_PAUSE, MAX_PAUSE))
    reads: int = MIN_KEYS  # keys that the next claim looks at
    took: float = BUSY_PAUSE  # seconds of the last claim
    refused_for: float = 0.0  # seconds until the next try, while the database refuses claims
    round_at: float = 0.0  # when the round began (monotonic seconds)
    after: str | None = None  # the key behind which the round goes on; None: it begins
    has_found: bool = False
    is_full: bool = False  # whether tasks wait for others of their key to end
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
        self._forget_at = time.monotonic() + FORGET_INTERVAL
        self._leased: set[TaskLease] = set()  # under a limit; some of them may have left without an outcome
        self._failing: set[str] = set()  # keys with failed tries in a row, as far as this worker knows
        self._notes: list[tuple[str, str, float]] = []
        self._held_notes: list[tuple[str, str, float]] = []  # that the transaction of the last turn has written

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
        found = set(names)
        if not self._declared.keys() <= found:
            self._is_written = False  # a person has deleted a row
        for name in {*found, *self._declared} - self._known.keys():
            self._known[name] = _KnownLimit(name)
        for name in self._known.keys() - {*found, *self._declared}:
            del self._known[name]
        self.look_soon()

    def look_soon(self) -> None:
        """Claim soon: tasks may have come, or a limit may have changed."""
        for one in self._known.values():
            one.pauses.reset()
            one.next_at = min(one.next_at, one.round_at + MIN_PAUSE)

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

    async def have_due(self, horizon: float) -> bool:
        """Return whether a task of this app waits for a limit, and would be due in so many seconds without it."""
        if not self.is_used:
            return False
        parameters = self.names, horizon, self._queues, self._claim.foreign.pattern, sorted(self._claim.paused_queues)
        ((waits,),) = await self._link.run("limits/left", *parameters)
        return bool(waits)

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
        if not one.after:
            one.round_at = now
        parameters = (
            *(one.name, self._queues, sorted(self._claim.paused_queues), most, token, self._lease_timeout),
            *(self._max_step_bytes, self._claim.foreign.pattern, suspects, first, one.after, one.reads),
        )
        try:
            answer, *rows = await self._link.once("limits/claim" + self._claim.variant, *parameters)
        except (DatabaseUnavailable, DataRefused, DatabaseRefused) as error:
            self._note_failure(one, token, first, error)
            return [], token, sent
        one.refused_for = 0.0
        self._plan(one, answer, rows, most, first, time.monotonic() - now)
        return rows, token, sent

    def _note_failure(self, one: _KnownLimit, token: UUID, first: list[str], error: Exception) -> None:
        """Decide when to claim again after a claim that has failed. One that the database refuses, as for rights that
        are missing, concerns this limit alone."""
        one.freed = (first + one.freed)[:MAX_FREED]
        if isinstance(error, DatabaseUnavailable):
            one.next_at = time.monotonic() + (MIN_PAUSE if isinstance(error, RowsLocked | StatementTimeout) else 0.0)
            one.reads = max(1, one.reads // 2)
            if not was_rolled_back(error):
                self._claim.recover(token)
            return
        if not one.refused_for:
            log.error("limits.refused", limit=one.name, error=str(error))
        one.refused_for = min(max(2 * one.refused_for, 1.0), MAX_REFUSED)
        one.next_at = time.monotonic() + one.refused_for

    def _plan(self, one: _KnownLimit, answer: Any, rows: list[Any], most: int, first: list[str], took: float) -> None:
        """Decide when to claim from a limit again."""
        now = time.monotonic()
        _, after, is_busy, full, _, due_in, *_ = answer
        if is_busy:  # another worker claims from it
            one.freed = (first + one.freed)[:MAX_FREED]
            one.took = max(one.took, BUSY_PAUSE)
            one.next_at = now + one.took * random.uniform(0.5, 1.5)
            return
        one.took = took
        one.after = after
        if due_in is not None:
            one.waits_until = min(one.waits_until, now + due_in)
        one.has_found = one.has_found or bool(rows)
        one.is_full = one.is_full or full > 0
        one.reads = max(MIN_KEYS, one.reads // 2) if len(rows) >= most else min(MAX_KEYS, 2 * one.reads)
        if len(rows) >= most or one.after is not None:
            one.next_at = now if rows else now + BUSY_PAUSE
            return
        if one.has_found:
            one.pauses.reset()
        pause = one.pauses.next()
        one.next_at = min(now + (min(pause, MAX_FULL_PAUSE) if one.is_full else pause), one.waits_until)
        one.is_full, one.has_found, one.waits_until = False, False, _NEVER

    async def hold(self, leases: list[TaskLease], dispatch: Dispatcher, transaction: HeldTransaction) -> HeldLimits:
        """Lock the keys of held leases for the turn, and sort the leases. Raises as the transaction does."""
        if not self.is_used:
            return HeldLimits(leases)
        runs, limited, unproved = dispatch.sort_held(leases)
        held = HeldLimits(runs, left=unproved, limited=len(limited) + len(unproved))
        if not limited:
            return held
        keys = sorted({key for _, key, _ in limited})
        rows = await transaction.fetch("limits/hold", keys)
        free = dict(zip(keys, rows[0][0], strict=True))
        for entry in limited:
            lease, key, _ = entry
            if free[key] > 0:
                lease.limit_key = key
                held.runs.append(lease)
            elif free[key] < 0:
                held.waiting.append(entry)
            else:
                held.left.append(lease)
        return held

    def note_leased(self, leases: Iterable[TaskLease]) -> None:
        """Note leases of steps that run under limits, as a claim or the end of a turn has written them."""
        self._leased.update(lease for lease in leases if lease.limit_key is not None)
        if len(self._leased) > MAX_LEASED:  # many were lost, or released
            self._leased = {lease for lease in self._leased if lease.is_open}

    async def forget(self) -> None:
        """Delete the keys of which nothing is to be known any more, from time to time."""
        if (now := time.monotonic()) < self._forget_at or not self.is_used:
            return
        self._forget_at = now + FORGET_INTERVAL * random.uniform(0.5, 1.5)
        with contextlib.suppress(DatabaseUnavailable, DataRefused, DatabaseRefused):
            await self._link.once("limits/forget")

    # --- what ended steps have shown

    async def write_notes(self, notes: list[tuple[str, str, float]]) -> None:
        """Write what steps have shown about their keys: before their outcomes, or another one could start meanwhile. If
        the database is unavailable it keeps them for the next call."""
        self._notes = (self._notes + self._worth_writing(notes))[-MAX_NOTES:]
        if not self._notes:
            return
        try:
            await self._link.once("limits/note", *_columns(self._notes))
        except (DatabaseUnavailable, RowsLocked, StatementTimeout):
            return
        except DataRefused as error:
            log.error("limits.refused", error=str(error))
        self._notes = []

    async def write_held_notes(self, notes: list[tuple[str, str, float]], transaction: HeldTransaction) -> None:
        """Write what steps have shown in the transaction of a turn. Raises as that does."""
        self._held_notes = self._worth_writing(notes)
        if self._held_notes:
            await transaction.fetch("limits/note", *_columns(self._held_notes))

    def keep_held_notes(self) -> None:
        """Write the notes of the last turn again, since its transaction was rolled back."""
        self._notes = (self._notes + self._held_notes)[-MAX_NOTES:]

    def _worth_writing(self, notes: list[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
        """Leave out the tries that ended well under keys that have not failed, as far as this worker knows."""
        written = []
        for note in notes:
            if note[1] == "failed":
                if len(self._failing) >= MAX_NOTES:
                    self._failing.clear()
                self._failing.add(note[0])
            elif note[1] == "ended":
                if note[0] not in self._failing:
                    continue
                self._failing.discard(note[0])
            written.append(note)
        return written

    def mark(self, leases: Sequence[TaskLease], rows: Iterable[Any]) -> None:
        """Give leases the keys of their limits."""
        for lease, row in zip(leases, rows, strict=True):
            lease.limit_key, lease.limit_failures = row[-2], row[-1]
            if lease.limit_failures > 0:
                self._failing.add(lease.limit_key)
        self.note_leased(leases)


def _columns(notes: list[tuple[str, str, float]]) -> tuple[list[Any], ...]:
    """Sum up notes key by key, as parameters of limits/note.sql: failed tries are those since one that ended well."""
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
            of_key[3] = min(max((of_key[3] or 0.0) + number, -MAX_CHARGE), MAX_CHARGE)
    rows = [(key, *of_key) for key, of_key in sorted(sums.items())]
    return tuple(list(column) for column in zip(*rows, strict=True))
