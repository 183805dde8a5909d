"""Tables of pg_task 0.2 and 1.0 are adopted, and pg_task 1.0 works on ours."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from crate import CRATE_0_2, CRATE_1_0, LATER, OUR_FUNCTIONS, OUR_INDEXES, OUR_TRIGGERS, STEP, RustWorker
from schema_kit import catalog, names, notified, payloads, play

from pgtask._postgres.migrate import check_schema, migrate
from pgtask.errors import SchemaError

# --- adopted


def test_adoption_of_0_2_keeps_each_row_and_its_meaning(empty_dsn: str) -> None:
    facts = "id, step, wakeup_at, tried, error, created_at, updated_at"

    async def scenario(db: Any) -> None:
        await db.execute(CRATE_0_2)
        await db.execute("""
            INSERT INTO pg_task (step, wakeup_at, tried, is_running, error, created_at, updated_at)
            SELECT s, '2024-01-01'::timestamptz + w, t, r, e, '2023-12-31', '2024-01-02'
            FROM (VALUES
                ('ready', '0'::interval, 0, false, NULL), ('future', '100 years', 2, false, NULL),
                ('running', '1 hour', 1, true, NULL), ('parked', '0', 6, false, 'no such file'),
                ('parked and running', '0', 3, true, 'by hand')
            ) AS row (s, w, t, r, e)
        """)
        before = await db.fetch(f"SELECT {facts} FROM pg_task ORDER BY step")
        said = await migrate(empty_dsn)
        assert "released 1 running tasks, to be run again" in said
        assert "adopted the table of pg_task 0.2 in the schema public" in said
        assert await db.fetch(f"SELECT {facts} FROM pg_task ORDER BY step") == before
        assert "is_running" not in await names(db, "column")
        assert await names(db, "index") == OUR_INDEXES
        assert await names(db, "trigger") == OUR_TRIGGERS
        leased = await db.fetch("SELECT step, lock_expires_at <= now() FROM pg_task WHERE locked_by IS NOT NULL")
        assert [tuple(row) for row in leased] == [("running", True)]
        defaults = await db.fetch("SELECT DISTINCT queue, priority, key, claims FROM pg_task")
        assert [tuple(row) for row in defaults] == [("default", 0, None, 0)]
        # The first worker takes the running one again, and the parked ones stay.
        worker = RustWorker(db)
        claimed = [await worker.claim() for _ in range(3)]
        assert [row and row["step"] for row in claimed] == ["ready", "running", None]

    play(empty_dsn, scenario)


@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_adoption_of_1_0_keeps_each_row_and_its_lease(empty_dsn: str, keep: bool) -> None:
    facts = "id, step, wakeup_at, tried, error, created_at, updated_at, locked_by, lock_expires_at"

    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        await db.execute("CREATE TABLE _sqlx_migrations AS SELECT 1 AS version")
        await db.execute("""
            INSERT INTO pg_task (step, wakeup_at, tried, error, locked_by, lock_expires_at)
            VALUES ('ready', '2024-01-01', 0, NULL, NULL, NULL), ('future', '2124-01-01', 1, NULL, NULL, NULL),
                ('live', '2024-01-01', 1, NULL, gen_random_uuid(), '2124-01-01'),
                ('expired', '2024-01-01', 2, NULL, gen_random_uuid(), '2024-01-02'),
                ('parked', '2024-01-01', 6, 'no such file', NULL, NULL)
        """)
        sqlx = await db.fetch("SELECT ctid, xmin, version FROM _sqlx_migrations")
        before = await db.fetch(f"SELECT ctid, xmin, {facts} FROM pg_task ORDER BY step")
        said = await migrate(empty_dsn, keep_pg_task=keep)
        assert "adopted the table of pg_task 1.0 in the schema public" in said
        assert await db.fetch(f"SELECT ctid, xmin, {facts} FROM pg_task ORDER BY step") == before
        assert await db.fetch("SELECT ctid, xmin, version FROM _sqlx_migrations") == sqlx
        ready = await db.fetch("SELECT step FROM pg_task WHERE locked_by IS NULL AND error IS NULL ORDER BY step")
        assert [row["step"] for row in ready] == ["future", "ready"]
        await check_schema(db)

    play(empty_dsn, scenario)


def test_keep_pg_task_keeps_its_objects_until_a_run_without(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        theirs = await names(db, "index") | await names(db, "trigger")
        await migrate(empty_dsn, keep_pg_task=True)
        ours = OUR_INDEXES | OUR_TRIGGERS
        assert await names(db, "index") | await names(db, "trigger") == ours | theirs
        assert await migrate(empty_dsn, keep_pg_task=True) == []
        # Theirs notifies each time, ours if one sleeps.
        insert = "INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 3)"
        assert await payloads(empty_dsn, lambda: db.execute(insert)) == [""]
        oid = await db.fetchval("SELECT 'pg_task'::regclass::oid")
        assert await payloads(empty_dsn, lambda: db.execute(insert), sleeps=[]) == ["", f"{oid} default"]
        said = await migrate(empty_dsn)
        assert len(said) == 1
        assert said[0].startswith("removed the indexes and triggers of pg_task: ")
        assert await names(db, "index") | await names(db, "trigger") == ours
        functions = await db.fetch("SELECT proname::text FROM pg_proc WHERE proname LIKE 'pg_task%'")
        assert {row[0] for row in functions} == OUR_FUNCTIONS
        assert await migrate(empty_dsn) == []

    play(empty_dsn, scenario)


def test_keeping_0_2_is_refused(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_0_2)
        before = await catalog(db)
        with pytest.raises(SchemaError, match=r"is of pg_task 0\.2, whose workers know no leases"):
            await migrate(empty_dsn, keep_pg_task=True)
        assert await catalog(db) == before

    play(empty_dsn, scenario)


def test_parking_is_notified_once(shaped: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 2)")
        park = "UPDATE pg_task SET error = 'no such file'"
        assert await notified(shaped, lambda: db.execute(park), "pg_task_error") == 2
        assert await notified(shaped, lambda: db.execute(park), "pg_task_error") == 0
        insert = "INSERT INTO pg_task (step, error) VALUES ('{}', 'by hand'), ('{}', NULL)"
        assert await notified(shaped, lambda: db.execute(insert), "pg_task_error") == 1

    play(shaped, scenario)


@pytest.mark.parametrize("column", ["step", "tried", "error", "wakeup_at", "queue", "priority", "key"])
def test_update_by_hand_changes_updated_at(shaped: str, column: str) -> None:
    values = {"tried": "1", "wakeup_at": "now() + '1 hour'", "priority": "1"}
    update = f"UPDATE pg_task SET {column} = {values.get(column, repr('x'))} RETURNING updated_at"

    async def scenario(db: Any) -> None:
        before = await db.fetchval("INSERT INTO pg_task (step) VALUES ('{}') RETURNING updated_at")
        assert await db.fetchval(update) > before

    play(shaped, scenario)


def test_trigger_of_the_user_keeps_its_function(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        await db.execute("""
            CREATE TABLE mine (id int);
            CREATE TRIGGER also AFTER INSERT ON mine EXECUTE FUNCTION pg_task_notify_on_change()
        """)
        await migrate(empty_dsn)
        assert await notified(empty_dsn, lambda: db.execute("INSERT INTO mine VALUES (1)")) == 1

    play(empty_dsn, scenario)


def test_indexes_built_beforehand_are_kept_unless_invalid(empty_dsn: str) -> None:
    """The way for a big table, as docs/decisions/adopting-pg-task.md describes it."""
    ready = "SELECT indexrelid FROM pg_index WHERE indexrelid = 'pg_task_ready_idx'::regclass"

    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        await db.execute("""
            ALTER TABLE pg_task ADD COLUMN queue text NOT NULL DEFAULT 'default',
                ADD COLUMN priority smallint NOT NULL DEFAULT 0, ADD COLUMN key text
        """)
        await db.execute("INSERT INTO pg_task (step, key) VALUES ('{}', 'twice'), ('{}', 'twice')")
        await db.execute(
            "CREATE INDEX CONCURRENTLY pg_task_ready_idx ON pg_task (queue, priority, wakeup_at)"
            " WHERE locked_by IS NULL AND error IS NULL"
        )
        with pytest.raises(asyncpg.UniqueViolationError):
            await db.execute("CREATE UNIQUE INDEX CONCURRENTLY pg_task_key_idx ON pg_task (key) WHERE key IS NOT NULL")
        await db.execute("UPDATE pg_task SET key = NULL")
        before = await db.fetchval(ready)
        await migrate(empty_dsn)
        assert await db.fetchval(ready) == before
        invalid = "SELECT FROM pg_index WHERE indrelid = 'pg_task'::regclass AND NOT indisvalid"
        assert await db.fetch(invalid) == []
        assert await names(db, "index") == OUR_INDEXES

    play(empty_dsn, scenario)


# --- pg_task 1.0 on our table


def test_statements_of_pg_task_1_0_work(shaped: str) -> None:
    async def scenario(db: Any) -> None:
        worker, now = RustWorker(db), await db.fetchval("SELECT now()")
        task = await worker.enqueue()
        late = await worker.schedule(STEP, now + LATER)
        assert await worker.next_available_at() < now + LATER
        claimed = await worker.claim()
        assert claimed is not None
        assert (claimed["id"], claimed["step"], claimed["tried"]) == (task, STEP, 0)
        assert await worker.claim() is None
        assert await worker.beat(task, late) == {task}
        assert await worker.next_step(task, "next", now)
        assert not await worker.next_step(task, "fenced", now)
        assert (await worker.claim() or {})["step"] == "next"
        assert await worker.retry(task, now)
        assert (await worker.claim() or {})["tried"] == 1
        assert await worker.park(task, "no such file")
        assert await worker.claim() is None
        await db.execute("UPDATE pg_task SET error = NULL WHERE error IS NOT NULL")
        assert (await worker.claim() or {})["tried"] == 2
        assert await worker.complete(task)
        assert await worker.next_available_at() == now + LATER
        assert await worker.park_undecodable(late, "unknown variant")
        assert await worker.next_available_at() is None

    play(shaped, scenario)


def test_leases_are_respected_both_ways(shaped: str) -> None:
    ours = "SELECT count(*) FROM pg_task WHERE locked_by IS NULL AND error IS NULL AND wakeup_at <= now()"

    async def scenario(db: Any) -> None:
        worker = RustWorker(db)
        task = await worker.enqueue()
        token = uuid4()
        lease = "UPDATE pg_task SET locked_by = $1, lock_expires_at = now() + $2::interval"
        await db.execute(lease, token, LATER)
        assert await worker.claim() is None
        assert await worker.beat(task) == set()
        assert not await worker.complete(task)
        await db.execute("UPDATE pg_task SET lock_expires_at = now()")
        assert (await worker.claim() or {})["id"] == task
        assert await db.fetchval(ours) == 0
        done = await db.execute("DELETE FROM pg_task WHERE id = $1 AND locked_by = $2", task, token)
        assert done == "DELETE 0"
        assert await worker.retry(task, await db.fetchval("SELECT now()"))
        assert await db.fetchval(ours) == 1

    play(shaped, scenario)


def test_insert_of_a_step_alone_is_a_task(shaped: str) -> None:
    async def scenario(db: Any) -> None:
        row = await db.fetchrow("INSERT INTO pg_task (step) VALUES ($1) RETURNING *", STEP)
        assert json.loads(row["step"]) == {"Greeter": {"ReadName": {"filename": "name.txt"}}}
        assert (row["queue"], row["priority"], row["key"]) == ("default", 0, None)
        assert (row["claims"], row["tried"]) == (0, 0)
        assert row["created_at"] == row["updated_at"] <= row["wakeup_at"] <= await db.fetchval("SELECT now()")
        assert row["locked_by"] is row["lock_expires_at"] is row["error"] is None

    play(shaped, scenario)
