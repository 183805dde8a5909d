"""Behind a pooler in transaction mode, with `no-listen`: clients, results, consumers and workers use nothing that only
a session of its own would keep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import asyncpg
import flows
import pytest
from apps import Noop, app
from conftest import run
from fleet import Fleet
from pooler import Pooler

from pgtask import Client, DatabaseRefused, RunCancelled


@pytest.fixture
def without_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_NO_LISTEN", "1")


def test_it_is_a_pooler(dsn: str) -> None:
    """What a session keeps is not there in the next transaction, and startup parameters are refused."""

    async def main() -> None:
        async with Pooler(dsn) as pooler:
            db = await asyncpg.connect(pooler.dsn, statement_cache_size=0)
            pids = [await db.fetchval("SELECT pg_backend_pid()") for _ in range(3)]
            assert len(set(pids)) == 3
            async with db.transaction():
                assert len({await db.fetchval("SELECT pg_backend_pid()") for _ in range(3)}) == 1
            await db.close()
            kept = await asyncpg.connect(pooler.dsn)
            assert await kept.fetchval("SELECT $1::int", 1) == 1
            with pytest.raises(asyncpg.PostgresError, match=r"prepared statement .* does not exist"):
                await kept.fetchval("SELECT $1::int", 1)
            kept.terminate()
            with pytest.raises(DatabaseRefused, match="through a pooler use --no-listen"):
                async with Client(pooler.dsn):
                    pass

    run(main())


def through(dsn: str, use: Callable[[Client, str], Any]) -> None:
    async def main() -> None:
        async with Pooler(dsn) as pooler, Client(pooler.dsn, app=app) as client:
            await use(client, pooler.dsn)

    run(main())


@pytest.mark.usefixtures("without_listen")
def test_a_consumer(dsn: str) -> None:
    async def use(client: Client, _: str) -> None:
        async with client.consumer("emails", lease_timeout=timedelta(seconds=0.6)) as consumer:
            waiting = asyncio.create_task(consumer.claim(10, wait=timedelta(seconds=20)))
            await client.enqueue_many([Noop(number) for number in range(100)], queue="emails")
            leases = await waiting
            leases += await consumer.claim(90)
            assert len(leases) == 100
            before = leases[0].expires_at
            while leases[0].expires_at == before:  # noqa: ASYNC110  renewed, by its own connection
                await asyncio.sleep(0.05)
            assert await consumer.done(leases[:50]) == []
            assert await consumer.retry(leases[50:70], timedelta(hours=1)) == []
            assert await consumer.fail(leases[70:80], "no") == []
            assert await consumer.extend(leases[80:], timedelta(hours=1)) == []
        async with client.consumer("emails") as consumer:
            assert len(await consumer.claim(100)) == 20

    through(dsn, use)


@pytest.mark.usefixtures("without_listen")
def test_a_client_and_results(dsn: str) -> None:
    async def use(client: Client, _: str) -> None:
        assert await client.enqueue(Noop(1), key="one") == await client.enqueue(Noop(2), key="one")
        ids = await client.trigger_many(flows.child, range(50))
        results = [asyncio.create_task(client.run(id).result(timeout=20)) for id in ids]
        await asyncio.sleep(0)
        await client.signal(ids[0], "go")
        for id in ids:
            assert await client.run(id).cancel()
        for result in results:
            with pytest.raises(RunCancelled):
                await result
        assert await client.run(ids[0]).resume()
        assert len(await client.runs(state="CANCELLED")) == 49

    through(dsn, use)


@pytest.mark.usefixtures("without_listen")
def test_workers(dsn: str) -> None:
    async def use(client: Client, pooled: str) -> None:
        await client.trigger_many(flows.child, range(50))

        def work() -> int:
            with Fleet(pooled, "--burst", "--no-listen", app="flows:app", procs=2) as fleet:
                return fleet.process.wait(40)

        assert await asyncio.to_thread(work) == 0
        assert len(await client.runs(state="SUCCESS")) == 50

    through(dsn, use)
