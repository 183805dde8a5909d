"""A worker without its pump: tasks whose steps run functions of the test, on a real table, with transactions.

async with transact_stage(dsn) as stage:
    stage.acts["a"] = function  # (ctx) -> outcome
    task = await stage.run("a")
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sessions import connected
from writers import Flushing, running

from pgtask import App, Context, Done, Fail, Next, Policy, Task
from pgtask._fastpath import Outcomes, Table, TaskLease
from pgtask._postgres.pools import user_pool
from pgtask._postgres.store import Link, statement
from pgtask._step_tools import StepTools
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.transactions import Transactions

__all__ = ["Act", "Later", "TransactStage", "transact_stage"]

LEASE = 60.0
EFFECTS = "CREATE TABLE effect (task uuid NOT NULL, what text NOT NULL DEFAULT '')"

Function = Callable[[Context], Awaitable[Any]]
_acts: dict[str, Function] = {}


class Play(Task):
    """Steps that run functions of the test."""

    policy = Policy(retry_limit=5, retry_delay=timedelta(seconds=60))


class Act(Play):
    name: str

    async def run(self, ctx: Context) -> Next[Act] | Next[Later] | Done | Fail:
        return await _acts[self.name](ctx)  # type: ignore[no-any-return]


class Later(Act):
    """The same in another queue."""

    policy = Policy(queue="later")


class Kept(Act):
    """The same, and archived."""

    archive = True


class Timed(Act):
    """The same with a short timeout."""

    policy = Policy(timeout=timedelta(milliseconds=50), retry_limit=5, retry_delay=timedelta(seconds=60))


class Threaded(Play):
    name: str

    def run(self, ctx: Context) -> Done:
        with_ctx: Any = _acts[self.name]
        return with_ctx(ctx)  # type: ignore[no-any-return]


APP = App(Play)


class _Dispatch(Dispatch):
    logged: list[str]

    def log_failed(self, lease: TaskLease, error: BaseException, delay: float | None, tried: int, **more: Any) -> None:
        self.logged.append(str(error))


class TransactStage(Flushing):
    """Made by `transact_stage`. `dsn` is that of the steps, `direct` that of everything else."""

    def __init__(self, dsn: str, direct: str, db: Any) -> None:
        super().__init__(direct)
        self.db = db
        self.acts = _acts
        self.acts.clear()
        self.table = Table(APP)
        self.broken: list[BaseException] = []
        self._woken = asyncio.Event()
        self.dispatch = _Dispatch(
            self.table,
            self.leases,
            concurrency=50,
            max_step_bytes=10_000,
            wake=self._woken.set,
            unknown=lambda name: None,
            broke=self.broken.append,
        )
        self.logged: list[str] = []
        """The errors of failed tries."""
        self.dispatch.logged = self.logged
        self.written: list[Outcomes] = []
        self.look = Link(direct, "look")
        self.transactions = Transactions(
            self.dispatch, self.flush, self.look, lease_timeout=LEASE, written=self.written.append
        )
        self.dispatch.tools = StepTools(transactions=self.transactions)

    async def put(self, *steps: Task | str) -> list[TaskLease]:
        """Insert tasks, and claim them under one token."""
        rows = []
        for step in steps:
            task = Act(step) if isinstance(step, str) else step
            text = self.table.entry(type(task)).codec.encode(task)
            query = "INSERT INTO pg_task (step, wakeup_at) VALUES ($1, now() - interval '1 s') RETURNING id"
            rows.append(await self.db.fetchval(query, text))
        return await self.claim()

    async def claim(self) -> list[TaskLease]:
        token = uuid4()
        found = await self.db.fetch(statement("claim"), "default", 0, 100, token, LEASE, 10_000, 0.0)
        leases, _ = self.leases.add_claimed(found, token, 0.0)
        return leases

    async def run(self, *steps: Task | str) -> UUID:
        """Run tasks as long as they go on here, and flush. Return the id of the first."""
        leases = await self.put(*steps)
        self.dispatch.admit(leases)
        await self.end()
        return leases[0].id

    async def end(self) -> None:
        """Wait until all that runs has ended, and flush."""
        while True:
            self._woken.clear()
            if self.broken:
                raise self.broken[0]
            going_on = await self.write(self.dispatch.take_outcomes())
            self.dispatch.start_next_steps(going_on)
            is_idle = not (self.dispatch.suspended or self.dispatch.waiting or len(self.dispatch.outcomes))
            if is_idle and not self.flush.returned:
                return
            if not len(self.dispatch.outcomes) and not self.flush.returned:
                await self._woken.wait()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110  a timer of the loop changes it
                await asyncio.sleep(0.001)

    async def until_outcome(self) -> None:
        """Wait until an outcome is in the buffer."""
        await self.until(lambda: len(self.dispatch.outcomes))

    async def row(self, id: UUID) -> Any:
        return await self.db.fetchrow("SELECT *, wakeup_at - updated_at AS delay FROM pg_task WHERE id = $1", id)

    async def effects(self) -> list[str]:
        return [row[0] for row in await self.db.fetch("SELECT what FROM effect ORDER BY what")]


@asynccontextmanager
async def transact_stage(dsn: str, through: str | None = None, *, pooled: bool = False) -> AsyncIterator[TransactStage]:
    async with connected(dsn) as db:
        await db.execute(EFFECTS.replace("TABLE", "TABLE IF NOT EXISTS"))
        stage = TransactStage(through or dsn, dsn, db)
        async with running(stage), user_pool(through or dsn, size=10, pooled=pooled) as pool:
            stage.dispatch.db = pool
            try:
                yield stage
            finally:
                stage.dispatch.close()
                await stage.transactions.close()
