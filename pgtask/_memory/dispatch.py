"""The worker's dispatch, with a tap on each step that notes its tries and brings about the faults of a test.

Invariant: the worker's code decides the outcome of a fault; the code here only brings the fault about.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pgtask._fastpath import Leases, StepEntry, Table, TaskLease
from pgtask._memory.rows import Rows, Try
from pgtask._progress import Progress
from pgtask._worker.dispatch import Dispatch
from pgtask.app import App
from pgtask.errors import StepTimeout
from pgtask.task import BatchContext, Context, Task

__all__ = ["Fault", "MemoryDispatch", "current_run"]

Fault = BaseException | type[BaseException] | Literal["crash", "timeout"]
Matches = Callable[[Any], bool]

current_run: ContextVar[UUID] = ContextVar("current_run")
"""The task whose step is running, also in the branches of a run."""


class MemoryDispatch(Dispatch):
    """Runs the steps of `app` and notes the tries in `rows`. Call `tap` once each step has its handler."""

    def __init__(
        self,
        app: App,
        rows: Rows,
        leases: Leases,
        *,
        concurrency: int,
        max_step_bytes: int,
        wake: Callable[[], None],
        broke: Callable[[BaseException], None],
    ) -> None:
        super().__init__(
            Table(app),
            leases,
            concurrency=concurrency,
            max_step_bytes=max_step_bytes,
            wake=wake,
            unknown=lambda name: None,
            broke=broke,
            lingers=False,
        )
        self._rows = rows
        self.faults: dict[type[Task] | str, deque[tuple[Fault, Matches | None]]] = defaultdict(deque)
        """By step of a task, or by name of a step in a workflow; and the steps of that class that a fault is for."""
        self._culprits: dict[UUID, Fault] = {}  # tasks of a batch for which a fault has come up
        self.tried: set[type[Task] | str] = set()
        """The steps, named as in `faults`, of which there was a try."""
        self.crashed: set[UUID] = set()
        """Tasks whose outcome must not be written."""

    def tap(self, app: App) -> None:
        for definition in app:
            entry = self.table.entry(definition.cls)
            if entry.batch is not None:
                entry.run = self._tap_batch(entry)
            else:
                is_async = inspect.iscoroutinefunction(entry.run)
                entry.run = self._tap_async(entry) if is_async else self._tap_thread(entry)

    def _tap_async(self, entry: StepEntry) -> Callable[[Task, Context], Any]:
        run = entry.run

        async def tapped(step: Task, context: Context) -> Any:
            current_run.set(context.task_id)
            if self._begin(step, context) == "timeout":
                asyncio.get_running_loop().call_soon(self.time_out, self._lease_of(context))
            return await run(step, context)

        return tapped

    def _tap_thread(self, entry: StepEntry) -> Callable[[Task, Context], Any]:
        run = entry.run

        def tapped(step: Task, context: Context) -> Any:
            if self._begin(step, context) == "timeout":
                is_over = threading.Event()
                self._loop.call_soon_threadsafe(self._expire_and_say, self._lease_of(context), is_over)
                is_over.wait()
            return run(step, context)

        return tapped

    def _tap_batch(self, entry: StepEntry) -> Callable[[list[Task], BatchContext], Any]:
        run = entry.run

        async def tapped(steps: list[Task], context: BatchContext) -> Any:
            self._begin_batch(entry, steps, context.task_ids)
            return await run(steps, context)

        def tapped_in_thread(steps: list[Task], context: BatchContext) -> Any:
            self._begin_batch(entry, steps, context.task_ids)
            return run(steps, context)

        return tapped if inspect.iscoroutinefunction(run) else tapped_in_thread

    def _begin_batch(self, entry: StepEntry, steps: list[Task], ids: Sequence[UUID]) -> None:
        """Bring about the faults of a call. A fault meets one step, and so each call with it until it is alone."""
        cls = entry.codec.cls
        self.tried.add(cls)
        if not self._culprits.keys() & set(ids):
            for step, id in zip(steps, ids, strict=True):
                if (fault := self._take_fault(cls, step)) is not None:
                    self._culprits[id] = fault
                    break
        for id in ids:
            fault = self._culprits.get(id)
            if fault is not None and (len(ids) == 1 or fault == "crash"):
                del self._culprits[id]
            if fault == "crash":
                self.crashed.update(ids)
            elif fault == "timeout":
                raise StepTimeout(f"{entry.codec.label} ran longer than its timeout of {entry.timeout:g} s")
            elif fault is not None:
                raise fault

    def gather_step(self, lease: TaskLease) -> None:
        self._rows.tasks[lease.id].tries.append(Try(lease.step, lease.tried + 1, self._rows.now))
        super().gather_step(lease)

    def _lease_of(self, context: Context) -> TaskLease:
        lease = self.leases.get(context.task_id)
        assert lease is not None
        return lease

    def _expire_and_say(self, lease: TaskLease, is_over: threading.Event) -> None:
        self.time_out(lease)
        is_over.set()

    def _begin(self, step: Task, context: Context) -> Fault | None:
        """Note a try, and raise its fault if that is an exception."""
        now: datetime = self._rows.now
        self._rows.tasks[context.task_id].tries.append(Try(step, context.attempt, now))
        fault = self.next_fault(type(step), step)
        if fault == "crash":
            self.crashed.add(context.task_id)
        return fault

    def note_progress(self, task: UUID, attempt: int, progress: Progress) -> None:
        """Note the progress of a try of a task, unless that is over. Safe in threads."""
        lease, now = self.leases.get(task), self._rows.tasks[task].tries[-1]
        if lease is not None and lease.is_running and now.attempt == attempt:
            now.progress = progress

    def next_fault(self, cls: type[Task] | str, step: Task | None = None) -> Fault | None:
        """The fault for this try of a step, raised if it is an exception."""
        self.tried.add(cls)
        fault = self._take_fault(cls, step)
        if fault is not None and not isinstance(fault, str):
            raise fault
        return fault

    def _take_fault(self, cls: type[Task] | str, step: Task | None) -> Fault | None:
        """Take the first fault that is for this step out of those of its class."""
        faults = self.faults.get(cls, ())
        for at, (fault, matches) in enumerate(faults):
            if matches is None or matches(step):
                del self.faults[cls][at]
                return fault
        return None

    def log_failed(self, lease: TaskLease, error: BaseException, delay: float | None, tried: int, **more: Any) -> None:
        super().log_failed(lease, error, delay, tried, **more)
        if delay is not None:
            self._note(lease, self.describe_error(error))

    def log_throttled(self, lease: TaskLease, error: BaseException, delay: float, **more: Any) -> None:
        super().log_throttled(lease, error, delay, **more)
        self._note(lease, self.describe_error(error))

    def log_parked(self, lease: TaskLease, text: str, error: BaseException | None = None) -> None:
        super().log_parked(lease, text, error)
        self._note(lease, text)

    def _note(self, lease: TaskLease, error: str) -> None:
        if tries := self._rows.tasks[lease.id].tries:
            tries[-1].error = error
