"""transactions: commit what a step has written together with its outcome, or roll it back.

Invariants: the outcome is the last statement of the transaction, and the fence: it finds the row under the token of the
lease, or everything is rolled back. A step keeps its slot, its mark and its lease until the fate of its transaction is
known. A try whose transaction was rolled back for no fault of the step does not count, a few times in a row.

    the step returns -> its outcome is drafted -> written on the connection of the step -> COMMIT -> the lease ends
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, get_args
from uuid import UUID

from pgtask import _current
from pgtask._fastpath import Outcomes, TaskLease
from pgtask._log import EventLog
from pgtask._postgres.step_transaction import (
    CommitUnknown,
    Interrupted,
    Isolation,
    StepTransaction,
    forget,
    is_conflict,
)
from pgtask._postgres.store import Link
from pgtask._sparing import SparingLog
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import WITHOUT_GROUPS, Flush
from pgtask._worker.new_tasks import seconds_until_due
from pgtask.errors import DatabaseRefused, OutcomeError, RowsLocked, StatementTimeout
from pgtask.task import BatchContext, Context

__all__ = ["Transactions"]

log = EventLog("pgtask.transactions")

SLOW = 1.0  # seconds for which a transaction may be open before the log names it
LOOK_INTERVAL = 0.2  # seconds between two looks at rows that a transaction of unknown fate has locked


class Transactions:
    """The transactions of the steps of one worker. `look` is a link of its own for transactions of unknown fate;
    `written` is called with the outcomes that one has written."""

    has_rows = True

    def __init__(
        self,
        dispatch: Dispatch,
        flush: Flush,
        look: Link,
        *,
        lease_timeout: float,
        written: Callable[[Outcomes], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._dispatch = dispatch
        self._flush = flush
        self._link = look
        self._looking = asyncio.Lock()  # one statement at a time over the link
        self._idle_timeout = max(1000, int(1000 * lease_timeout))
        self._written = written
        self.ended = 0
        """Outcomes that were written since the pump last reset this. They come one by one, and so would the claims."""
        self._running: set[asyncio.Task[None]] = set()
        self._slow_log = SparingLog(log, logging.WARNING, "transaction.slow")

    # --- the part of the step

    def open(self, context: Context, isolation: Isolation | None) -> AbstractAsyncContextManager[Any]:
        """Return a block of the transaction of the step with this context."""
        return self.open_for([self._lease_of(context)], isolation)

    def open_for(self, leases: Sequence[TaskLease], isolation: Isolation | None) -> AbstractAsyncContextManager[Any]:
        """Return a block of the transaction of a step with several leases, all of which have it as their
        `transaction`."""
        if isolation not in (None, *get_args(Isolation)):
            raise OutcomeError(
                f"ctx.transaction(isolation={isolation!r}): use 'repeatable_read', 'serializable', or None for read "
                "committed"
            )
        return _Block(self, leases, isolation)

    def open_batch(self, context: BatchContext, isolation: Isolation | None) -> AbstractAsyncContextManager[Any]:
        """Return a block of the transaction of the call with this context."""
        call = _current.current_lease.get(None)
        leases: list[TaskLease] = getattr(call, "leases", [])
        if not leases or [lease.id for lease in leases] != list(context.task_ids):
            raise OutcomeError("ctx.transaction() is called outside of the call that ctx belongs to, or after its end")
        self._check_loop(leases[0].label, "run_batch")
        return self.open_for(leases, isolation)

    def _lease_of(self, context: Context) -> TaskLease:
        lease = _current.current_lease.get(None) or _current.executing() or self._dispatch.leases.get(context.task_id)
        if lease is None or lease.id != context.task_id or not lease.is_running:
            raise OutcomeError("ctx.transaction() is called outside of the step that ctx belongs to, or after its end")
        if lease.entry is not None and hasattr(lease.entry.codec.cls, "workflow"):
            raise OutcomeError(
                f"{lease.label}: ctx.transaction() is for the steps of a task; in a workflow, record the effect by a "
                "step, and make that step idempotent"
            )
        self._check_loop(lease.label, "run")
        return lease

    def _check_loop(self, label: str, method: str) -> None:
        try:
            is_on_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_on_loop = False
        if not is_on_loop:
            raise OutcomeError(
                f"{label} runs in a thread, where ctx.transaction() cannot be used: make it async def {method}"
            )

    async def until_leased(self, leases: Sequence[TaskLease]) -> None:
        """Wait until the rows of these leases name their tokens, if a turn is to write that."""
        await self._dispatch.wait_for_turn(leases)

    async def begin(self, leases: Sequence[TaskLease], isolation: Isolation | None) -> StepTransaction:
        """Begin a transaction, and give it to the leases."""
        transaction = StepTransaction(
            self._dispatch.db, leases, isolation=isolation, idle_timeout=self._idle_timeout, has_rows=self.has_rows
        )
        for lease in leases:
            lease.transaction = transaction
        await transaction.begin()
        if any(lease.transaction is not transaction for lease in leases):  # the step has ended meanwhile
            await transaction.roll_back()
            raise OutcomeError(f"{transaction.label} has ended: await the asyncio task that uses ctx.transaction()")
        transaction.watch = self._loop.call_later(SLOW, self._note_slow, transaction, time.monotonic())
        return transaction

    def _note_slow(self, transaction: StepTransaction, began: float) -> None:
        lease = transaction.leases[0]
        more = {"tasks": len(transaction.leases)} if len(transaction.leases) > 1 else {}
        seconds = round(time.monotonic() - began, 3)
        self._slow_log.log_or_count(task=lease.id, step=lease.label, **more, seconds=seconds)

    # --- the end of a step with one lease

    def end_step(self, lease: TaskLease, outcome: Any, error: BaseException | None) -> None:
        """End a step that has begun a transaction: commit, or roll back."""
        transaction: StepTransaction = lease.transaction
        if transaction.is_over:  # an error has left its first block, and it was rolled back there
            lease.transaction = None
            if error is not None and transaction.lost_race:
                self._dispatch.end_interrupted(lease, error, Interrupted(error, lost_race=True).delay)
            else:
                self._dispatch.end_step(lease, outcome, error)
            return
        if not transaction.is_open:  # another asyncio task begins it
            forget(transaction)
            self._dispatch.end_step(lease, None, error or transaction.left_behind())
            return
        self._carry_through(self._end(lease, transaction, outcome, error))

    def _carry_through(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _end(
        self, lease: TaskLease, transaction: StepTransaction, outcome: Any, error: BaseException | None
    ) -> None:
        try:
            if error is None and lease.is_running:
                await self._end_with(lease, transaction, outcome)
                return
            await transaction.roll_back()
            forget(transaction)
            if error is not None and is_conflict(error):
                self._dispatch.end_interrupted(lease, error, Interrupted(error).delay)
            else:
                self._dispatch.end_step(lease, outcome, error)
        except BaseException as broken:  # else no part of the worker would learn of it
            self._dispatch.fail_worker(broken)

    async def _end_with(self, lease: TaskLease, transaction: StepTransaction, outcome: Any) -> None:
        """Write an outcome, and commit."""
        is_suspect = lease.claims > 1
        outcomes, is_valid, before = self._dispatch.draft_outcome(lease, outcome)
        if not is_valid:
            await transaction.roll_back()
            forget(transaction)
            self._dispatch.outcomes.absorb(outcomes)
            self._dispatch.end_written(lease, is_suspect)
            return
        try:
            lost = await self.commit(transaction, outcomes)
        except Interrupted as interruption:
            self._dispatch.undo_outcome(lease, before)
            self._dispatch.end_interrupted(lease, interruption.error, interruption.delay)
            return
        except Exception as error:
            self._dispatch.undo_outcome(lease, before)
            self._dispatch.end_step(lease, None, error)
            return
        if lost:
            self._flush.end_written(outcomes, [], [], [], is_certain=True)
        self._dispatch.end_written(lease, is_suspect)

    # --- the end of a call of a batch

    async def end_call(
        self, transaction: StepTransaction, leases: list[TaskLease], outcomes: list[Any]
    ) -> list[TaskLease]:
        """Write the outcomes of a call, one for each lease, an exception for a failed try, and commit.

        Returns the leases that were lost: nothing is written then, and the call is to be repeated without them.

        Raises `Interrupted`, `OutcomeError` for an outcome that a step may not have, and other errors of the step;
        nothing is written then. All leases run again, but those that were lost.
        """
        if gone := [lease for lease in leases if not lease.is_running]:
            await transaction.roll_back()
            forget(transaction)
            self._dispatch.end_batched_in_transaction(gone, [lease.claims > 1 for lease in gone])
            return gone
        undo: list[tuple[TaskLease, tuple[Any, ...]]] = []
        were_suspects, errors = [lease.claims > 1 for lease in leases], self._dispatch.errors
        try:
            drafts, is_valid = self._draft(leases, outcomes, undo)
            if is_valid:
                lost = await self.commit(transaction, drafts)
            elif len(leases) > 1:
                raise OutcomeError(f"{leases[0].label} returned an outcome that its step may not have")
        except BaseException:
            await transaction.roll_back()
            forget(transaction)
            self._dispatch.errors = errors
            for lease, before in undo:
                self._dispatch.undo_outcome(lease, before)
            raise
        if not is_valid:  # the draft is the failed try
            await transaction.roll_back()
            forget(transaction)
            self._dispatch.outcomes.absorb(drafts)
            lost = []
        if not lost:
            self._log_failures(leases, outcomes, drafts)
            self._dispatch.end_batched_in_transaction(leases, were_suspects)
            return []
        self._dispatch.errors = errors
        ids = {lease.id for lease in lost}
        for lease, before in undo:
            if lease.id not in ids:
                self._dispatch.undo_outcome(lease, before)
        self._flush.end_written(drafts.divide(ids)[0], [], [], [], is_certain=True)
        self._dispatch.end_batched_in_transaction(lost, [lease.claims > 1 for lease in lost])
        return lost

    def _draft(
        self, leases: list[TaskLease], outcomes: list[Any], undo: list[tuple[TaskLease, tuple[Any, ...]]]
    ) -> tuple[Outcomes, bool]:
        """Draft the outcomes of a call, and note in `undo` how to undo that. Return whether its steps may have them."""
        drafts = Outcomes()
        with self._dispatch.unlogged():
            for lease, outcome in zip(leases, outcomes, strict=True):
                error = outcome if isinstance(outcome, BaseException) else None
                draft, is_valid, before = self._dispatch.draft_outcome(lease, outcome, error)
                undo.append((lease, before))
                drafts.absorb(draft)
                if error is None and not is_valid:
                    return drafts, False
        return drafts, True

    def _log_failures(self, leases: list[TaskLease], outcomes: list[Any], written: Outcomes) -> None:
        """Log the tries of a call that have failed, now that this is in the database."""
        failures = dict(zip(leases, outcomes, strict=True))
        for row in written.rescheduled:
            outcome = failures[row.lease]
            error = outcome if isinstance(outcome, BaseException) else None
            if row.error is not None:
                self._dispatch.log_parked(row.lease, row.error, error)
            elif error is not None:
                self._dispatch.log_failed(row.lease, error, row.delay, row.tried or 0)

    # --- the end of any transaction

    async def commit(self, transaction: StepTransaction, outcomes: Outcomes) -> list[TaskLease]:
        """Write outcomes in a transaction, commit, and end their leases as a flush does. Return the leases that were
        lost: if there are any, everything is rolled back, and no outcome is written.

        Raises `Interrupted` if it was rolled back through no fault of the step, and other errors, which are the step's;
        nothing is written then. In each case the leases have no transaction afterwards. A lease that goes on may start
        its next step when the loop has its next turn.
        """
        position = self._flush.next_position()
        parts = outcomes.parts()
        groups: list[int] = []
        try:
            lost = await self._write(transaction, parts, position, groups)
            written = None if lost else await self._commit(transaction, parts, position)
        except BaseException:
            await transaction.roll_back()
            forget(transaction)
            raise
        if lost:
            await transaction.roll_back()
            forget(transaction)
            return lost
        self._carry_through(transaction.release())
        forget(transaction)
        self._flush.changed(groups)
        for part in parts:
            self._flush.returned += self._flush.end_written(part, None, written, None, is_certain=written is None)
            self._written(part)
            if part.new_tasks:
                self._flush.due_in(min(seconds_until_due(part)))
            self.ended += len(part)
        return []

    async def _write(
        self, transaction: StepTransaction, parts: Sequence[Outcomes], position: int, groups: list[int]
    ) -> list[TaskLease]:
        """Write the outcomes; return the leases that were lost. `groups` gets the groups that have changed."""
        lost: list[TaskLease] = []
        for part in parts:
            answer = await transaction.write(part, position)
            if len(answer) > WITHOUT_GROUPS:
                groups += answer[WITHOUT_GROUPS]
            if any(column is not None for column in answer[:3]):
                lost += self._flush.find_lost(part, *answer[:3])
        return lost

    async def _commit(
        self, transaction: StepTransaction, parts: Sequence[Outcomes], position: int
    ) -> list[UUID] | None:
        """Commit. Return the tasks that go on under their leases, if only a look at the rows has told; else None."""
        try:
            await transaction.commit()
            return None
        except CommitUnknown as unknown:
            written = await self._find_written(transaction, parts, position)
            if written is None:
                raise Interrupted(unknown.__cause__ or unknown) from unknown
            return written

    async def _find_written(
        self, transaction: StepTransaction, parts: Sequence[Outcomes], position: int
    ) -> list[UUID] | None:
        """Find what became of a transaction whose COMMIT was not answered. Return the tasks that go on under their
        leases, or None if it was not committed. Waits until the database answers, and until it has ended."""
        await transaction.release()
        leases = [lease for part in parts for lease in part.leases()]
        ids, tokens = [lease.id for lease in leases], [lease.token for lease in leases]
        log.warning("commit.unknown", task=ids[0], step=leases[0].label)
        while True:
            try:
                async with self._looking:
                    rows = await self._link.run(
                        "find_written", ids, tokens, position, raises=(RowsLocked, StatementTimeout)
                    )
                break
            except (RowsLocked, StatementTimeout):
                await asyncio.sleep(LOOK_INTERVAL)
            except DatabaseRefused as refused:  # its fate stays unknown: the leases expire
                self._dispatch.fail_worker(refused)
                raise
        return [id for id, _ in rows] if all(is_written for _, is_written in rows) else None

    async def close(self) -> None:
        """Close the link."""
        self._slow_log.log_count()
        await self._link.close()


class _Block(AbstractAsyncContextManager[Any]):
    """`async with ctx.transaction()`: the transaction of a step, or a savepoint of it if there is one already."""

    def __init__(self, transactions: Transactions, leases: Sequence[TaskLease], isolation: Isolation | None) -> None:
        self._transactions = transactions
        self._leases = leases
        self._isolation = isolation
        self._savepoint: Any = None

    async def __aenter__(self) -> Any:
        await self._transactions.until_leased(self._leases)
        transaction: StepTransaction | None = self._leases[0].transaction
        if transaction is None or transaction.is_over:
            self._transaction = await self._transactions.begin(self._leases, self._isolation)
        else:
            self._transaction = transaction
            if not transaction.is_open:
                raise OutcomeError(
                    f"{transaction.label} uses ctx.transaction() in several asyncio tasks at once: use one"
                )
            if self._isolation not in (None, transaction.isolation):
                raise OutcomeError(
                    f"{transaction.label}: isolation={self._isolation!r} is for the first ctx.transaction() of a step; "
                    "the others are savepoints of it"
                )
            self._savepoint = await transaction.open_savepoint()
        return self._transaction.connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._savepoint is not None:
            await self._transaction.close_savepoint(self._savepoint, error)
        elif error is not None:
            self._transaction.lost_race = is_conflict(error)
            await self._transaction.roll_back()
