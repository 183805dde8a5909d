"""`client.failures()`: the parked tasks that it yields, also after its connection was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import apps
import asyncpg
import pytest
from fix_database import run
from fleet import Fleet
from sessions import opened, until

from pgtask import App, Client, Context, EnqueueError, Fail, ParkedTask, Task
from pgtask._postgres import failures as module
from pgtask._postgres.migrate import migrate
from pgtask.errors import ConfigError
from pgtask.testing import MemoryClient, MemoryWorker

SESSIONS = (
    "SELECT count(*) = $1 FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'pgtask failures'"
)
INSERT = "INSERT INTO pg_task (step, error) SELECT '{}', format('%s %s', $1::int, n) FROM generate_series(1, 50) AS n"
KILL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgtask failures'"


async def park(db: Any, *errors: str) -> list[UUID]:
    """New tasks, parked by hand, one transaction each."""
    ids = []
    for error in errors:
        ids.append(await db.fetchval("INSERT INTO pg_task (step, key) VALUES ('{}', $1) RETURNING id", error))
        await db.execute("UPDATE pg_task SET error = $2, tried = 3 WHERE id = $1", ids[-1], error)
    return ids


async def errors_of(failures: AsyncGenerator[ParkedTask, None], count: int) -> list[str]:
    return [(await anext(failures)).error for _ in range(count)]


async def subscribed(failures: AsyncGenerator[ParkedTask, None], db: Any) -> None:
    """Wait until it listens for certain: it has yielded one."""
    await park(db, "first")
    assert await errors_of(failures, 1) == ["first"]


def test_failure_has_the_columns_of_the_row(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db), aclosing(client.failures()) as failures:
            (id,) = await park(db, "no such file")
            row = await db.fetchrow("SELECT * FROM pg_task")
            parked = await anext(failures)
            assert parked == ParkedTask(
                id=id,
                step="{}",
                error="no such file",
                tried=3,
                queue="default",
                priority=0,
                key="no such file",
                created_at=row["created_at"],
                parked_at=row["updated_at"],
            )
            assert type(parked.id) is UUID

    run(main())


def test_failures_begin_now_and_repeat_for_each_parking(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):
            await park(db, "before")
            async with aclosing(client.failures()) as failures:
                (id,) = await park(db, "after the call")  # and before it listens
                assert await errors_of(failures, 1) == ["after the call"]
                await db.execute("UPDATE pg_task SET error = NULL WHERE id = $1", id)
                stale = await park(db, "stale", "live")
                await db.execute("UPDATE pg_task SET error = NULL WHERE id = $1", stale[0])
                await db.execute("UPDATE pg_task SET error = 'again' WHERE id = $1", id)
                await db.execute("INSERT INTO pg_task (step, error) VALUES ('{}', 'at once')")
                assert await errors_of(failures, 3) == ["live", "again", "at once"]

    run(main())


def test_a_worker_that_parks_tells(dsn: str) -> None:
    def burst() -> None:
        with Fleet(dsn, "--burst") as fleet:
            assert fleet.ends() == 1

    async def main() -> None:
        async with opened(dsn) as (client, db), aclosing(client.failures()) as failures:
            ids = [await client.enqueue(apps.Noop()) for _ in range(3)]
            await db.execute("UPDATE pg_task SET step = replace(step, ':0', ':null')")
            await asyncio.to_thread(burst)
            found = [await anext(failures) for _ in range(3)]
            assert {one.id for one in found} == set(ids)
            assert all("Noop" in one.step and one.error for one in found)

    run(main())


def test_task_parked_during_an_outage_is_yielded_once(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db), aclosing(client.failures()) as failures:
            await subscribed(failures, db)
            for number in range(3):
                names = [f"{number} {n}" for n in range(4)]
                waiting = asyncio.ensure_future(errors_of(failures, 4))
                await db.execute(KILL)
                await park(db, *names)
                assert await waiting == names

    run(main())


@pytest.mark.parametrize("far", ["60000-01-01", "0044-03-15 BC", "infinity"])
def test_a_time_that_python_cannot_hold_stops_nothing(dsn: str, far: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db), aclosing(client.failures()) as failures:
            await subscribed(failures, db)
            for error in ("told by a notification", "told by the table"):
                waiting = asyncio.ensure_future(errors_of(failures, 2))
                if error == "told by the table":
                    await db.execute(KILL)
                await db.execute(
                    "INSERT INTO pg_task (step, error, created_at) VALUES ('{}', $1, $2::text::timestamptz)", error, far
                )
                await park(db, f"after {error}")
                assert await waiting == [error, f"after {error}"]

    run(main())


def test_more_failures_than_are_kept_or_read_at_once(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMED", 7)
    monkeypatch.setattr(module, "CHUNK_SIZE", 3)

    async def main() -> None:
        async with opened(dsn) as (client, db), aclosing(client.failures()) as failures:
            await subscribed(failures, db)
            for number in range(5):
                await db.execute(INSERT, number)
            found = await errors_of(failures, 250)
            assert sorted(found) == sorted(f"{number} {n}" for number in range(5) for n in range(1, 51))
            await park(db, "last")
            assert await errors_of(failures, 1) == ["last"]

    run(main())


def test_the_connection_ends_with_the_iteration(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):

            async def watch() -> None:
                async for _ in client.failures():
                    pass

            watcher = asyncio.create_task(watch())
            await until(db, SESSIONS, 1)
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            assert watcher.cancelled()
            await until(db, SESSIONS, 0)
            failures = client.failures()
            await park(db, "one")
            async for _ in failures:
                break
            del failures
            await until(db, SESSIONS, 0)

    run(main())


def test_it_follows_the_table_of_its_schema(dsn: str) -> None:
    async def main() -> None:
        other = f"{dsn}&search_path=other"
        async with opened(dsn) as (client, db):
            await db.execute("CREATE SCHEMA other")
            await migrate(other)
            async with Client(other) as others, aclosing(client.failures()) as ours, aclosing(others.failures()) as its:
                second = await asyncpg.connect(other)
                mine, its_own = asyncio.ensure_future(anext(ours)), asyncio.ensure_future(anext(its))
                await until(db, SESSIONS, 2)
                await park(second, "of the other")
                assert (await its_own).error == "of the other"
                await park(db, "of ours")
                assert (await mine).error == "of ours"
                await second.close()

    run(main())


def test_it_needs_a_connection_that_listens(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_NO_LISTEN", "1")

    async def main() -> None:
        async with Client(dsn) as client:
            with pytest.raises(ConfigError, match=r"PGTASK_NO_LISTEN .* pgtask list --state parked"):
                client.failures()

    run(main())


def test_it_needs_an_open_client(dsn: str) -> None:
    with pytest.raises(EnqueueError, match="the client is not open"):
        Client(dsn).failures()


# --- in memory


class Fragile(Task):
    pass


class Break(Fragile):
    number: int

    async def run(self, ctx: Context) -> Fail:
        return Fail(f"broken {self.number}")


def test_memory_worker_that_parks_a_task_tells_failures() -> None:
    async def main() -> None:
        client = MemoryClient()
        async with MemoryWorker(App(Fragile), client=client) as worker:
            await client.enqueue(Break(0))
            await worker.run()
            async with aclosing(client.failures()) as failures:
                id = await client.enqueue(Break(1), queue="other")
                await worker.run()
                async with asyncio.timeout(10):
                    parked = await anext(failures)
                assert (parked.id, parked.queue) == (id, "other")
                assert "broken 1" in parked.error
            assert client.rows.followers == []

    run(main())
