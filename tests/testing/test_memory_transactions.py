"""`ctx.transaction()` in a `MemoryWorker`: tasks are in memory, and what they write is in a database of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from fix_database import run
from transacting import SINK, write

from pgtask import App, Context, Done, Next, Policy, Task
from pgtask.testing import MemoryWorker, run_task

pytestmark = pytest.mark.one_database("DROP TABLE IF EXISTS sink")


class Sums(Task):
    policy = Policy(retry_limit=3)


class Begin(Sums):
    fault: str = ""

    async def run(self, ctx: Context) -> Next[End]:
        await write(ctx, ctx.attempt, "Begin")
        return Next(End(self.fault))


class End(Sums):
    fault: str = ""

    async def run(self, ctx: Context) -> Done:
        await write(ctx, ctx.attempt, "End")
        if self.fault == "error" and ctx.attempt == 1:
            raise ValueError("no")
        if self.fault == "wrong outcome" and ctx.attempt == 1:
            return None  # type: ignore[return-value]
        return Done()


app = App(Sums)


@asynccontextmanager
async def working(dsn: str) -> AsyncIterator[tuple[MemoryWorker, Any]]:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=5) as pool:
        await pool.execute(SINK)
        async with MemoryWorker(app, db=pool) as worker:
            yield worker, pool


@pytest.mark.parametrize(("fault", "last"), [("", 1), ("crash", 1), ("error", 2), ("wrong outcome", 2)])
def test_only_the_try_with_the_outcome_writes(dsn: str, fault: str, last: int) -> None:
    async def main() -> None:
        async with working(dsn) as (worker, pool):
            if fault == "crash":
                worker.crash(End)
            task = await worker.client.enqueue(Begin(fault))
            await worker.run()
            assert worker.task(task).state == "done"
            assert len(worker.task(task).tries) == (3 if fault else 2)
            assert [tuple(row) for row in await pool.fetch("SELECT step, number FROM sink ORDER BY step")] == [
                ("Begin", 1),
                ("End", last),
            ]
            assert pool.get_idle_size() == pool.get_size()  # no connection was kept

    run(main())


def test_transaction_without_a_database_says_so() -> None:
    task = run_task(app, Begin())
    assert task.state == "parked"
    assert "pass MemoryWorker(db=...)" in (task.error or "")
