"""A dispatcher on a stage: with a lease table, without a database, and with steps that run functions of the test."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import reference
from jumping_loop import Clock, run_on
from step_programs import MAX_STEP_BYTES, PLAY, turns

from pgtask import App, Context, Done, Fail, Next, Policy, Task
from pgtask._fastpath import Leases, Outcomes, Table, TaskLease
from pgtask._worker.dispatch import Dispatch

__all__ = [
    "SCRIPT",
    "Act",
    "Moved",
    "Scripts",
    "Stage",
    "Threaded",
    "ThreadedTimed",
    "Timed",
    "outcomes_of",
    "rows_of",
    "scripted",
    "stage",
    "suspended",
]


def rows_of(outcomes: Outcomes) -> Iterator[reference.BufferedOutcome]:
    def new(lease: TaskLease) -> tuple[reference.NewTask, ...]:
        return tuple(reference.NewTask(*task[2:-1]) for task in outcomes.new_tasks.get(lease, ()))

    for lease in outcomes.done:
        yield reference.BufferedOutcome("done", lease.id, new=new(lease))
    for lease, step in outcomes.continued:
        yield reference.BufferedOutcome("continued", lease.id, step=step, new=new(lease))
    for row in outcomes.rescheduled:
        values = row.step, row.tried, row.error, row.delay, row.queue, row.priority, row.claims, new(row.lease)
        yield reference.BufferedOutcome("rescheduled", row.lease.id, None, *values)


class Stage(Dispatch):
    """The dispatcher under test, with a lease table of its own, and a `woken` to wait for as the pump does."""

    def __init__(
        self,
        app: App = PLAY,
        *,
        concurrency: int = 4,
        unknown: Callable[[str], float | None] = lambda name: 30.0,
        resources: Any = None,
    ) -> None:
        self.woken = asyncio.Event()
        self.broken: list[BaseException] = []
        self.held = Leases()
        super().__init__(
            Table(app),
            self.held,
            concurrency=concurrency,
            max_step_bytes=MAX_STEP_BYTES,
            wake=self.woken.set,
            unknown=unknown,
            broke=self._broke_down,
        )
        self.resources = resources
        self.app = app

    def _broke_down(self, error: BaseException) -> None:
        self.broken.append(error)
        self.woken.set()

    def claim(
        self, *steps: Task | str, tried: int = 0, claims: int = 1, size: int | None = None, id: UUID | None = None
    ) -> list[TaskLease]:
        """Return leases for these steps, as if just claimed."""
        rows = []
        for step in steps:
            text = step if isinstance(step, str) else reference.encode(self.app.steps[type(step)], step)
            rows.append((id or uuid4(), text, tried, claims, size))
        return self.held.add_claimed(rows, uuid4(), 0.0)[0]

    async def next_outcomes(self) -> Outcomes:
        """Wait as the pump does, and take the outcomes."""
        while not len(self.outcomes):
            assert not self.broken, self.broken
            self.woken.clear()
            await self.woken.wait()
        return self.take_outcomes()

    async def all_outcomes(self, leases: list[TaskLease]) -> list[reference.BufferedOutcome]:
        """Return the outcomes of these leases until none is open. Continued tasks go on."""
        entries: list[reference.BufferedOutcome] = []
        while any(lease.is_open for lease in leases):
            outcomes = await self.next_outcomes()
            entries += rows_of(outcomes)
            self.start_next_steps([lease for lease, _ in outcomes.continued])
        return entries + list(rows_of(self.take_outcomes()))


@contextmanager
def stage(*arguments: Any, **options: Any) -> Iterator[Stage]:
    made = Stage(*arguments, **options)
    try:
        yield made
    finally:
        made.close()


class Script(Task):
    """Steps that run a function of the test, found by name in `ctx.resources`."""


class Act(Script):
    name: str

    async def run(self, ctx: Context) -> Next[Act | Timed | Moved] | Done | Fail:
        return await ctx.resources[self.name](ctx)


class Timed(Script):
    policy = Policy(timeout=timedelta(milliseconds=5), retry_limit=1)
    name: str

    async def run(self, ctx: Context) -> Next[Act | Timed] | Done | Fail:
        return await ctx.resources[self.name](ctx)


class Moved(Script):
    policy = Policy(queue="other", priority=5)
    name: str

    async def run(self, ctx: Context) -> Next[Act] | Done:
        return await ctx.resources[self.name](ctx)


class Threaded(Script):
    name: str

    def run(self, ctx: Context) -> Next[Act] | Done | Fail:
        return ctx.resources[self.name](ctx)


class ThreadedTimed(Script):
    policy = Policy(timeout=timedelta(milliseconds=5))
    name: str

    def run(self, ctx: Context) -> Next[Act] | Done | Fail:
        return ctx.resources[self.name](ctx)


SCRIPT = App(Script)
Run = Callable[[Context], Awaitable[Any]]


class Scripts(dict[str, Any]):
    """The functions that steps run: those of the test, and the methods of this class."""

    def __init__(self, **runs: Any) -> None:
        super().__init__(done=self.done, waits=self.waits, **runs)
        self.gate = asyncio.Event()
        self.waiting = 0
        self.max_waiting = 0
        self.cancelled = 0

    async def done(self, ctx: Context) -> Done:
        return Done()

    async def waits(self, ctx: Context) -> Done:
        """Wait for the gate, and count the waiting steps."""
        self.waiting += 1
        self.max_waiting = max(self.waiting, self.max_waiting)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return Done()


@contextmanager
def scripted(*, concurrency: int = 4, **runs: Any) -> Iterator[tuple[Stage, Scripts]]:
    scripts = Scripts(**runs)
    with stage(SCRIPT, concurrency=concurrency, resources=scripts) as made:
        yield made, scripts


def outcomes_of(clock: Clock, *names: str, concurrency: int = 4, **runs: Run) -> list[reference.BufferedOutcome]:
    """Return the outcomes of these steps, each the name of one of `runs`."""

    async def main() -> list[reference.BufferedOutcome]:
        with scripted(concurrency=concurrency, **runs) as (dispatch, _):
            leases = dispatch.claim(*(Act(name) for name in names))
            dispatch.admit(leases)
            entries = await dispatch.all_outcomes(leases)
            by_id = {lease.id: number for number, lease in enumerate(leases)}
            return sorted(entries, key=lambda entry: by_id[entry.id])

    return run_on(clock, main())


async def suspended(ctx: Context) -> Done:
    """Suspend for some turns, in which a stray cancellation would show."""
    await turns(3)
    return Done()
