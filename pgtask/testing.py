"""Tools for your tests: run tasks and workflows in memory, without Postgres, and assert what was enqueued.

Invariant: the worker's own code runs the steps, so policy, retries, timeouts, outcomes and the JSON between two steps
are the same as in a worker. Only the table is in memory, and its clock never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any
from uuid import UUID, uuid4

from pgtask._fastpath import Leases, Outcomes
from pgtask._memory.client import MemoryClient
from pgtask._memory.dispatch import Fault, Matches, MemoryDispatch
from pgtask._memory.journal import MemoryJournal
from pgtask._memory.limits import MemoryLimits
from pgtask._memory.records import Triggered
from pgtask._memory.rows import MemoryTask, Try
from pgtask._memory.schedules import MemorySchedules
from pgtask._memory.steps import MemoryStepRunner
from pgtask._memory.store import Enqueued
from pgtask._memory.transactions import MemoryTransactions
from pgtask._postgres.runs import CheckpointRow
from pgtask._progress import Progress
from pgtask._step_tools import StepTools
from pgtask._worker.lifespan import opened_resources
from pgtask._worker.step_client import StepClient
from pgtask._workflow.executor import RunExecutor
from pgtask._wrong_with import AsyncWithOnly
from pgtask.app import App
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import DatabaseRefused, DefinitionError
from pgtask.task import Task
from pgtask.task_function import TaskFunction, step_of

__all__ = [
    "CheckpointRow",
    "Enqueued",
    "MemoryClient",
    "MemoryTask",
    "MemoryWorker",
    "Progress",
    "Triggered",
    "Try",
    "run_task",
]

AnyStep = type[Task] | TaskFunction[..., Any] | str
"""A step of a task, or the name of one in a workflow."""

FROM_LIFESPAN: Any = object()
Item = Task | Callable[[Any], bool]


class MemoryWorker(AsyncWithOnly):
    """A worker without a database.

        async with MemoryWorker(app) as worker:
            worker.fail(ReadName, OSError("no such disk"), times=2)
            id = await worker.client.enqueue(ReadName("name.txt"))
            await worker.run()
            assert worker.task(id).state == "done"

    - Delays, retries and scheduled times pass at once: when nothing is due, the clock jumps to what is due next.
    - Awaiting takes its real time in a step, also `asyncio.sleep` and the timeout of a policy; to see a timeout at
      once, use `time_out`.
    - Tasks run one after the other in the order in which a worker claims them; `concurrency` lets more run at once.
    - Steps with `run_batch` run in the batches that a worker would make of them. A `linger` passes at once.
    - `resources` becomes `ctx.resources`, in place of the value that the app's lifespan yields; `db` becomes `ctx.db`,
      which otherwise raises `DatabaseRefused` when you use it.
    - A step that the app does not know is parked, as with `--unknown park`.
    - Schedules begin when the worker is entered, and start their tasks as the clock passes their times.
    - Use the client for runs of workflows: `run = await worker.client.trigger(...)`. Sleeps and timeouts of signals
      pass at once. With `replays`, each run is put back after each entry that it records and replayed from the top,
      which finds a workflow that does not do the same each time.

    Raises `LifespanError` when it is entered, as a worker does.
    """

    _with_error = DefinitionError

    def __init__(
        self,
        app: App,
        *,
        resources: Any = FROM_LIFESPAN,
        db: Any = None,
        client: MemoryClient | None = None,
        concurrency: int = 1,
        max_steps: int = 10_000,
        replays: bool = False,
    ) -> None:
        self.client = MemoryClient() if client is None else client
        """The client whose tasks the worker takes, and `ctx.client` of its steps. Give it to the code under test."""
        self._app = app
        self._resources = resources
        self._db = _NoDatabase() if db is None else db
        self._concurrency = concurrency
        self._max_steps = max_steps
        self._max_batch = max((step.batch.size for step in app if step.batch is not None), default=1)
        self._replays = replays
        self._leases = Leases()
        self._work = asyncio.Event()
        self._failure: BaseException | None = None

    async def __aenter__(self) -> MemoryWorker:
        self._dispatch = MemoryDispatch(
            self._app,
            self.client.rows,
            self._leases,
            concurrency=self._concurrency,
            max_step_bytes=DEFAULT_MAX_STEP_BYTES,
            wake=self._work.set,
            broke=self._fail,
        )
        if self._app.workflows:
            journal = MemoryJournal(self.client.records, self._leases, self._dispatch.crashed)
            runner = MemoryStepRunner(self._dispatch, journal, max_bytes=DEFAULT_MAX_STEP_BYTES, replays=self._replays)
            RunExecutor(self._app, self._leases, self._dispatch, journal=journal, runner=runner)
        self._limits: MemoryLimits | None = None
        if self._app.limits:
            self._limits = MemoryLimits(self.client.rows, self._dispatch.table, self._app.limits)
        self.client.rows.limits = self._limits
        self._dispatch.tap(self._app)
        self._schedules = MemorySchedules(self.client, self._app.schedules.values())
        self._stack = AsyncExitStack()
        self._stack.callback(self._dispatch.close)
        self._dispatch.db = self._db
        self._dispatch.tools = StepTools(
            client=StepClient(lambda: self.client).get,
            transactions=MemoryTransactions(self._dispatch),
            progress=self._dispatch.note_progress,
            charge=self._dispatch.charge_limit,
        )
        if self._resources is FROM_LIFESPAN:
            self._dispatch.resources = await self._stack.enter_async_context(opened_resources(self._app))
        else:
            self._dispatch.resources = self._resources
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)
        if error is None:
            self._check_faults()

    def _check_faults(self) -> None:
        """Raise `AssertionError` for a fault that met no try: the test has not tested it."""
        tried = self._dispatch.tried
        unmet = [_name(step) for step, faults in self._dispatch.faults.items() if faults and step not in tried]
        if unmet:
            ran = ", ".join(sorted(map(_name, tried))) or "none"
            raise AssertionError(
                f"a fault was put into {', '.join(unmet)}, which was never tried; steps that ran: {ran}"
            )

    @property
    def now(self) -> datetime:
        """The time by the clock in memory."""
        return self.client.rows.now

    def task(self, id: UUID) -> MemoryTask:
        """Return a task in its present state, also when it is done. Raises `KeyError`."""
        return self.client.rows.tasks[id]

    @property
    def tasks(self) -> list[MemoryTask]:
        """All tasks, in the order in which they were enqueued."""
        return list(self.client.rows.tasks.values())

    def progress(self, id: UUID) -> Progress | None:
        """Return the last progress that a step of the task has reported, with its `done` and `total`; None if none has.
        Raises `KeyError`."""
        reports = [one.progress for one in self.task(id).tries if one.progress is not None]
        return reports[-1] if reports else None

    def recorded(self, run: UUID) -> list[CheckpointRow]:
        """Return the checkpoints of a run in their order: each has its `kind`, `name`, and `result` as JSON. Raises
        `KeyError`."""
        return self.client.records.runs[run].rows

    # --- faults

    def fail(
        self,
        step: AnyStep,
        error: BaseException | type[BaseException],
        *,
        times: int = 1,
        item: Item | None = None,
    ) -> None:
        """Let the next `times` tries of `step` raise `error` instead of running. Faults of a step come in the order of
        your calls, one for each try. Name a step of a workflow by its name in `ctx.step`.

        `item`, a step or a function of a step, chooses the tasks whose tries fail. In a batch an error is that of one
        step, the first one without `item`: each call with this step raises, until it is alone, as in a worker."""
        self._put_fault(step, error, times, item)

    def time_out(self, step: AnyStep, *, times: int = 1, item: Item | None = None) -> None:
        """Let the next `times` tries of `step` time out at their first await. Raises `DefinitionError` if its policy
        has no timeout; for a step of a workflow, which shows its policy when it is called, `run` raises that."""
        step = step_of(step)
        if isinstance(step, type) and self._dispatch.table.entry(step).policy.timeout is None:
            raise DefinitionError(f"step {step.__name__} cannot time out: its policy has no timeout")
        self._put_fault(step, "timeout", times, item)

    def crash(self, step: AnyStep, *, times: int = 1, item: Item | None = None) -> None:
        """Let the worker die after the next `times` tries of `step`, before their outcome is written: their effects
        stay, and they run again with the same count of tries. The effects of a step must allow that."""
        self._put_fault(step, "crash", times, item)

    def _put_fault(self, wanted: AnyStep, fault: Fault, times: int, item: Item | None) -> None:
        step = step_of(wanted)
        if isinstance(step, str):
            if not self._app.workflows:
                raise DefinitionError(f"{step!r} would be a step of a workflow, and this app has none")
        elif step not in self._app.steps:
            raise DefinitionError(f"{getattr(step, '__name__', step)} is not a step of this app")
        if isinstance(item, Task):
            matches: Matches | None = item.__eq__
        else:
            matches = item
        self._dispatch.faults[step].extend([(fault, matches)] * times)

    # --- running

    async def run(self, within: timedelta | None = None) -> None:
        """Run until every task is done or parked, and every run of a workflow has ended or waits for a signal without a
        timeout; with `within`, only tasks that fall due in that time, and then the clock stands at its end.

        Schedules start their tasks as the clock passes their times: without `within`, only while something else is due.

        Raises `AssertionError` after `max_steps` steps: a task that looks again and again never ends.
        """
        rows = self.client.rows
        end = None if within is None else rows.now + within
        limit = self._dispatch.steps + self._max_steps
        groups = self.client._memory.groups
        groups.end_over()
        while (due := self._next_due(end)) is not None and (end is None or due <= end):
            rows.now = max(rows.now, due)
            self._schedules.start_due()
            await self._run_due(limit)
            groups.end_over()
        rows.now = max(rows.now, end or rows.now)

    def _next_due(self, end: datetime | None) -> datetime | None:
        """Return the time of what happens next: a task is due, or a schedule while the clock goes on anyway."""
        due, scheduled = self.client.rows.next_due(), self._schedules.next_due()
        if scheduled is None or (due is None and end is None):
            return due
        return scheduled if due is None else min(due, scheduled)

    async def _run_due(self, limit: int) -> None:
        claimed = self.client.rows.claim(max(self._concurrency, self._max_batch))
        leases, _ = self._leases.add_claimed(claimed, uuid4(), time.monotonic())
        self._leases.take_suspects()
        if self._limits is not None:
            self._limits.mark(leases)
        try:
            self._dispatch.admit(leases)
            while len(self._leases):
                await self._work.wait()
                self._work.clear()
                if self._failure is not None:
                    raise self._failure
                self._dispatch.start_next_steps(self._write(self._dispatch.take_outcomes()))
                if not (self._dispatch.suspended or self._dispatch.waiting or len(self._dispatch.outcomes)):
                    self._dispatch.batches.close_all()  # nothing else comes
                if self._dispatch.steps > limit:
                    raise AssertionError(
                        f"after {self._max_steps:,} steps there is still something to do: "
                        "run(within=...) a time, or allow for more by max_steps="
                    )
        finally:
            self._release_rest()

    def _write(self, outcomes: Outcomes) -> Any:
        """Write outcomes into the table in memory; return the leases that go on here."""
        crashed, outcomes = outcomes.divide(self._dispatch.crashed)
        ids = [lease.id for lease in crashed.leases()]
        self._dispatch.crashed.difference_update(ids)
        self.client.rows.release(ids)
        held = [(lease, tasks) for lease, tasks in outcomes.new_tasks.items() if self.client.rows.is_leased(lease.id)]
        self.client.rows.write(outcomes)
        if self._limits is not None:
            self._limits.write(self._dispatch.take_limit_notes())
        for lease, tasks in held:
            self.client._memory.add_new_tasks(tasks, self.task(lease.id).group)
        continuing = [lease for lease, _ in outcomes.continued if not self._cancel_member(lease.id)]
        going_on = set(continuing)
        self._leases.remove_all(crashed.leases() + [lease for lease in outcomes.leases() if lease not in going_on])
        return continuing

    def _cancel_member(self, id: UUID) -> bool:
        """Remove a task that would go on if its group is being cancelled. Return whether it is."""
        task = self.task(id)
        if not self.client._memory.groups.is_cancelled(task):
            return False
        task.state = "cancelled"
        return True

    def _release_rest(self) -> None:
        """Release the leases that an error or a cancellation has left."""
        for lease in self._leases.list_open():
            self._dispatch.drop_lost(lease)
            self.client.rows.release([lease.id])

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._work.set()


def _name(step: type[Task] | str) -> str:
    return step if isinstance(step, str) else step.__name__


def run_task(app: App, step: Task, *, resources: Any = FROM_LIFESPAN, db: Any = None) -> MemoryTask:
    """Run one task from `step` until it is done or parked, in memory and on an event loop of its own.

        assert run_task(app, ReadName("name.txt")).state == "done"

    Raises `RuntimeError` if a loop is running: await a `MemoryWorker` there.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError("run_task() has a loop of its own; in an async test use: async with MemoryWorker(app)")

    async def main() -> MemoryTask:
        async with MemoryWorker(app, resources=resources, db=db) as worker:
            id = await worker.client.enqueue(step)
            await worker.run()
            return worker.task(id)

    return asyncio.run(main())


class _NoDatabase:
    def __getattr__(self, name: str) -> Any:
        raise DatabaseRefused(
            f"ctx.db.{name}: there is no database in memory; pass MemoryWorker(db=...), "
            "or test with a worker on the fixture pgtask_database"
        )
