"""Enqueueing in the caller's transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from client_kit import count, in_order, numbered, play
from post import Numbered, Write, doubled
from sessions import connected

from pgtask import Client
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, EnqueueError
from pgtask.testing import MemoryClient

HOUR = timedelta(hours=1)
pytestmark = pytest.mark.one_database


async def by_every_way(client: Client, conn: Any) -> list[UUID]:
    return [
        await client.enqueue(Write("x"), conn=conn),
        await client.enqueue(Write("x"), key="one", conn=conn),
        await client.delay(Write("x"), HOUR, conn=conn),
        await client.schedule(Write("x"), datetime.now(UTC), conn=conn),
        *await client.enqueue_many(numbered(3), conn=conn),
        *await client.enqueue_many(numbered(3), key=lambda step: str(step.n), conn=conn),
    ]


async def by_the_driver(conn: Any) -> None:
    await conn.transaction().start()


async def by_hand(conn: Any) -> None:
    await conn.execute("BEGIN")


async def by_hand_with_a_savepoint(conn: Any) -> None:
    await conn.execute("BEGIN; SAVEPOINT pgtask")


BEGINNINGS = [by_the_driver, by_hand, by_hand_with_a_savepoint]


@pytest.mark.parametrize("begin", BEGINNINGS)
def test_with_conn_the_task_commits_with_the_callers_data(dsn: str, begin: Callable[[Any], Awaitable[None]]) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine:
            await begin(mine)
            ids = await by_every_way(client, mine)
            assert await count(db) == 0
            await mine.execute("COMMIT")
            assert len(await in_order(db, ids)) == len(ids) == await count(db) == 10

    play(dsn, scenario)


@pytest.mark.parametrize("begin", BEGINNINGS)
def test_with_conn_a_rollback_leaves_nothing(dsn: str, begin: Callable[[Any], Awaitable[None]]) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine:
            await begin(mine)
            await by_every_way(client, mine)
            await mine.execute("ROLLBACK")
            assert await count(db) == 0
            first = await client.enqueue(Write("x"), key="one")
            assert [row["id"] for row in await db.fetch("SELECT id FROM pg_task")] == [first]

    play(dsn, scenario)


WITH_CONN: dict[str, Callable[[Client, Any], Awaitable[Any]]] = {
    "enqueue": lambda client, conn: client.enqueue(Write("x"), conn=conn),
    "with a key": lambda client, conn: client.enqueue(Write("x"), key="k", conn=conn),
    "delay": lambda client, conn: client.delay(Write("x"), HOUR, conn=conn),
    "schedule": lambda client, conn: client.schedule(Write("x"), datetime.now(UTC), conn=conn),
    "enqueue_many": lambda client, conn: client.enqueue_many(only_read(conn), conn=conn),
    "enqueue_many with keys": lambda client, conn: client.enqueue_many(only_read(conn), key=str, conn=conn),
    "trigger": lambda client, conn: client.trigger(doubled, 1, conn=conn),
    "trigger_many": lambda client, conn: client.trigger_many(doubled, [1, 2], conn=conn),
    "signal": lambda client, conn: client.signal(UUID(int=1), "go", conn=conn),
    "signal of a run": lambda client, conn: client.run(UUID(int=1)).signal("go", conn=conn),
    "cancel": lambda client, conn: client.run(UUID(int=1)).cancel(conn=conn),
    "resume": lambda client, conn: client.run(UUID(int=1)).resume(conn=conn),
}


def only_read(conn: Any) -> Iterator[Numbered]:
    """A step, which must not be asked for outside of a transaction."""
    assert conn.is_in_transaction()
    yield Numbered(1)


@pytest.mark.parametrize("call", WITH_CONN.values(), ids=WITH_CONN)
def test_with_conn_and_no_transaction_it_is_refused(dsn: str, call: Callable[[Client, Any], Awaitable[Any]]) -> None:
    """It would be committed by itself, also if the caller's data is rolled back."""

    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine, asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
            wrong = [(mine, r"not in a transaction, .*pass the session itself"), (pool, "conn= is a pool; acquire")]
            async with pool.acquire() as proxy:
                await proxy.execute("BEGIN; COMMIT")
                wrong.append((proxy, "not in a transaction"))
                for conn, message in wrong:
                    sent: list[Any] = []
                    with mine.query_logger(sent.append), pytest.raises(EnqueueError, match=message):
                        await call(client, conn)
                    assert sent == []
            for client_ in (client, MemoryClient()):
                with pytest.raises(EnqueueError, match="not in a transaction"):
                    await call(client_, mine)
        with pytest.raises(DatabaseUnavailable, match="closed"):
            await call(client, mine)
        assert await count(db) == 0

    play(dsn, scenario)


@pytest.mark.parametrize("call", WITH_CONN.values(), ids=WITH_CONN)
def test_a_transaction_that_has_failed_refuses(dsn: str, call: Callable[[Client, Any], Awaitable[Any]]) -> None:
    async def scenario(client: Client, db: Any) -> None:
        for begin in BEGINNINGS:
            async with connected(dsn) as mine:
                await begin(mine)
                with pytest.raises(asyncpg.DivisionByZeroError):
                    await mine.execute("SELECT 1 / 0")
                with pytest.raises(DatabaseRefused, match="current transaction is aborted"):
                    await call(client, mine)
                await mine.execute("ROLLBACK")
        assert await count(db) == 0

    play(dsn, scenario)


def test_conn_may_come_from_the_callers_pool(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool, pool.acquire() as mine, mine.transaction():
            await by_every_way(client, mine)
        assert await count(db) == 10

    play(dsn, scenario)


@pytest.mark.parametrize("key", [None, lambda step: str(step.n)], ids=["copy", "keyed"])
def test_a_refused_step_does_not_spoil_the_callers_transaction(dsn: str, key: Any) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with db.transaction():
            await client.enqueue(Write("before"), conn=db)
            with pytest.raises(EnqueueError):
                await client.enqueue_many([*numbered(10), Numbered("x")], key=key, conn=db)  # type: ignore[arg-type]
            await client.enqueue(Write("after"), conn=db)
        texts = [row[0] for row in await db.fetch("SELECT step FROM pg_task ORDER BY id")]
        assert texts == ['{"Post":{"Write":{"text":"before"}}}', '{"Post":{"Write":{"text":"after"}}}']

    play(dsn, scenario)
