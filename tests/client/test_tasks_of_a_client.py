"""Tasks from Python, in Postgres: pages and portions, the caller's transaction, rows that others have locked."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from client_kit import count, play
from fix_database import run
from post import Numbered, Write
from schema_kit import payloads
from sessions import connected, until, until_waiting

from pgtask import Client, EnqueueError, WorkflowContext, workflow
from pgtask._postgres import listing, task_changes, task_store
from pgtask._worker_client import WorkerClient
from pgtask.config import load_config
from pgtask.errors import PgtaskError, TaskNotFound

HOUR = timedelta(hours=1)


@workflow("voyage")
async def voyage(ctx: WorkflowContext) -> None: ...


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and portions of a few tasks, scans of a few rows."""
    monkeypatch.setattr(task_store, "PAGE", 7)
    monkeypatch.setattr(task_store, "COUNTED", 7)
    monkeypatch.setattr(task_store, "PORTION", 7)
    monkeypatch.setattr(listing, "SCAN_LIMIT", 10)


FILL = """
    INSERT INTO pg_task (step, queue, error, wakeup_at)
    SELECT
        format('{"Post":{"Numbered":{"n":%s}}}', i),
        CASE i % 3 WHEN 0 THEN 'b' ELSE 'a' END,
        CASE WHEN i % 2 = 0 THEN 'error ' || i % 5 END,
        CASE WHEN i % 7 = 0 THEN now() + interval '1 h' ELSE now() - interval '1 h' END
    FROM generate_series(1, 300) AS i
"""


@pytest.mark.usefixtures("small")
def test_pages_yield_each_task_once(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await db.execute(FILL)
        assert len({task.id async for task in client.tasks()}) == 300
        for wanted, condition in [
            ({}, "true"),
            ({"queue": "b"}, "queue = 'b'"),
            ({"error": "error 3"}, "error = 'error 3'"),
            ({"step": Numbered, "queue": "a", "state": "parked"}, "error IS NOT NULL AND queue = 'a'"),
        ]:
            expected = {row[0] for row in await db.fetch(f"SELECT id FROM pg_task WHERE {condition}")}
            options: Any = wanted
            found = [task.id async for task in client.tasks(**options)]
            assert len(found) == len(expected)
            assert set(found) == expected
            assert await client.tasks(**options).count() == len(expected)

    play(dsn, scenario)


@pytest.mark.usefixtures("small")
def test_each_change_in_bulk_ends_and_counts_each_task_once(dsn: str) -> None:
    """All tasks are of one or two times, so that a changed row lies just behind or before the others."""

    async def scenario(client: Client, db: Any) -> None:
        await db.execute(FILL)
        tasks = client.tasks()
        assert await tasks.move(queue="b", priority=3) == 300
        assert await db.fetchval("SELECT count(*) FROM pg_task WHERE (queue, priority) = ('b', 3)") == 300
        assert await tasks.reschedule(after=2 * HOUR) == 300
        assert await db.fetchval("SELECT count(DISTINCT wakeup_at) FROM pg_task WHERE error IS NULL") == 1
        assert await tasks.retry() == 300
        assert await db.fetchval("SELECT count(*) FROM pg_task WHERE wakeup_at <= now()") == 300
        assert await tasks.cancel() == 300

    play(dsn, scenario)


def test_portion_changes_what_the_filter_still_chooses(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are revived, taken and locked between the read of a portion and its change."""

    async def scenario(client: Client, db: Any) -> None:
        await db.execute(FILL)
        async with connected(dsn) as other, other.transaction():
            find = listing.find_tasks

            async def find_and_meddle(*args: Any, **options: Any) -> Any:
                found = await find(*args, **options)
                revived, leased, *_ = sorted(found[0])
                await db.execute("UPDATE pg_task SET error = NULL WHERE id = $1", revived)
                await db.execute(
                    "UPDATE pg_task SET error = NULL, locked_by = gen_random_uuid(), lock_expires_at = 'infinity'"
                    " WHERE id = $1",
                    leased,
                )
                await other.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", sorted(found[0])[2])
                return found

            monkeypatch.setattr(task_changes, "find_tasks", find_and_meddle)
            assert await client.tasks(state="parked").cancel() == 150 - 3
        assert await count(db) == 153

    play(dsn, scenario)


@pytest.mark.usefixtures("small")
def test_cancelled_call_leaves_whole_portions(dsn: str) -> None:
    """The third portion waits for a lock of the table; the call is cancelled then."""

    async def scenario(client: Client, db: Any) -> None:
        await db.execute(FILL)
        await db.execute("CREATE TABLE gate (n int); INSERT INTO gate VALUES (0)")
        await db.execute(
            """
            CREATE FUNCTION pass_gate() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                UPDATE gate SET n = n + (SELECT count(*) FROM gone);
                IF (SELECT n FROM gate) > 14 THEN PERFORM pg_sleep(60); END IF;
                RETURN NULL;
            END $$;
            CREATE TRIGGER gate AFTER DELETE ON pg_task
                REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION pass_gate()
            """
        )
        call = asyncio.create_task(client.tasks().cancel())
        sleeping = (
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        )
        await until(db, sleeping)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await count(db) == 300 - 14

    play(dsn, scenario)


def test_change_is_part_of_the_callers_transaction(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        id = await client.enqueue(Write("x"))
        voyaging = await client.trigger(voyage)
        task = client.task(id)
        for isolation in ("read_committed", "repeatable_read", "serializable"):
            async with connected(dsn) as conn:
                undone = conn.transaction(isolation=isolation)
                await undone.start()
                await conn.fetch("SELECT FROM pg_task")
                assert await task.move(queue="other", conn=conn)
                assert await task.reschedule(after=HOUR, conn=conn)
                assert await task.retry(conn=conn)
                assert (await task.status()).queue == "post"
                assert await conn.fetchval("SHOW statement_timeout") == "0"
                if isolation == "read_committed":
                    assert await client.task(voyaging.id).cancel(conn=conn)
                else:
                    with pytest.raises(EnqueueError, match="make it READ COMMITTED"):
                        await client.task(voyaging.id).cancel(conn=conn)
                assert await task.cancel(conn=conn)
                with pytest.raises(TaskNotFound):
                    await task.cancel(conn=conn)
                assert await conn.fetchval("SELECT 1") == 1
                await undone.rollback()
        assert await count(db) == 2
        async with connected(dsn) as conn:
            await conn.execute("BEGIN")
            assert await task.cancel(conn=conn)
            await conn.execute("COMMIT")
            with pytest.raises(EnqueueError, match="is not in a transaction"):
                await task.cancel(conn=conn)
        assert await count(db) == 1

    play(dsn, scenario)


def test_cancel_of_a_run_cancels_its_children(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        parent, child, other = [(await client.trigger(voyage)).id for _ in range(3)]
        await db.execute("UPDATE pg_task_runs SET parent = $1 WHERE id = $2", parent, child)
        assert await client.task(parent).cancel()
        assert {one.id for one in await client.runs(state="CANCELLED")} == {child, parent}
        assert [task.id async for task in client.tasks()] == [other]
        plain = await client.enqueue(Write("x"))
        elder, younger = [(await client.trigger(voyage, queue=queue)).id for queue in ("first", "second")]
        await db.execute("UPDATE pg_task_runs SET parent = $1 WHERE id = $2", elder, younger)
        assert await client.tasks(queue="first").cancel() == 1
        assert [await db.fetchval("SELECT state FROM pg_task_runs WHERE id = $1", id) for id in (elder, younger)] == [
            "CANCELLED",
            "CANCELLED",
        ]
        assert await client.tasks().cancel() == 2
        assert await count(db) == 0
        assert {one.id for one in await client.runs(state="CANCELLED")} == {other, child, parent, elder, younger}
        with pytest.raises(TaskNotFound):
            await client.task(plain).status()

    play(dsn, scenario)


def test_task_with_an_expired_lease_may_be_changed(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids = await client.enqueue_many(Write("x") for _ in range(4))
        await db.execute("UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() - interval '1 s'")
        handles = [client.task(id) for id in ids]
        assert (await handles[0].status()).state == "leased"
        assert await handles[0].retry()
        assert await handles[1].reschedule(after=HOUR)
        assert await handles[2].move(queue="other")
        assert await handles[3].cancel()
        found = [(await handle.status()).state for handle in handles[:3]]
        assert found == ["ready", "scheduled", "leased"]
        assert await client.tasks().retry() == 2

    play(dsn, scenario)


def test_reader_that_pauses_holds_no_connection(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await db.execute(FILL)
        reading = aiter(client.tasks())
        await anext(reading)
        assert (await client.stats()).lanes[0].queue == "a"
        assert await client.tasks().count() == 300

    play(dsn, scenario, pool_size=1)


def test_client_on_the_connections_of_a_worker_does_the_same(dsn: str) -> None:
    """`ctx.client`: its sessions have none of our settings, and know no infinite times."""

    async def main() -> None:
        app: Any = None
        async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
            client = WorkerClient(pool, load_config({"dsn": dsn}), app)
            id = await client.enqueue(Write("x"))
            await pool.execute("INSERT INTO pg_task (step, wakeup_at) VALUES ('{}', 'infinity'), ('{}', '-infinity')")
            await pool.execute("INSERT INTO pg_task (step, wakeup_at, error) VALUES ('{}', 'infinity', 'x')")
            states = sorted([task.state async for task in client.tasks()])
            assert states == ["parked", "ready", "ready", "scheduled"]
            assert await client.task(id).reschedule(after=HOUR)
            assert await client.tasks(error="x").retry() == 1
            assert await client.tasks(step=Write).move(queue="other") == 1
            assert sum(lane.scheduled for lane in (await client.stats()).lanes) == 2
            assert await client.tasks().cancel() == 4
            await client.close()

    run(main())


def test_changed_task_wakes_a_worker(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        tasks = client.tasks()
        await client.enqueue_many([Write("x")])
        for bulk in (lambda: tasks.reschedule(after=HOUR), tasks.retry):
            assert await payloads(dsn, bulk) == [""]
        id = await client.delay(Write("x"), HOUR)
        assert await payloads(dsn, lambda: client.task(id).reschedule(after=timedelta(0))) == [""]

    play(dsn, scenario)


ACTIONS = "SELECT action, filter, tasks, state FROM pg_task_actions WHERE ended_at > began_at ORDER BY id"


def test_changes_of_many_leave_rows_of_who_did_it(dsn: str, small: None) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue_many(Numbered(number) for number in range(20))
        assert await client.tasks(queue="post", step=Numbered).move(queue="it's", priority=3) == 20
        assert await client.tasks(where={"n": 3}).cancel(force=True) == 1
        await client.tasks().retry()
        await db.execute("ALTER TABLE pg_task ADD CONSTRAINT own CHECK (queue <> 'no')")
        with pytest.raises(PgtaskError):
            await client.tasks(state=("ready", "parked"), older_than=timedelta(0)).move(queue="no")
        assert [tuple(row) for row in await db.fetch(ACTIONS)] == [
            ("move --queue 'it'\"'\"'s' --priority 3", "--queue post --step Post.Numbered", 20, "done"),
            ("cancel --force", "--where n=3", 1, "done"),
            ("retry", "--all", 0, "done"),
            ("move --queue no", "--state ready,parked --age 0s", 0, "failed"),
        ]

    play(dsn, scenario)


def test_cancelled_change_of_many_says_so(dsn: str, small: None) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue_many(Numbered(number) for number in range(20))
        async with db.transaction():
            await db.execute("LOCK TABLE pg_task IN ACCESS EXCLUSIVE MODE")
            change = asyncio.create_task(client.tasks().move(queue="other"))
            await until_waiting(db)
            change.cancel()
            with pytest.raises(asyncio.CancelledError):
                await change
        assert await db.fetchval("SELECT state FROM pg_task_actions") == "stopped"

    play(dsn, scenario)
