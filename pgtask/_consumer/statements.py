"""The statements of a consumer: claims, and the outcomes of its leases. The SQL is the worker's.

Invariants: one statement at a time; a statement that has begun is carried through, also when its caller is cancelled,
so that its result is known; a write is fenced by the token of each lease, and reports the leases that did not match; a
row that another session has locked delays the call with its lease, and no other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

from pgtask import _fastpath
from pgtask._consumer.leases import ConsumerLeases, Lease
from pgtask._fastpath import Outcomes
from pgtask._lease_clock import lease_clock
from pgtask._log import EventLog
from pgtask._postgres.connection import map_errors
from pgtask._postgres.store import Link, statement
from pgtask._postgres.transactions import atomically, planned_by_index
from pgtask._traces import find_tracer
from pgtask._worker.behind import Behind
from pgtask._worker.claim import Claim
from pgtask._worker.flush import WITHOUT_GROUPS
from pgtask._worker.groups import Groups
from pgtask._worker.pauses import Pauses
from pgtask.errors import DatabaseError, RowsLocked, StatementTimeout

__all__ = ["StatementQueue"]

log = EventLog("pgtask.consumer")

P = ParamSpec("P")
T = TypeVar("T")
MAX_BATCH = 5000  # tasks in one statement
LOCK_TIMEOUT = "2s"  # for a row, in a transaction of the caller
EXPIRED = -1  # in place of a size, see claim_picked.sql
RETRY_LOCKED = 0.2  # seconds between two tries to end leases whose rows another session has locked

Build = Callable[[list[Lease]], tuple[str, tuple[Any, ...]]]
"""Makes the statement that ends leases, and its parameters. If some were lost, one of its columns is a list: the other
leases."""


class _Batch(NamedTuple):
    """Leases to end by one statement. `was_locked`: another session had locked their rows."""

    leases: list[Lease]
    build: Build
    was_locked: bool = False


class StatementQueue:
    """Sends the statements of one consumer over `link`, one after the other."""

    def __init__(self, link: Link, claim: Claim, held: ConsumerLeases, *, listens: bool) -> None:
        self._link = link
        self._claim = claim
        self._held = held
        self.behind = Behind(link, listens=listens)
        """Looks for tasks that wait behind others."""
        self.groups = Groups(link)
        """Looks for groups that are over, or cancelled."""
        self.pauses = Pauses(link, claim, None, listens=listens, groups=self.groups)
        """Looks for what is paused."""
        self._sending = asyncio.Lock()  # held for the statements that belong together, not for a wait between them
        self.running: set[asyncio.Task[Any]] = set()
        """The work in progress."""

    def begin(self, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **options: P.kwargs) -> asyncio.Task[T]:
        """Carry `work` through; return its task. Its first statement comes after that of the work that began before."""
        task = asyncio.create_task(work(*args, **options))
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    # --- claim

    async def claim_leases(self, limit: int, *, polls: bool) -> list[Lease]:
        """Claim lane by lane until there are enough leases, or no more tasks are known to be due. With `polls`, poll
        the table before giving up."""
        if time.monotonic() >= self.behind.due_at:
            async with self._sending:
                if await self.behind.promote():
                    self._claim.poll_soon()
        if not self.pauses.was_read or time.monotonic() >= self.pauses.due_at:
            async with self._sending:
                await self.pauses.look(waits=not self.pauses.was_read)
        if not self.pauses.was_read:
            return []
        await self._tend_groups()
        taken = await self._claim_lanes(limit)
        if polls and not taken:
            self._claim.next_poll = 0.0
            taken = await self._claim_lanes(limit)
        return taken

    async def _tend_groups(self) -> None:
        if time.monotonic() >= self.groups.due_at:
            async with self._sending:
                await self.groups.work()

    async def _claim_lanes(self, limit: int) -> list[Lease]:
        taken: list[Lease] = []
        try:
            while len(taken) < limit and self._claim.may_find_tasks:
                async with self._sending:
                    rows, token, sent = await self._claim.claim_batch(min(limit - len(taken), MAX_BATCH))
                    taken += await self._add_claimed(rows, token, sent) if rows else []
                if expired := {row[0] for row in rows if row[4] == EXPIRED}:
                    ended = await self._end_expired([lease for lease in taken if lease.task_id in expired])
                    taken = [lease for lease in taken if lease not in ended]
        except BaseException as error:
            if isinstance(error, Exception):
                await self.release_unused(self._held.settle("release", [lease for lease in taken if not lease.is_lost]))
            for lease in taken:  # a lease that could not be released expires
                self._held.forget(lease)
            raise
        return taken

    async def _end_expired(self, leases: list[Lease]) -> set[Lease]:
        """End tasks that have expired before they began, or park them, as their policies say; runs of workflows do not
        expire. Return those that it has ended."""
        parked = {lease for lease in leases if self._held.is_parked_when_expired(lease)}
        dropped = {lease for lease in leases if lease not in parked and not self._held.is_run(lease)}
        await self.finish(list(dropped))
        await self._send(_outcome_batches(list(parked), _park_expired))
        log.info("task.expired", tasks=len(dropped) + len(parked))
        return dropped | parked

    async def _add_claimed(self, rows: list[Any], token: UUID, sent: float) -> list[Lease]:
        leases = self._held.add_claimed(rows, token, sent)
        try:
            if gone := await self.groups.remove_cancelled(leases):
                self._held.leases.remove_all([held for held in leases if held.id in gone])
                leases = [held for held in leases if held.id not in gone]
                rows = [row for row in rows if row[0] not in gone]
            name = "claimed" if find_tracer() is None else "claimed:traced"
            described = await self._link.run(name, [held.id for held in leases], token)
        except BaseException as error:
            self._held.leases.remove_all(leases)
            if isinstance(error, Exception):
                await self._recover_claim(token)
            raise
        return self._held.hand_out(leases, rows, described)

    async def _recover_claim(self, token: UUID) -> None:
        """Release the leases of a claim, as if never claimed. If the database refuses, they expire."""
        try:
            await self._link.run("claim_recover", token)
        except DatabaseError as error:
            log.warning("leases.abandoned", error=str(error))

    # --- outcomes

    async def finish(self, leases: list[Lease]) -> list[Lease]:
        """Write that tasks are done. Returns the leases that were lost."""
        return await self._send(self._done_batches(leases))

    async def finish_within(self, conn: Any, leases: list[Lease]) -> list[Lease]:
        """Write that tasks are done, all or none, in the transaction of `conn`. Returns the leases that were lost; the
        others are still held until that transaction commits."""
        lost: list[Lease] = []
        with map_errors():
            async with atomically(conn), planned_by_index(conn, lock_timeout=LOCK_TIMEOUT):
                for batch in self._done_batches(leases):
                    name, parameters = batch.build(batch.leases)
                    (row,) = await conn.fetch(statement(name), *parameters)
                    written = _found(row)
                    self.groups.note_changed(row[WITHOUT_GROUPS] if len(row) > WITHOUT_GROUPS else ())
                    if written is not None:
                        lost += [lease for lease in batch.leases if lease.held.id not in written]
        gone = set(lost)
        self._held.mark_done([lease for lease in leases if lease not in gone], conn)
        return lost

    def _done_batches(self, leases: list[Lease]) -> list[_Batch]:
        archived = [lease for lease in leases if self._held.is_archived(lease)]
        kept = set(archived)
        others = [lease for lease in leases if lease not in kept]
        batches = _outcome_batches(archived, lambda outcomes, held: outcomes.add_archived(held))
        return batches + _outcome_batches(others, lambda outcomes, held: outcomes.add_done(held))

    async def retry_or_park(self, leases: list[Lease], error: str | None, delay: float) -> list[Lease]:
        """Write that a try has failed: park the tasks with an error, or make them due again after `delay` seconds.
        Returns the leases that were lost."""

        def add(outcomes: Outcomes, held: _fastpath.TaskLease) -> None:
            outcomes.add_rescheduled(held, None, held.tried + 1, error, delay)

        return await self._send(_outcome_batches(leases, add))

    async def release(self, leases: list[Lease]) -> list[Lease]:
        """Release leases untouched. Returns the leases that were lost."""
        return await self._send(_batches(leases, _build_release))

    async def release_unused(self, leases: list[Lease]) -> None:
        """Release leases that were claimed but never delivered, or that the caller still holds at the end. On a refusal
        of the database, let them expire."""
        try:
            await self.release(leases)
        except DatabaseError as error:
            left = [lease for lease in leases if lease.settled_by is None]
            for lease in left:
                self._held.forget(lease)
            log.warning("leases.abandoned", leases=len(left), error=str(error))

    async def _send(self, batches: list[_Batch]) -> list[Lease]:
        """Send batches one after the other, and again those whose rows another session has locked, until none is left;
        other work has its turn in between. Returns the leases that were lost."""
        lost: list[Lease] = []
        locked: list[_Batch] = []
        try:
            while batches:
                async with self._sending:
                    while batches:
                        found, skipped = await self._send_batch(batches[0])
                        lost += found
                        locked += skipped
                        del batches[0]
                if locked:
                    await asyncio.sleep(RETRY_LOCKED)
                batches, locked = locked, []
        finally:
            for batch in (*batches, *locked):
                self._held.unsettle(batch.leases)
        await self._tend_groups()
        return lost

    async def _send_batch(self, batch: _Batch) -> tuple[list[Lease], list[_Batch]]:
        """Send one batch. Returns the leases that were lost, and batches of those that it has skipped, since their rows
        are locked."""
        if batch.was_locked:
            return await self._send_unlocked(batch)
        attempts = 0

        def count_attempt() -> None:
            nonlocal attempts
            attempts += 1

        name, parameters = batch.build(batch.leases)
        try:
            raises = (RowsLocked, StatementTimeout)
            (row,) = await self._link.run(name, *parameters, on_loss=count_attempt, raises=raises)
        except RowsLocked:
            return await self._send_unlocked(batch)
        except StatementTimeout:
            if len(batch.leases) == 1:
                raise
            return [], _halve(batch)
        written = _found(row)
        self.groups.note_changed(row[WITHOUT_GROUPS] if len(row) > WITHOUT_GROUPS else ())
        still = set(row[3] or ()) if name == "release" else set()
        skipped = [lease for lease in batch.leases if lease.held.id in still]
        settled = [lease for lease in batch.leases if lease.held.id not in still]
        for lease in settled:
            lease.is_lost = False
            self._held.forget(lease)
        left = [_Batch(skipped, batch.build)] if skipped else []
        if written is None or attempts:  # sent twice, what is not found was probably written by the first attempt
            return [], left
        lost = [lease for lease in settled if lease.held.id not in written]
        self._held.mark_lost(lost)
        return lost, left

    async def _send_unlocked(self, batch: _Batch) -> tuple[list[Lease], list[_Batch]]:
        """Send the leases of a batch whose rows are not locked. Returns the same as `_send_batch`.

        If none is locked now, one was, or a row that a trigger writes: then it sends nothing, and returns the batch in
        halves, which finds the culprit."""
        rows = await self._link.run("locked", [lease.held.id for lease in batch.leases])
        locked = {row[0] for row in rows}
        if not locked and not batch.was_locked:
            return [], _halve(batch)
        free = [lease for lease in batch.leases if lease.held.id not in locked]
        lost, left = await self._send_batch(_Batch(free, batch.build)) if free else ([], [])
        skipped = [lease for lease in batch.leases if lease.held.id in locked]
        return lost, [*left, _Batch(skipped, batch.build, was_locked=True)] if skipped else left

    async def renew(self, leases: list[Lease], seconds: float) -> list[Lease]:
        """Prolong leases to `seconds` from now. Returns the leases that were lost."""
        lost = []
        for chunk in _chunks(leases):
            async with self._sending:
                sent = lease_clock()
                rows = await self._link.run("renew", *_ids_and_tokens(chunk), seconds)
            ours = {row[0]: row[1] for row in rows}
            lost += [lease for lease in chunk if lease.held.id not in ours]
            renewed = [lease.held for lease in chunk if ours.get(lease.held.id)]
            # As if renewed so late that the usual time is left of it: the background then does not shorten it.
            self._held.leases.mark_renewed(renewed, sent + seconds - self._held.lease_timeout)
        self._held.mark_lost(lost)
        return lost


def _found(row: Any) -> set[UUID] | None:
    """Return the tasks that a statement has found, from its answer; None for all."""
    return next((set(column) for column in row[:WITHOUT_GROUPS] if isinstance(column, list)), None)


def _chunks(leases: list[Lease]) -> list[list[Lease]]:
    return [leases[at : at + MAX_BATCH] for at in range(0, len(leases), MAX_BATCH)]


def _halve(batch: _Batch) -> list[_Batch]:
    middle = (len(batch.leases) + 1) // 2
    return [_Batch(half, batch.build) for half in (batch.leases[:middle], batch.leases[middle:]) if half]


def _batches(leases: list[Lease], build: Build) -> list[_Batch]:
    return [_Batch(chunk, build) for chunk in _chunks(leases)]


def _build_release(leases: list[Lease]) -> tuple[str, tuple[Any, ...]]:
    return "release", (*_ids_and_tokens(leases), [])


def _outcome_batches(leases: list[Lease], add: Callable[[Outcomes, _fastpath.TaskLease], None]) -> list[_Batch]:
    """Batches of one kind of outcome, which `add` puts into the buffer."""

    def build(some: list[Lease]) -> tuple[str, tuple[Any, ...]]:
        outcomes = Outcomes()
        for lease in some:
            add(outcomes, lease.held)
        return outcomes.statement, outcomes.parameters()

    return _batches(leases, build)


def _park_expired(outcomes: Outcomes, held: _fastpath.TaskLease) -> None:
    outcomes.add_rescheduled(held, None, None, "has expired before it began", 0.0)


def _ids_and_tokens(leases: Iterable[Lease]) -> tuple[list[UUID], list[UUID]]:
    return [lease.held.id for lease in leases], [lease.held.token for lease in leases]
