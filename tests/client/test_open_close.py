"""Opening and closing a client by hand, and what its calls send."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from client_kit import count, numbered
from fix_database import run
from post import Post, Write
from round_trips import RoundTrips
from sessions import connected

from pgtask import App, Client, EnqueueError, SyncClient
from pgtask.consumer import Consumer
from pgtask.errors import ConsumeError, DatabaseUnavailable, DefinitionError, PgtaskError
from pgtask.testing import MemoryClient, MemoryWorker

pytestmark = pytest.mark.one_database


def test_a_client_opens_and_closes_by_hand(dsn: str) -> None:
    async def main() -> None:
        client = Client(dsn)
        for _ in range(2):
            assert await client.open() is client
            with pytest.raises(EnqueueError, match="open already"):
                await client.open()
            await client.enqueue(Write("x"))
            await client.close()
            with pytest.raises(EnqueueError, match="not open"):
                await client.enqueue(Write("x"))
            with pytest.raises(EnqueueError, match="not open"):
                await client.close()
        async with connected(dsn) as db:
            assert await count(db) == 2

    run(main())


def test_a_database_that_is_read_only_for_us_is_unavailable(dsn: str) -> None:
    """A primary that has become a standby: the client may try again. With `conn=` it is an error of the caller."""

    async def main() -> None:
        async with Client(f"{dsn}&options=-cdefault_transaction_read_only%3Don") as client:
            with pytest.raises(DatabaseUnavailable, match="25006"):
                await client.enqueue(Write("x"))
            with pytest.raises(DatabaseUnavailable, match="25006"):
                await client.enqueue_many([Write("x")])
            async with connected(dsn) as db, db.transaction(readonly=True):
                with pytest.raises(EnqueueError, match="conn= is in a read-only transaction"):
                    await client.task(UUID(int=0)).cancel(conn=db)

    run(main())


def test_the_wrong_with_names_the_right_one() -> None:
    consumer = Consumer("postgresql://", "queue", app=None, lease_timeout=timedelta(seconds=60), pooled=False)
    wrong: list[tuple[Any, type[PgtaskError], str]] = [
        (Client(), EnqueueError, "Client is entered by `async with`, not by `with`; in sync code use SyncClient"),
        (MemoryClient(), EnqueueError, "MemoryClient is entered by `async with`, not by `with`; in sync code use"),
        (consumer, ConsumeError, "Consumer is entered by `async with`, not by `with`"),
        (MemoryWorker(App(Post)), DefinitionError, "MemoryWorker is entered by `async with`, not by `with`"),
    ]
    for made, error, says in wrong:
        with pytest.raises(error, match=says), made:
            raise AssertionError

    async def main() -> None:
        made: Any = SyncClient()
        with pytest.raises(EnqueueError, match="SyncClient is entered by `with`; in async code use `async with Client"):
            async with made:
                raise AssertionError

    run(main())


def test_a_client_in_memory_opens_and_closes_too() -> None:
    async def main() -> None:
        client = await MemoryClient().open()
        await client.enqueue(Write("x"))
        await client.close()
        client.assert_enqueued(Write("x"))

    run(main())


def test_failures_belong_to_the_loop_of_the_client(dsn: str) -> None:
    first = asyncio.new_event_loop()
    client = Client(dsn)
    first.run_until_complete(client.open())

    async def elsewhere() -> None:
        with pytest.raises(EnqueueError, match="opened in another event loop"):
            await anext(client.failures())
        with pytest.raises(EnqueueError, match="opened in another event loop"):
            await client.close()

    run(elsewhere())
    first.run_until_complete(client.close())
    first.close()


def test_a_call_after_another_is_one_round_trip(dsn: str) -> None:
    with RoundTrips(dsn) as line:

        async def main() -> list[int]:
            counts = []
            async with Client(line.dsn, pool_size=2) as client:
                for _ in range(5):
                    before = line.count
                    await client.enqueue(Write("x"))
                    counts.append(line.count - before)
            return counts

        assert run(main())[2:] == [1, 1, 1]


def test_calls_that_share_a_connection_send_no_reset(dsn: str) -> None:
    with RoundTrips(dsn) as line:

        async def main() -> int:
            async with Client(line.dsn, pool_size=1) as client:
                await client.enqueue(Write("x"))
                before = line.count
                await asyncio.gather(*(client.enqueue(Write("x")) for _ in range(20)))
                return line.count - before

        assert run(main()) == 20


def test_a_call_after_another_makes_no_task(dsn: str) -> None:
    async def main() -> None:
        async with Client(dsn) as client:
            await client.enqueue(Write("x"))
            made: list[Any] = []

            def make(loop: Any, coroutine: Any, **options: Any) -> Any:
                made.append(coroutine)
                return asyncio.Task(coroutine, loop=loop, **options)

            asyncio.get_running_loop().set_task_factory(make)
            await client.enqueue(Write("x"))
            asyncio.get_running_loop().set_task_factory(None)
            assert made == []

    run(main())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_spare_connection_holds_up_no_call(dsn: str, size: int) -> None:
    async def main() -> None:
        async with Client(dsn, pool_size=size) as client, connected(dsn) as db:

            async def worker(number: int) -> None:
                for _ in range(20):
                    await client.enqueue(Write("x"))
                    if number % 3 == 0:
                        await client.enqueue_many(numbered(2))

            await asyncio.gather(*map(worker, range(9)))
            assert await count(db) == 9 * 20 + 3 * 20 * 2

    run(main())


def test_a_cancelled_call_leaves_no_spare_in_a_transaction(dsn: str) -> None:
    async def main() -> None:
        async with Client(dsn, pool_size=1) as client, connected(dsn) as db:
            steps: Any = stuck()
            call = asyncio.create_task(client.enqueue_many(steps))
            await asyncio.sleep(0)
            while not await db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%'"):
                pass
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await client.enqueue(Write("after"))
            assert await count(db) == 1

    run(main())


async def stuck() -> Any:
    yield Write("x")
    await asyncio.Event().wait()
