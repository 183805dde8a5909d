"""In a transaction of a caller, a client reads tables by their indexes, and the caller's settings stay as they were."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from client_kit import play
from grown import TABLES, be_small, grow
from post import Write
from sessions import connected

from pgtask import Client, WorkflowContext, workflow
from pgtask._postgres.connection import PLAN_SETTINGS
from pgtask.errors import DataRefused, RunNotFound

READ = """
    SELECT sum(seq_tup_read)::integer, sum(coalesce(idx_tup_fetch, 0))::integer
    FROM pg_stat_xact_user_tables
    WHERE relname = ANY ($1)"""
HOLDER = """INSERT INTO pg_task (step, key) VALUES ('{"Post":{"Write":{"text":"x"}}}', $1)"""
MANY = 1500  # rows: of a run and its descendants


@workflow("flow")
async def flow(ctx: WorkflowContext) -> None:
    """The runs of `grow` are its runs."""


Use = Callable[[Client, UUID, Any], Awaitable[Any]]
USES: dict[str, Use] = {
    "enqueue": lambda client, run, conn: client.enqueue(Write("x"), key=f"key {run.int}", conn=conn),
    "enqueue_many": lambda client, run, conn: client.enqueue_many(
        [Write("x")], key=lambda _: f"key {run.int}", conn=conn
    ),
    "trigger": lambda client, run, conn: client.trigger(flow, key=f"key {run.int}", conn=conn),
    "signal": lambda client, run, conn: client.signal(run, "go", conn=conn),
    "cancel": lambda client, run, conn: client.run(run).cancel(conn=conn),
    "cancel of a task": lambda client, run, conn: client.task(run).cancel(conn=conn),
    "retry": lambda client, run, conn: client.task(run).retry(conn=conn),
    "reschedule": lambda client, run, conn: client.task(run).reschedule(after=timedelta(1), conn=conn),
    "move": lambda client, run, conn: client.task(run).move(priority=1, conn=conn),
    "resume": lambda client, run, conn: client.run(run).resume(conn=conn),
}


async def rows_read(conn: Any, use: Awaitable[Any]) -> tuple[int, int]:
    """Return how many rows it reads in a row, and by an index."""
    before = await conn.fetchrow(READ, TABLES)
    await use
    after = await conn.fetchrow(READ, TABLES)
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.parametrize("name", USES)
def test_client_in_a_callers_transaction_scans_no_table(dsn: str, name: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn, server_settings={"plan_cache_mode": "force_generic_plan"}) as conn:
            await be_small(db, 1)
            rolled_back = conn.transaction()
            await rolled_back.start()
            await USES[name](client, UUID(int=1), conn)
            await rolled_back.rollback()
            _, (run, *_) = await grow(db, 3000)
            await db.execute(HOLDER, f"Post/key {run.int}")
            async with conn.transaction():
                scanned, by_index = await rows_read(conn, USES[name](client, run, conn))
            assert scanned == 0
            assert 0 < by_index < MANY

    play(dsn, scenario)


async def settings_of(conn: Any) -> list[str]:
    return [await conn.fetchval("SELECT current_setting($1)", name) for name in PLAN_SETTINGS]


FAILURES: dict[str, tuple[type[Exception], Use]] = {
    "no such run": (RunNotFound, lambda client, run, conn: client.signal(uuid4(), "go", conn=conn)),
    "a refusal of the server": (
        DataRefused,
        lambda client, run, conn: client.signal(run, "refused", conn=conn),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_settings_of_a_caller_stay_after_a_call(dsn: str, name: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        _, (run, *_) = await grow(db, 100)
        async with connected(dsn) as conn, conn.transaction():
            await conn.execute("SET LOCAL enable_sort = off; SET enable_hashjoin = off")
            before = await settings_of(conn)
            await USES[name](client, run, conn)
            assert await settings_of(conn) == before

    play(dsn, scenario)


@pytest.mark.parametrize("name", FAILURES)
def test_settings_of_a_caller_stay_after_a_failure(dsn: str, name: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await db.execute("ALTER TABLE pg_task_signals ADD CHECK (name <> 'refused')")
        _, (run, *_) = await grow(db, 100)
        error, use = FAILURES[name]
        async with connected(dsn) as conn, conn.transaction():
            await conn.execute("SET LOCAL enable_sort = off; SET enable_hashjoin = off")
            before = await settings_of(conn)
            savepoint = conn.transaction()
            await savepoint.start()
            with pytest.raises(error):
                await use(client, run, conn)
            if error is DataRefused:  # the server has ended the transaction up to the savepoint
                await savepoint.rollback()
            assert await settings_of(conn) == before

    play(dsn, scenario)
