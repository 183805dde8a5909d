"""`consumer.done(leases, conn=conn)`: the tasks are finished by the transaction of the caller, or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from apps import Noop
from archives import Begin, app
from fix_database import run
from sessions import connected

from pgtask import Client, Consumer
from pgtask._lease_clock import lease_clock
from pgtask._postgres.store import statement
from pgtask.errors import ConsumeError, RowsLocked

pytestmark = pytest.mark.one_database("DROP TABLE IF EXISTS effect; TRUNCATE pg_task_archive")


@asynccontextmanager
async def consuming(dsn: str, number: int, app: Any = None) -> AsyncIterator[tuple[Any, Consumer]]:
    async with connected(dsn) as conn, Client(dsn, app=app) as client:
        await conn.execute("CREATE TABLE effect (number integer)")
        await client.enqueue_many([Noop(n) for n in range(number)], queue="q")
        async with client.consumer("q", lease_timeout=timedelta(seconds=60)) as consumer:
            yield conn, consumer


async def counts(dsn: str) -> tuple[int, int]:
    """Return the number of rows, and of tasks."""
    async with connected(dsn) as db:
        return await db.fetchval("SELECT count(*) FROM effect"), await db.fetchval("SELECT count(*) FROM pg_task")


async def renewed(conn: Any, consumer: Consumer) -> None:
    """Have the renewing thread look at the leases, in its own way."""
    leases = [lease.held for lease in consumer._held.all()]
    sent = lease_clock()
    rows = await conn.fetch(statement("renew"), [one.id for one in leases], [one.token for one in leases], 60.0)
    ours = {row[0]: row[1] for row in rows}
    consumer._held.leases.mark_renewed([one for one in leases if ours.get(one.id)], sent)
    consumer._held.lose([one for one in leases if one.id not in ours])
    await asyncio.sleep(0)


def test_done_commits_with_the_caller(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with consuming(dsn, 3) as (conn, consumer):
            leases = await consumer.claim()
            async with conn.transaction():
                await conn.execute("INSERT INTO effect SELECT generate_series(1, 2)")
                assert await consumer.done(leases[:2], conn=conn) == []
                assert await counts(dsn) == (0, 3)
                assert len(consumer._held) == 3
            assert await counts(dsn) == (2, 1)
            await renewed(conn, consumer)
            assert [lease.lost for lease in leases] == [False] * 3
            assert consumer._held.all() == [leases[2]]

    caplog.set_level(logging.WARNING)
    run(main())
    assert caplog.messages == []


def test_done_rolled_back_keeps_the_leases(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (conn, consumer):
            leases = await consumer.claim()
            transaction = conn.transaction()
            await transaction.start()
            await conn.execute("INSERT INTO effect VALUES (1)")
            assert await consumer.done(leases, conn=conn) == []
            await transaction.rollback()
            assert await counts(dsn) == (0, 2)
            await renewed(conn, consumer)
            assert len(consumer._held) == 2
            assert [lease.lost for lease in leases] == [False] * 2
            async with conn.transaction():
                assert await consumer.done(leases[0], conn=conn) == []
            assert await consumer.done(leases[1]) == []
            assert await counts(dsn) == (0, 0)

    run(main())
    assert "lease.lost" not in caplog.text


def test_done_returns_lost_leases_unwritten(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (conn, consumer):
            kept, lost = await consumer.claim()
            await conn.execute("UPDATE pg_task SET locked_by = gen_random_uuid() WHERE id = $1", lost.task_id)
            async with conn.transaction():
                assert await consumer.done([kept, lost], conn=conn) == [lost]
            assert [row[0] for row in await conn.fetch("SELECT id FROM pg_task")] == [lost.task_id]
            await renewed(conn, consumer)
            assert (kept.lost, lost.lost) == (False, True)

    run(main())


def test_lease_lost_after_a_rollback_is_lost(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 1) as (conn, consumer):
            (lease,) = await consumer.claim()
            transaction = conn.transaction()
            await transaction.start()
            await consumer.done(lease, conn=conn)
            await transaction.rollback()
            await renewed(conn, consumer)
            await conn.execute("UPDATE pg_task SET locked_by = gen_random_uuid()")
            await renewed(conn, consumer)
            assert lease.lost

    run(main())


def test_done_archives_in_the_transaction(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as conn, Client(dsn, app=app) as client:
            await client.enqueue(Begin(2), queue="q")
            async with client.consumer("q") as consumer:
                leases = await consumer.claim()
                async with conn.transaction():
                    assert await consumer.done(leases, conn=conn) == []
                assert await conn.fetchval("SELECT count(*) FROM pg_task_archive") == 1

    run(main())


def test_end_does_not_wait_for_the_caller(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """The consumer ends while the transaction is open; the other leases are released."""

    async def main() -> None:
        async with connected(dsn) as conn, connected(dsn) as db:
            transaction = conn.transaction()
            async with Client(dsn) as client:
                await client.enqueue_many([Noop(n) for n in range(2)], queue="q")
                async with client.consumer("q") as consumer:
                    first, _ = await consumer.claim()
                    await transaction.start()
                    await consumer.done(first, conn=conn)
            assert await db.fetchval("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL") == 1
            await transaction.commit()
            assert await db.fetchval("SELECT count(*) FROM pg_task") == 1

    run(main())
    assert "leases.abandoned" not in caplog.text


def test_locked_row_refuses_and_keeps_the_transaction(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgtask._consumer.statements.LOCK_TIMEOUT", "50ms")

    async def main() -> None:
        async with consuming(dsn, 1) as (conn, consumer), connected(dsn) as other:
            leases = await consumer.claim()
            async with conn.transaction():
                await conn.execute("INSERT INTO effect VALUES (1)")
                async with other.transaction():
                    await other.execute("SELECT FROM pg_task FOR UPDATE")
                    with pytest.raises(RowsLocked):
                        await consumer.done(leases, conn=conn)
                assert await consumer.done(leases, conn=conn) == []
                assert await conn.fetchval("SHOW lock_timeout") == "0"
            assert await counts(dsn) == (1, 0)

    run(main())


def test_wrong_connection_is_refused(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 1) as (conn, consumer), asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
            leases = await consumer.claim()
            for wrong, text in ((conn, "not in a transaction"), (pool, "is a pool"), ("text", "not an asyncpg")):
                with pytest.raises(ConsumeError, match=text):
                    await consumer.done(leases, conn=wrong)
            assert await consumer.done(leases) == []
            async with conn.transaction():
                with pytest.raises(ConsumeError, match="already settled"):
                    await consumer.done(leases, conn=conn)

    run(main())
