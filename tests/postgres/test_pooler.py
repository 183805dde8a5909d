"""Behind a pooler in transaction mode, with `no-listen`: clients, results, consumers and workers use nothing that only
a session of its own would keep."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import flows
import pytest
from apps import Noop, app
from fix_database import run
from fleet import Fleet
from pooler import Pooler
from sessions import connected

from pgtask import Client, DatabaseRefused, DatabaseUnavailable, RunCancelled
from pgtask._postgres import store
from pgtask._postgres.connection import fetch_in_transaction
from pgtask._postgres.store import Link
from pgtask.errors import RowsLocked


@pytest.fixture
def without_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_NO_LISTEN", "1")


def test_pooler_shares_sessions(dsn: str) -> None:
    """The next transaction does not have the state of the session, and startup parameters are refused."""

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
            with pytest.raises(DatabaseRefused, match="through a pooler use --no-listen, or PGTASK_NO_LISTEN=1"):
                async with Client(pooler.dsn):
                    pass
        async with Pooler(dsn, ignores=True) as pooler:  # it takes the connection, and loses what was prepared on it
            with pytest.raises(DatabaseRefused, match=r"prepared statement .*PGTASK_NO_LISTEN=1 for a client"):
                await some_through(pooler.dsn)

    run(main())


async def some_through(dsn: str) -> None:
    async with Client(dsn) as client:
        for _ in range(5):
            await client.enqueue(Noop(), key="k")


def through(dsn: str, use: Callable[[Client, str, Pooler], Any]) -> None:
    async def main() -> None:
        async with Pooler(dsn) as pooler, Client(pooler.dsn, app=app) as client:
            await use(client, pooler.dsn, pooler)

    run(main())


def test_link_behind_the_pooler_brings_its_settings_along(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.HOT_SETTINGS, "lock_timeout", "50ms")

    async def main() -> None:
        async with Pooler(dsn) as pooler, connected(dsn) as db:
            link = Link(pooler.dsn, "test link", pooled=True)
            task, token = await db.fetchval("INSERT INTO pg_task (step) VALUES ('{}') RETURNING id"), uuid4()
            await db.execute("UPDATE pg_task SET locked_by = $1, lock_expires_at = 'infinity'", token)
            archived = ("archive", [task], [token])
            async with db.transaction():
                await db.execute("SELECT FROM pg_task FOR UPDATE")
                with pytest.raises(RowsLocked, match="lock timeout"):
                    await link.once(*archived)
                connection = link.connection
                assert await link.once("locked", [task]) == [(task,)]
            assert list(await link.once(*archived)) == [(None,) * 4]
            assert link.connection is connection
            # Without a transaction this finds the settings of a session, which are those of all other clients.
            assert await connection.fetchval("SELECT current_setting('lock_timeout')") == "0"
            await link.close()

    run(main())


def test_statement_in_a_transaction_of_its_own_sees_the_settings(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            query = "SELECT current_setting('enable_seqscan'), current_setting('transaction_isolation')"
            await db.execute("SET default_transaction_isolation = 'serializable'")
            assert await fetch_in_transaction(db, {"enable_seqscan": "off"}, query) == [("off", "read committed")]
            assert await db.fetchrow(query) == ("on", "serializable")
            with pytest.raises(asyncpg.DataError):
                await fetch_in_transaction(db, {}, "SELECT $1::integer", "one")
            assert not db.is_in_transaction()

    run(main())


@pytest.mark.usefixtures("without_listen", "hasty_renewal")
def test_consumer_works_behind_the_pooler(dsn: str) -> None:
    async def use(client: Client, *_: Any) -> None:
        async with client.consumer("emails") as consumer:
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
def test_client_and_results_work_behind_the_pooler(dsn: str) -> None:
    async def use(client: Client, *_: Any) -> None:
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
def test_workers_work_behind_the_pooler(dsn: str) -> None:
    async def use(client: Client, pooled: str, _: Pooler) -> None:
        await client.trigger_many(flows.child, range(50))

        def work() -> int:
            with Fleet(pooled, "--burst", "--no-listen", app="flows:app", procs=2) as fleet:
                return fleet.process.wait(40)

        assert await asyncio.to_thread(work) == 0
        assert len(await client.runs(state="SUCCESS")) == 50

    through(dsn, use)


@pytest.mark.usefixtures("without_listen")
@pytest.mark.parametrize("how", ["login_fails", "queries_fail"])
def test_workers_start_during_an_outage_behind_the_pooler(dsn: str, how: str) -> None:
    async def use(client: Client, pooled: str, pooler: Pooler) -> None:
        await client.enqueue_many([Noop(number) for number in range(50)])
        setattr(pooler, how, "server login has been failing, cached error: the database system is starting up")

        def work() -> int:
            with Fleet(pooled, "--burst", "--no-listen", procs=2) as fleet:
                fleet.until("database.unavailable", times=2)
                setattr(pooler, how, None)
                return fleet.ends(40)

        assert await asyncio.to_thread(work) == 0
        assert await client.enqueue(Noop(1)), "the client goes on as well"

    through(dsn, use)


@pytest.mark.usefixtures("without_listen")
def test_workers_survive_an_outage_behind_the_pooler(dsn: str) -> None:
    async def use(client: Client, pooled: str, pooler: Pooler) -> None:
        def work() -> int:
            with Fleet(pooled, "--no-listen", procs=2) as fleet:
                fleet.until("worker.ready", times=2)
                pooler.login_fails = pooler.queries_fail = "query_wait_timeout"
                fleet.until("database.unavailable", times=2)
                for worker in fleet.family():  # those that follow them start in the middle of the outage
                    worker.kill()
                fleet.until("database.unavailable", times=2)
                pooler.login_fails = pooler.queries_fail = None
                fleet.until("worker.ready", times=2)
                fleet.send(signal.SIGTERM)
                return fleet.ends(40)

        assert await asyncio.to_thread(work) == 0

    through(dsn, use)


@pytest.mark.usefixtures("without_listen")
def test_client_of_a_full_pooler_names_the_limit(dsn: str) -> None:
    async def use(client: Client, pooled: str, pooler: Pooler) -> None:
        pooler.login_fails = "no more connections allowed (max_client_conn)"
        with pytest.raises(DatabaseUnavailable, match="max_client_conn"):
            async with Client(pooled):
                pass
        for wrong in ("no such database: shop", "no such user: bob", "SASL authentication failed"):
            pooler.login_fails = wrong
            with pytest.raises(DatabaseRefused, match=rf"{wrong} \(SQLSTATE 08P01\)"):
                async with Client(pooled):
                    pass
        refused = 'password authentication failed for user "bob"'  # which the server has told the pooler
        for passes in (refused, f"server login has been failing, cached error: {refused}"):
            pooler.login_fails = passes
            with pytest.raises(DatabaseUnavailable, match=passes):
                async with Client(pooled):
                    pass

    through(dsn, use)
