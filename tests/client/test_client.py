"""The client itself: opened, closed, cut off, and in the loop that it was opened in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
from client_kit import count, play
from fix_database import run, with_database
from post import Numbered, Write, doubled
from sessions import connected, opened, until, until_blocked

from pgtask import Client
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, EnqueueError, SchemaError

pytestmark = pytest.mark.one_database


def test_client_need_not_be_open_for_a_connection_of_yours(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.__aexit__(None, None, None)
        async with db.transaction():
            for closed in (client, Client(dsn)):
                await closed.enqueue(Write("x"), conn=db)
                await closed.enqueue_many([Write("x")], conn=db)
        assert await count(db) == 4
        await client.__aenter__()

    play(dsn, scenario)


def test_a_client_that_is_not_open_says_so(dsn: str) -> None:
    async def main() -> None:
        client = Client(dsn)
        for _ in range(2):
            for call in (client.enqueue(Write("x")), client.enqueue_many([Write("x")])):
                with pytest.raises(EnqueueError, match="the client is not open"):
                    await call
            async with client:
                await client.enqueue(Write("x"))

    run(main())


def test_a_client_is_used_in_the_loop_that_it_was_opened_in(dsn: str) -> None:
    opened_there = Client(dsn)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(opened_there.__aenter__())
    calls: list[Callable[[Client], Awaitable[Any]]] = [
        *CALLS.values(),
        lambda client: client.trigger(doubled, 1),
        lambda client: client.runs(),
        lambda client: client.run(UUID(int=1)).status(),
        lambda client: client.run(UUID(int=1)).result(5),
        lambda client: client.__aexit__(None, None, None),
    ]

    async def check() -> None:
        for call in calls:
            with pytest.raises(EnqueueError, match="opened in another event loop"):
                await call(opened_there)
        async with opened_there.consumer():  # has connections of its own
            pass

    second.run_until_complete(check())
    first.run_until_complete(opened_there.enqueue(Write("x")))
    first.run_until_complete(opened_there.__aexit__(None, None, None))
    for loop in (first, second):
        loop.close()


def test_a_client_is_open_once_and_closed_for_all(dsn: str) -> None:
    async def main() -> None:
        client = Client(dsn)
        closed: list[Callable[[], Any]] = [
            client.consumer,
            lambda: client.run(UUID(int=1)).result(5),
            lambda: client.run(UUID(int=1)).status(),
            lambda: client.__aexit__(None, None, None),
        ]
        for _ in range(2):
            for call in closed:
                with pytest.raises(EnqueueError, match="the client is not open"):
                    await call()
            async with client:
                with pytest.raises(EnqueueError, match="open already"):
                    await client.__aenter__()
                await client.enqueue(Write("x"))

    run(main())


async def end_backend(dsn: str, pid: int) -> None:
    async with connected(dsn) as db:
        await db.execute("SELECT pg_terminate_backend($1, 5000)", pid)


def test_connection_lost_at_the_end_keeps_the_answer(dsn: str) -> None:
    """What becomes of it afterwards tells the caller nothing."""

    async def scenario(client: Client, db: Any) -> None:
        async with client._postgres.connection() as connection:
            task = await connection.fetchval("INSERT INTO pg_task (step) VALUES ('{}') RETURNING id")
            end = Thread(target=asyncio.run, args=[end_backend(dsn, connection.get_server_pid())])
            end.start()
            end.join()  # this loop stands still: it does not hear of it before the release
        assert await db.fetchval("SELECT id FROM pg_task") == task
        await client.enqueue(Write("x"))

    play(dsn, scenario, pool_size=1)


def test_a_client_without_dsn_reads_the_environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Client() as client:
            task = await client.enqueue(Write("x"))
        async with opened(dsn) as (_, db):
            assert await db.fetchval("SELECT id FROM pg_task") == task

    monkeypatch.setenv("DATABASE_URL", dsn)
    run(main())


def test_a_database_that_is_not_there_is_found_when_opening(dsn: str) -> None:
    async def main() -> None:
        with pytest.raises(DatabaseRefused, match='database "nowhere" does not exist'):
            async with Client(with_database(dsn, "nowhere")):
                pass

    run(main())


def test_without_the_table_the_command_is_named(empty_dsn: str) -> None:
    async def main() -> None:
        with pytest.raises(SchemaError, match="has no pg_task table; run: pgtask migrate"):
            async with Client(empty_dsn):
                raise AssertionError

    run(main())


CALLS: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "enqueue": lambda client: client.enqueue(Write("x")),
    "with a key": lambda client: client.enqueue(Write("x"), key="k"),
    "enqueue_many": lambda client: client.enqueue_many([Write("x")]),
    "enqueue_many with keys": lambda client: client.enqueue_many([Write("x")], key=lambda _: "k"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_lost_connection_raises_and_the_next_call_has_another(
    dsn: str, call: Callable[[Client], Awaitable[Any]]
) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with db.transaction():
            await db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
            waiting = asyncio.ensure_future(call(client))
            who = "FROM pg_stat_activity WHERE application_name = 'pgtask client' AND datname = current_database()"
            await until(db, f"SELECT EXISTS (SELECT {who} AND wait_event_type = 'Lock')")
            await db.execute(f"SELECT pg_terminate_backend(pid) {who}")
            with pytest.raises(DatabaseUnavailable):
                await waiting
        await call(client)
        assert await count(db) == 1

    play(dsn, scenario, pool_size=1)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_pooled_connection_that_died_idle_is_replaced(dsn: str, call: Callable[[Client], Awaitable[Any]]) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Write("x"))
        who = "FROM pg_stat_activity WHERE application_name = 'pgtask client' AND datname = current_database()"
        await db.execute(f"SELECT pg_terminate_backend(pid, 5000) {who}")
        try:
            await call(client)
        except DatabaseUnavailable:  # had it not heard of it yet
            await call(client)
        assert await count(db) == 2

    play(dsn, scenario, pool_size=1)


def test_the_pool_does_not_grow_beyond_its_size(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await asyncio.gather(*(client.enqueue(Numbered(n)) for n in range(50)))
        who = "FROM pg_stat_activity WHERE application_name = 'pgtask client' AND datname = current_database()"
        assert await db.fetchval(f"SELECT count(*) {who}") <= 3
        assert await count(db) == 50

    play(dsn, scenario, pool_size=3)


def test_closing_waits_for_calls_under_way(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            client = await Client(dsn).__aenter__()
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
                under_way = asyncio.create_task(client.enqueue(Write("x")))
                await until(
                    db, "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND relation = 'pg_task'::regclass"
                )
                closing = asyncio.create_task(client.__aexit__(None, None, None))
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                task = await under_way
                await closing
            assert await db.fetchval("SELECT id FROM pg_task") == task

    run(main())


def test_a_busy_connection_is_not_called_closed(dsn: str) -> None:
    """Two tasks on one connection is a mistake in the caller's code, and waiting will not fix it."""

    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine:
            await mine.execute("BEGIN")
            await db.execute("SELECT pg_advisory_lock(1)")
            busy = asyncio.create_task(mine.execute("SELECT pg_advisory_lock(1)"))
            await until_blocked(db, mine.get_server_pid())
            with pytest.raises(Exception, match="another operation is in progress") as caught:
                await client.enqueue(Write("x"), conn=mine)
            await db.execute("SELECT pg_advisory_unlock(1)")
            await busy
            assert "closed" not in str(caught.value)
            assert not isinstance(caught.value, DatabaseUnavailable)

    play(dsn, scenario)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_that_is_cancelled_leaves_no_broken_connection(
    dsn: str, call: Callable[[Client], Awaitable[Any]]
) -> None:
    """At any point: while it waits for the table, and after any number of turns of the loop."""

    async def scenario(client: Client, db: Any) -> None:
        for turns in range(30):
            cancelled = asyncio.ensure_future(call(client))
            for _ in range(turns):
                await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait([cancelled])
        async with db.transaction():
            await db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
            cancelled = asyncio.ensure_future(call(client))
            who = "FROM pg_stat_activity WHERE application_name = 'pgtask client' AND datname = current_database()"
            await until(db, f"SELECT EXISTS (SELECT {who} AND wait_event_type = 'Lock')")
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert cancelled.cancelled()
        await db.execute("DELETE FROM pg_task")
        await call(client)
        assert await count(db) == 1

    play(dsn, scenario, pool_size=1)
