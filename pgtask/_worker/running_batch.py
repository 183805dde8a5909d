"""One batch that runs: calls `run_batch`, and again with halves of the steps while a call raises.

Invariants: it holds one slot from `start` until each of its steps has an outcome, or is lost or released; a step whose
call raises has failed a try only if it was alone in that call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from pgtask._current import current_lease
from pgtask._fastpath import StepEntry, TaskLease, note_call
from pgtask._log import EventLog
from pgtask._postgres.step_transaction import Interrupted, StepTransaction, forget, is_conflict
from pgtask._retry import throttled_seconds
from pgtask._worker.forked import called_in_thread, end_if_copy
from pgtask.errors import OutcomeError, StepTimeout
from pgtask.outcome import USAGE, Done, Fail, Next
from pgtask.task import BatchContext

if TYPE_CHECKING:
    from pgtask._worker.dispatch import Dispatch

__all__ = ["RunningBatch"]

log = EventLog("pgtask.dispatch")


def _short_repr(thing: object) -> str:
    try:
        return repr(thing)[:100]
    except BaseException:
        return f"a {type(thing).__name__}"


class _WrongResult(Exception):
    """A result of `run_batch` that is not the outcomes of its steps. `error` is the one that its steps get."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.error = OutcomeError(text)


_ROLLED_BACK = Exception("the transaction of a call that goes on without it")


class _Call:
    """One call of `run_batch`, as `current_lease` names it."""

    def __init__(self, label: str, leases: list[TaskLease]) -> None:
        self.label = label
        self.leases = leases


class _Timed:
    """Awaits the coroutine of a call with these leases, and counts the time for which it has the loop. `suspends` is
    called when it waits."""

    def __init__(
        self, dispatch: Dispatch, leases: list[TaskLease], coroutine: Any, suspends: Callable[[], None]
    ) -> None:
        self._dispatch = dispatch
        self._leases = leases
        self._coroutine = coroutine
        self._suspends = suspends

    def __await__(self) -> Generator[Any, None, Any]:
        error: BaseException | None = None
        while True:
            began = time.perf_counter()
            note_call(self._leases)
            try:
                waits_for = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            except StopIteration as stop:
                end_if_copy(None)
                return stop.value
            except BaseException as raised:
                end_if_copy(raised)
                raise
            finally:
                note_call([])
                self._dispatch.count_busy(time.perf_counter() - began)
            end_if_copy(None)
            self._suspends()
            try:
                yield waits_for
                error = None
            except BaseException as raised:
                error = raised


class RunningBatch:
    """A batch of steps of one class, from when it gets its slot."""

    def __init__(self, dispatch: Dispatch, leases: list[TaskLease]) -> None:
        self._dispatch = dispatch
        self._entry = leases[0].entry
        self._waiting = leases
        self._parts: list[list[TaskLease]] = []  # of the batch, that are still to be called
        self._call: asyncio.Task[Any] | None = None
        self._called: list[TaskLease] = []
        self._is_stopped = False
        self._is_thread = False
        self._is_marked = False
        self._is_in_turn = leases[0].in_turn
        self._has_suspended = False  # the call that is under way

    @property
    def extra(self) -> int:
        """The number of its leases that take no slot."""
        return max(0, len(self._waiting) + len(self._called) + sum(map(len, self._parts)) - 1)

    @property
    def unmarked(self) -> int:
        """The number of its steps that will need a mark."""
        return 0 if self._is_marked else len(self._waiting) + len(self._called)

    def start(self, ended: Callable[[RunningBatch], None]) -> None:
        """Take a slot, and begin in the next turn of the loop. `ended` is called when the slot is free again."""
        self._ended = ended
        self._dispatch.take_slot()
        asyncio.get_running_loop().call_soon(self._create_task)

    def _create_task(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._drive())

    async def _drive(self) -> None:
        try:
            if not self._dispatch.draining:  # else the leases are released
                self._parts = [self._dispatch.begin_batch(self._waiting, self)]
            self._waiting = []
            while self._parts and not self._is_stopped:
                self._called = self._dispatch.keep_running(self._parts.pop())
                if self._called:
                    await self._call_part(self._called)
                self._called = []
            for part in self._parts:  # of a worker that leaves
                self._dispatch.end_batched(part, None, asyncio.CancelledError())
        except BaseException as broken:
            self._dispatch.fail_worker(broken)
            raise
        finally:
            self._dispatch.end_batch()
            self._ended(self)

    async def _call_part(self, leases: list[TaskLease]) -> None:
        """Call `run_batch` with some of the steps, and end them, or divide them for two further calls."""
        entry = leases[0].entry
        assert entry is not None
        result, error = await self._attempt(entry, leases)
        outcomes: list[Any] | None = None
        if error is None:
            read = self._read(entry, leases, result)
            outcomes, error = (None, read) if isinstance(read, _WrongResult) else (read, None)
        transaction: StepTransaction | None = leases[0].transaction
        if transaction is not None:
            error = await self._end_transaction(transaction, leases, outcomes, error)
            if error is None:
                return
        if outcomes is not None and (error is None or error is _ROLLED_BACK):
            self._dispatch.end_batched(leases, outcomes, None)
        elif self._is_stopped:
            self._dispatch.end_batched(leases, None, asyncio.CancelledError())
        elif isinstance(error, Interrupted):
            if self._may_divide(leases):
                self._divide_in_halves(entry, leases, error.error)
            else:
                self._dispatch.interrupt_batched(leases, error.error, error.delay)
        elif isinstance(error, _WrongResult):
            self._end_wrong(entry.codec.label, leases, error.error)
        else:
            assert error is not None
            self._divide(entry, leases, error)

    def _divide(self, entry: StepEntry, leases: list[TaskLease], error: BaseException) -> None:
        """End the steps of a call that has raised, or divide them for two further calls."""
        is_interrupted = self._dispatch.is_interruption(error) and not self._may_divide(leases)
        if len(leases) == 1 or is_interrupted or throttled_seconds(error) is not None:
            self._dispatch.end_batched(leases, None, error)
        else:
            self._divide_in_halves(entry, leases, error)

    def _may_divide(self, leases: list[TaskLease]) -> bool:
        """Return whether to divide a call that was interrupted: the second time, since one of its steps may be the
        cause, and only a step that is alone may be charged for that."""
        return len(leases) > 1 and self._dispatch.was_interrupted(leases)

    def _divide_in_halves(self, entry: StepEntry, leases: list[TaskLease], error: BaseException) -> None:
        middle = len(leases) // 2
        log.debug("batch.halved", step=entry.codec.label, tasks=len(leases), error=repr(error)[:200])
        self._parts += [leases[middle:], leases[:middle]]

    async def _end_transaction(
        self,
        transaction: StepTransaction,
        leases: list[TaskLease],
        outcomes: list[Any] | None,
        error: BaseException | None,
    ) -> BaseException | None:
        """End the transaction of a call. Return its error, or None if all is written or is called again."""
        if transaction.is_over:  # an error has left its first block, and it was rolled back there
            forget(transaction)
            if error is not None and transaction.lost_race:
                return Interrupted(error, lost_race=True)
            return error or _ROLLED_BACK
        if not transaction.is_open:  # another asyncio task begins it
            forget(transaction)
            return error or transaction.left_behind()
        if outcomes is None or self._is_stopped:
            await transaction.roll_back()
            forget(transaction)
            error = error or asyncio.CancelledError()
            return Interrupted(error) if is_conflict(error) else error
        try:
            lost = await self._dispatch.tools.transactions.end_call(transaction, leases, outcomes)
        except Exception as raised:
            return raised
        if lost:
            gone = set(lost)
            self._parts.append([lease for lease in leases if lease not in gone])
        return None

    # --- one call

    async def _attempt(self, entry: StepEntry, leases: list[TaskLease]) -> tuple[Any, BaseException | None]:
        """Call `run_batch` once, for the timeout of the policy at most. Return its result, or the error.

        A thread cannot be cancelled. It keeps the slot, the marks and the leases until it has ended, since halves
        beside it would run the same steps twice at once."""
        self._is_thread = not entry.is_async
        loop = asyncio.get_running_loop()
        variables = self._dispatch.context.copy()
        described = _Call(entry.codec.label, leases)
        variables.run(current_lease.set, described)
        spans = self._dispatch.spans
        span = None if spans is None else variables.run(spans.begin_call, leases)
        call = self._call = loop.create_task(self._run(entry, leases, variables), context=variables)
        await asyncio.wait([call], timeout=entry.timeout or None)
        is_late = not call.done()
        if is_late:
            if entry.is_async:
                call.cancel()
            await asyncio.wait([call])
        self._call = None
        described.leases = []  # what the call has left behind is no part of the next one
        result, error = (None, asyncio.CancelledError()) if call.cancelled() else call.result()
        if is_late and (isinstance(error, asyncio.CancelledError) or not entry.is_async):
            late = StepTimeout(f"{entry.codec.label} ran longer than its timeout of {entry.timeout:g} s")
            error = late if error is None else late.with_traceback(error.__traceback__)
        if span is not None:
            spans.end_span(span, "released" if self._is_stopped else result, None if self._is_stopped else error)
        return result, error

    async def _run(self, entry: StepEntry, leases: list[TaskLease], variables: Any) -> tuple[Any, BaseException | None]:
        dispatch = self._dispatch
        dispatch.mark_call(leases)  # not before: another batch may have the loop until now, and kill the process
        self._is_marked = True
        steps, ids, attempts = dispatch.arguments_of_batch(leases)
        context = BatchContext(ids, attempts, dispatch.db, dispatch.resources, dispatch.tools)
        try:
            if entry.is_async:
                self._has_suspended = False
                result = await _Timed(dispatch, leases, entry.run(steps, context), self._note_suspended)
                dispatch.note_call(entry, len(leases), self._has_suspended)
                return result, None
            call = dispatch.threads.submit(called_in_thread, variables.copy().run, entry.run, steps, context)
            return await asyncio.wrap_future(call), None
        except BaseException as error:
            return None, error
        finally:
            dispatch.unmark_call(leases)
            self._is_marked = False

    # --- the end of a call

    def _read(self, entry: StepEntry, leases: list[TaskLease], result: Any) -> list[Any] | _WrongResult:
        """Return an outcome for each step, or the error of all."""
        label, count = entry.codec.label, len(leases)
        if isinstance(result, (Done, Next, Fail)):
            if count > 1 and getattr(result, "enqueue", None):
                return _WrongResult(
                    f"{label} returned one outcome with enqueue= for {count} steps, which would enqueue once for each; "
                    "return a list with an outcome for each, in their order"
                )
            return [result] * count
        if isinstance(result, (list, tuple)):
            if len(result) == count:
                return list(result)
            what = f"returned {len(result)} outcomes for {count} steps"
        else:
            what = "returned None: a return is missing" if result is None else f"returned {_short_repr(result)}"
        return _WrongResult(f"{label} {what}; return {USAGE} for all, or a list with one for each, in their order")

    def _end_wrong(self, label: str, leases: Sequence[TaskLease], error: OutcomeError) -> None:
        """Fail a try of all steps, and say so once."""
        log.error("batch.wrong_outcome", step=label, tasks=len(leases), error=str(error))
        with self._dispatch.unlogged():
            self._dispatch.end_batched(list(leases), None, error)

    # --- what may happen meanwhile

    def _note_suspended(self) -> None:
        if not self._has_suspended:
            self._has_suspended = True
            assert self._entry is not None
            self._dispatch.note_call(self._entry, 0, True)
            if self._is_in_turn:
                self._dispatch.wake_pump()

    @property
    def is_held(self) -> bool:
        """Whether a turn waits for it."""
        return self._is_in_turn and not self._has_suspended

    def leave_turn(self) -> tuple[list[TaskLease], list[TaskLease]]:
        """Leave the turn, which ends. Return the leases that have begun and not ended, and those that have not begun,
        which it forgets."""
        if not self._is_in_turn:
            return [], []
        self._is_in_turn = False
        waiting, self._waiting = self._waiting, []
        begun = [lease for part in (self._called, *self._parts) for lease in part]
        return [lease for lease in begun if lease.is_running and lease.in_turn], waiting

    def note_lost(self) -> None:
        """Cancel the call if none of its steps is ours any more."""
        if self._call is not None and not self._is_thread and not any(lease.is_running for lease in self._called):
            self._call.cancel()

    def stop(self) -> None:
        """Cancel the call: the leases are about to be released."""
        self._is_stopped = True
        if self._call is not None and not self._is_thread:
            self._call.cancel()
