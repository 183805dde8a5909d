"""dispatch: run the steps that are ready, and gather their outcomes.

Invariants: at most `concurrency` steps are suspended at once; an error of one step stays its own; a step that waits for
a thread is checked on until it has one, or has left this worker.

`Dispatcher` in `_fastpath` does the work of each task; the code here is slow or rare: threads, texts of errors, logs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pgtask._backoff import Backoff
from pgtask._current import current_lease
from pgtask._error_text import describe, summary
from pgtask._fastpath import (
    CounterPage,
    Dispatcher,
    Ended,
    Leases,
    Marks,
    NewTask,
    Outcomes,
    StepEntry,
    Table,
    TaskLease,
)
from pgtask._log import EventLog
from pgtask._postgres.connection import is_connection_loss
from pgtask._sparing import SparingLog
from pgtask._traces import written
from pgtask._worker.batches import Batches
from pgtask._worker.forked import end_if_copy
from pgtask._worker.new_tasks import encode_new_tasks, encode_result, refuse_steps
from pgtask._worker.threads import MIN_SAMPLE, CallKind, StepThreads, ThreadCall
from pgtask.outcome import Next
from pgtask.task import Context, Task

__all__ = ["Dispatch"]

log = EventLog("pgtask.dispatch")

INTERRUPT_WINDOW = 2.0  # seconds after a Ctrl-C in which the failure of a step may be its effect
MAX_CHECK_PAUSE = 0.1  # seconds between two checks on the steps that wait for a thread


class _StepCall:
    """A step that is called in a thread, in a copy of the context of the worker that names its lease."""

    __slots__ = ("_call", "_context", "_dispatch", "_error", "_lease", "_outcome", "_run", "_variables")

    def __init__(
        self, call: ThreadCall, dispatch: Dispatch, lease: TaskLease, run: Callable[[Task, Context], Any], context: Any
    ) -> None:
        self._call, self._dispatch, self._lease = call, dispatch, lease
        self._run, self._context = run, context
        self._variables = dispatch.context
        self._outcome: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._outcome = self._variables.copy().run(self._enter)
        except BaseException as error:
            self._error = error
        end_if_copy(self._error)
        if self._lease.span is not None:
            self._dispatch.spans.end(self._lease, self._outcome, self._error)

    def _enter(self) -> Any:
        current_lease.set(self._lease)
        if self._lease.trace is not None:
            self._dispatch.spans.begin(self._lease)
        return self._call.run_timed(self._run, self._lease.step, self._context)

    def end(self) -> None:
        self._dispatch.end_thread(self._lease, self._call, self._outcome, self._error)

    def cancel(self) -> None:
        """Leave the lease as it is: its worker ends, and releases it."""


class Dispatch(Dispatcher):
    """The dispatcher of one worker. It calls `wake` when there is something to flush or room to claim, and `broke` when
    the engine itself has failed."""

    def __init__(
        self,
        table: Table,
        leases: Leases,
        *,
        concurrency: int,
        max_step_bytes: int,
        marks: Marks | None = None,
        page: CounterPage | None = None,
        wake: Callable[[], None],
        unknown: Callable[[str], float | None],
        is_foreign: Callable[[TaskLease, str], bool] = lambda lease, family: False,
        broke: Callable[[BaseException], None],
        lingers: bool = True,
    ) -> None:
        super().__init__(
            asyncio.get_running_loop(),
            table,
            leases,
            concurrency=concurrency,
            max_step_bytes=max_step_bytes,
            marks=marks,
            page=page,
            logs_finished=log.is_enabled_for(logging.DEBUG),
        )
        self.threads = StepThreads(concurrency)
        self.batches = Batches(self, concurrency=concurrency, lingers=lingers)
        self._is_unlogged = False
        self._expired_log = SparingLog(log, logging.INFO, "task.expired")
        self._kinds: defaultdict[StepEntry, CallKind] = defaultdict(lambda: CallKind(concurrency))
        self._check: asyncio.TimerHandle | None = None  # the next check on the steps that wait for a thread
        self._check_at = 0.0
        self._check_pauses = Backoff(MIN_SAMPLE, MAX_CHECK_PAUSE)
        self._check_pause = MIN_SAMPLE
        self._loop = asyncio.get_running_loop()
        self._max_step_bytes = max_step_bytes
        self._wake = wake
        self._unknown = unknown
        self._is_foreign = is_foreign
        self._broke = broke
        self._interrupted_at = float("-inf")
        self._turn: asyncio.Event | None = None  # of the end of the turn that is under way (hold.py)
        self._turn_leases: set[TaskLease] = set()  # that this turn is about to write
        self._logged_at: dict[tuple[str, str], float] = {}  # by event and step: when it was last logged

    def wake_pump(self) -> None:
        self._wake()

    def unknown_delay(self, name: str) -> float | None:
        return self._unknown(name)

    def is_foreign(self, lease: TaskLease, family: str) -> bool:
        return self._is_foreign(lease, family)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Begin a turn, and end it."""
        self._turn = turn = asyncio.Event()
        try:
            yield
        finally:
            self._turn, self._turn_leases = None, set()
            turn.set()

    def note_turn_leases(self, leases: list[TaskLease]) -> None:
        """Note the leases that the end of the turn writes."""
        self._turn_leases = set(leases)

    async def wait_for_turn(self, leases: Sequence[TaskLease]) -> None:
        """Wait until the rows of these leases name their token: the end of a turn may be about to write it."""
        while (turn := self._turn) is not None:
            if not any(lease.in_turn or lease in self._turn_leases for lease in leases):
                return
            await turn.wait()

    def fail_worker(self, error: BaseException) -> None:
        self._broke(error)

    def gather_step(self, lease: TaskLease) -> None:
        self.batches.gather(lease)

    def close_group(self, entry: StepEntry) -> None:
        self.batches.close_full(entry)

    def start_batches(self) -> None:
        self.batches.start()

    def take_held(self) -> tuple[Outcomes, list[TaskLease], list[TaskLease]]:
        running, waiting = self.batches.take_held()
        outcomes, unended, unstarted = super().take_held()
        return outcomes, unended + running, unstarted + waiting

    def take_ready(self) -> list[TaskLease]:
        return super().take_ready() + self.batches.take_unstarted()

    @contextmanager
    def unlogged(self) -> Iterator[None]:
        """Log no failure of a step: the caller has logged what they have in common."""
        self._is_unlogged = True
        try:
            yield
        finally:
            self._is_unlogged = False

    def end_transaction(self, lease: TaskLease, outcome: Any, error: BaseException | None) -> None:
        self.tools.transactions.end_step(lease, outcome, error)

    def describe_error(self, error: BaseException | str) -> str:
        return describe(error)

    def is_interruption(self, error: BaseException) -> bool:
        return is_connection_loss(error) or self._may_follow_interrupt()

    def encode_new_tasks(self, lease: TaskLease, items: Any) -> list[NewTask]:
        trace = None if lease.span is None else written(lease.span)
        return encode_new_tasks(lease.label, items, self._max_step_bytes, trace)

    def encode_result(self, lease: TaskLease, value: Any) -> str:
        if lease.is_member:
            return encode_result(lease.label, value, self._max_step_bytes)
        refuse_steps(lease.label, value)
        return ""

    def note_interrupt(self) -> None:
        """Note a Ctrl-C. The terminal interrupts the whole process group, with the programs and processes of steps."""
        self._interrupted_at = time.monotonic()

    def _may_follow_interrupt(self) -> bool:
        """Return whether a step that fails now may fail because of a Ctrl-C: shortly after it, or while it stops this
        worker."""
        since = time.monotonic() - self._interrupted_at
        return since < INTERRUPT_WINDOW or (self.draining and since < float("inf"))

    def log_finished(self, lease: TaskLease, label: str, outcome: Any, seconds: float, **more: Any) -> None:
        name = outcome if isinstance(outcome, str) else type(outcome).__name__
        if isinstance(outcome, Ended):
            name = "Done" if outcome.reason is None else "Fail"
        elif isinstance(outcome, Next):
            name = f"Next({type(outcome.step).__name__})"
        fields: dict[str, Any] = {
            "task": lease.id,
            "step": label,
            **more,
            "outcome": name,
            "seconds": round(seconds, 6),
        }
        log.debug("step.done", **fields)

    def log_failed(self, lease: TaskLease, error: BaseException, delay: float | None, tried: int, **more: Any) -> None:
        """Log a failed try that will be repeated: at most once a second for each step, however many fail. Without a
        delay it was the final one, and the workflow decides what follows."""
        if self._is_unlogged:
            return
        debugs = log.is_enabled_for(logging.DEBUG)
        warns = delay is not None and self._is_first_in_second("step.failed", lease.label)
        if not warns and not debugs:
            return
        fields: dict[str, Any] = {"task": lease.id, "step": lease.label, **more, "tried": tried}
        fields |= {"retry": "none" if delay is None else f"in {delay:.3g} s", "error": summary(describe(error))}
        trace = error if debugs else None
        log.log(logging.WARNING if warns else logging.DEBUG, "step.failed", exc_info=trace, trimmed=True, **fields)

    def log_throttled(self, lease: TaskLease, error: BaseException, delay: float, **more: Any) -> None:
        """Log a step that is put off: at most once a second for each step, however many are."""
        informs = self._is_first_in_second("step.throttled", lease.label)
        fields: dict[str, Any] = {"task": lease.id, "step": lease.label, **more, "retry": f"in {delay:.3g} s"}
        fields["error"] = summary(describe(error))
        log.log(logging.INFO if informs else logging.DEBUG, "step.throttled", trimmed=True, **fields)

    def log_expired(self, lease: TaskLease) -> None:
        self._expired_log.log_or_count(task=lease.id, step=lease.label)

    def _is_first_in_second(self, event: str, label: str) -> bool:
        """Return whether an event of a step is the first one in a second, and count it as logged then."""
        now = time.monotonic()
        if now - self._logged_at.get((event, label), 0.0) < 1:
            return False
        self._logged_at[event, label] = now
        return True

    def log_parked(self, lease: TaskLease, text: str, error: BaseException | None = None) -> None:
        if self._is_unlogged:
            return
        fields: dict[str, Any] = {"task": lease.id, "step": lease.label, "error": summary(text)}
        log.warning("task.parked", exc_info=error, trimmed=True, **fields)

    # --- threads

    @property
    def is_stuck(self) -> bool:
        """True while steps wait for a thread and the first checks have not found one."""
        return bool(self.set_aside) and self._check_pause > 2 * MIN_SAMPLE

    @property
    def waits_for_threads(self) -> bool:
        """True while so many steps wait for a thread that this worker should claim no more: as a rule one, since idle
        workers may take the others. A task that came back found no idle worker; the ones behind it must not wait."""
        now = time.monotonic()
        returned = sum(self.released.get(lease.id, (0, 0.0))[1] > now for lease in self.set_aside)
        return len(self.set_aside) > 2 * returned

    def may_start_thread(self, lease: TaskLease, at_once: bool) -> bool:
        assert lease.entry is not None
        if (at_once or self._kinds[lease.entry].has_room()) and self.threads.has_room():
            return True
        if self._check is None:
            self._check_pauses.reset()
            self._schedule_check()
        return False

    def _schedule_check(self) -> None:
        self._check_pause = self._check_pauses.next()
        self._check_at = time.monotonic() + self._check_pause
        self._check = self._loop.call_later(self._check_pause, self._check_set_aside)

    def _check_set_aside(self) -> None:
        """Allow more calls where the running ones wait, and start the steps that may now have a thread."""
        late = time.monotonic() - self._check_at
        waiting = len(self.set_aside)
        for entry in {lease.entry for lease in self.set_aside if lease.entry is not None}:
            self._kinds[entry].sample(late=late)
        self.start_set_aside()
        if not self.set_aside:
            self._check = None
            return
        if len(self.set_aside) < waiting:
            self._check_pauses.reset()
        self._schedule_check()
        if self.is_stuck:
            self._wake()

    def start_thread(self, lease: TaskLease, run: Callable[[Task, Context], Any], context: Context) -> None:
        assert lease.entry is not None
        self.threads.start(_StepCall(self._kinds[lease.entry].begin_call(), self, lease, run, context))

    def end_thread(self, lease: TaskLease, call: ThreadCall, outcome: Any, error: BaseException | None) -> None:
        """Take the outcome of a step that a thread has run."""
        try:
            assert lease.entry is not None
            self._kinds[lease.entry].end_call(call)
            self.end_step(lease, outcome, error)
        except BaseException as broken:  # else no part of the worker would learn of it, and the slot would stay taken
            self._broke(broken)

    def close(self) -> None:
        """Take no more steps for threads. Running ones continue, and nothing waits for them."""
        self._expired_log.log_count()
        if self._check is not None:
            self._check.cancel()
        self.threads.shutdown(cancel_futures=True)
