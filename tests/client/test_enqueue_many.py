"""Enqueueing many: in order, in little memory, and all or none."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Any

import asyncpg
import pytest
from client_kit import count, in_order, numbered, numbers_in, play, slowly
from post import Numbered
from sessions import connected

from pgtask import Client, Task
from pgtask._postgres.store import statement
from pgtask.errors import DataRefused

pytestmark = pytest.mark.one_database


@pytest.mark.parametrize("size", [1, 2, 999, 5000])
@pytest.mark.parametrize("make", [numbered, lambda n: slowly(numbered(n)), lambda n: list(numbered(n))])
def test_ids_match_the_rows_in_order(dsn: str, make: Callable[[int], Any], size: int) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids = await client.enqueue_many(make(size))
        assert len(ids) == size == await count(db)
        assert numbers_in(await in_order(db, list(ids))) == list(range(size))
        by_id = numbers_in(await db.fetch("SELECT step FROM pg_task ORDER BY id"))
        assert by_id == list(range(size))

    play(dsn, scenario)


@pytest.mark.parametrize("key", [None, str], ids=["copy", "keyed"])
def test_no_steps_are_no_rows(dsn: str, key: Any) -> None:
    async def nothing() -> AsyncIterator[Task]:
        for step in numbered(0):
            yield step

    async def scenario(client: Client, db: Any) -> None:
        empty: list[Any] = [[], iter(()), nothing()]
        for steps in empty:
            assert list(await client.enqueue_many(steps, key=key)) == []
        assert await count(db) == 0

    play(dsn, scenario)


def test_fifty_thousand_take_no_more_memory_than_a_few(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue_many(numbered(2000))
        peaks = []
        for size in (2000, 50_000):
            tracemalloc.start()
            ids = await client.enqueue_many(numbered(size))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert await count(db) == 54_000
        assert numbers_in(await in_order(db, [ids[0], ids[25_000], ids[-1]])) == [0, 25_000, 49_999]
        assert peaks[1] < 2_000_000, peaks

    play(dsn, scenario)


class Refusal(Exception):
    pass


def break_off(error: BaseException, after: int) -> Iterator[Numbered]:
    yield from islice(numbered(after), after)
    raise error


BREAKS = [
    Refusal("mine"),
    FileNotFoundError("list.txt"),
    TimeoutError("mine"),
    ConnectionResetError("mine"),
    asyncpg.InterfaceError("of another database"),
    asyncpg.UndefinedTableError("of another database"),
]


@pytest.mark.parametrize("key", [None, lambda step: str(step.n)], ids=["copy", "keyed"])
@pytest.mark.parametrize("error", BREAKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [0, 3000])
def test_exception_of_the_iterable_passes_and_leaves_no_rows(dsn: str, error: Exception, after: int, key: Any) -> None:
    """The iterable is the caller's: its file that is missing is no loss of our connection."""

    async def scenario(client: Client, db: Any) -> None:
        for make in (break_off, lambda *args: slowly(break_off(*args))):
            with pytest.raises(type(error)) as caught:
                await client.enqueue_many(make(error, after), key=key)
            assert caught.value is error
            assert await count(db) == 0
        assert len(await client.enqueue_many(numbered(5), key=key)) == 5

    play(dsn, scenario, pool_size=1)


@pytest.mark.parametrize("key", [None, lambda step: str(step.n)], ids=["copy", "keyed"])
def test_cancelled_in_the_middle_it_rolls_back(dsn: str, key: Any) -> None:
    async def scenario(client: Client, db: Any) -> None:
        reached, closed = asyncio.Event(), asyncio.Event()

        async def steps() -> AsyncIterator[Numbered]:
            try:
                for step in numbered(5000):
                    yield step
                reached.set()
                await asyncio.Event().wait()
            finally:
                closed.set()

        enqueueing = asyncio.create_task(client.enqueue_many(steps(), key=key))
        await reached.wait()
        enqueueing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await enqueueing
        await closed.wait()
        assert await count(db) == 0
        assert len(await client.enqueue_many(numbered(5), key=key)) == 5
        assert await count(db) == 5

    play(dsn, scenario, pool_size=1)


def test_many_are_one_hint(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        heard: list[str] = []
        ended = asyncio.Event()

        def hear(_db: Any, _pid: int, _channel: str, payload: str) -> None:
            if payload == "end":
                ended.set()
            heard.append(payload)

        await db.add_listener("pg_task_changed", hear)
        await client.enqueue_many(numbered(100))  # no worker sleeps
        await db.fetch(statement("sleep"), ["post"])
        await client.enqueue_many(numbered(5000))
        await db.execute("NOTIFY pg_task_changed, 'end'")
        await ended.wait()
        assert heard == [f"{await db.fetchval('SELECT to_regclass($1)::oid', 'pg_task')} post", "end"]
        await db.remove_listener("pg_task_changed", hear)

    play(dsn, scenario)


def test_load_beyond_the_limit_of_temporary_files_is_refused(dsn: str) -> None:
    """The database trigger that notifies keeps the rows a second time. Parts of the load fit into the limit."""

    async def scenario(client: Client, db: Any) -> None:
        async with (
            connected(dsn, server_settings={"temp_file_limit": "1MB", "work_mem": "64kB"}) as conn,
            conn.transaction(),
        ):
            with pytest.raises(DataRefused, match=r"exceeds \"temp_file_limit\".*SQLSTATE 53400"):
                await client.enqueue_many(numbered(20_000), conn=conn)
            for _ in range(2):
                await client.enqueue_many(numbered(2_000), conn=conn)
        assert await count(db) == 4_000

    play(dsn, scenario)
