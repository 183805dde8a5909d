"""`migrate`: the schema that it makes, what it refuses, and the locks that it waits for."""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from crate import COLUMNS, CRATE_0_2, CRATE_1_0, OUR_INDEXES, OUR_TRIGGERS, SHAPES
from schema_kit import catalog, names, play, psql, with_path

from pgtask._postgres import migrate as module
from pgtask._postgres.migrate import SCHEMA_VERSION, check_schema, migrate, migration_sql
from pgtask.errors import DatabaseUnavailable, SchemaError

# --- created


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


def test_paused_run_stays_paused_after_migration(dsn: str) -> None:
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


def test_missing_schema_of_search_path_is_named(empty_dsn: str) -> None:
    with pytest.raises(SchemaError, match="no schema of the search_path"):
        asyncio.run(migrate(with_path(empty_dsn, "absent")))


# --- refused


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
def test_check_schema_names_the_command_that_fixes_it(dsn: str, case: str) -> None:
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


def test_compatible_newer_schema_is_used_unchanged(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        newer = "INSERT INTO pg_task_schema (version, needs_code) VALUES (1000, $1)"
        await db.execute(newer, SCHEMA_VERSION)
        before = await catalog(db)
        await check_schema(db)
        assert await migrate(dsn) == []
        assert await catalog(db) == before
        ran = await asyncio.to_thread(psql, dsn, migration_sql())
        assert "is at version 1000" in ran.stderr
        await db.execute("UPDATE pg_task_schema SET needs_code = $1 WHERE version = 1000", SCHEMA_VERSION + 1)
        with pytest.raises(SchemaError, match="is at version 1000"):
            await check_schema(db)

    play(dsn, scenario)


def test_each_version_records_the_code_that_it_needs(shaped: str) -> None:
    async def scenario(db: Any) -> None:
        rows = await db.fetch("SELECT version, needs_code FROM pg_task_schema ORDER BY version")
        oldest = module.OLDEST_CODE
        assert [tuple(row) for row in rows] == [(n, min(n, oldest)) for n in range(1, SCHEMA_VERSION + 1)]

    play(shaped, scenario)


def test_upgrade_does_not_wait_for_readers(dsn: str) -> None:
    """A dump of the table may take an hour."""

    async def scenario(db: Any) -> None:
        await db.execute("""
            DROP FUNCTION pg_task_touch, pg_task_notify_parked, pg_task_stop CASCADE; DROP TABLE pg_task_stops;
            DELETE FROM pg_task_schema WHERE version > 6; ALTER TABLE pg_task_schema DROP COLUMN needs_code;
        """)
        async with db.transaction():
            for table in ("pg_task", "pg_task_runs", "pg_task_checkpoints"):
                await db.execute(f"LOCK TABLE {table} IN ACCESS SHARE MODE")
            assert await migrate(dsn, patience=0) == [f"the schema is at version {SCHEMA_VERSION}"]
        await check_schema(db)

    play(dsn, scenario)


def test_role_without_the_right_is_told_the_owner(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        role = f"stranger_{os.getpid()}"
        await db.execute(f"CREATE ROLE {role} LOGIN; DROP TRIGGER pg_task_inserted ON pg_task")
        try:
            stranger = f"{dsn}&user={role}" if "?" in dsn else dsn
            owner = urlsplit(dsn).username
            with pytest.raises(
                SchemaError, match=rf"belongs to the role {owner}, and {role} may not .* run as {owner}"
            ):
                await migrate(re.sub(r"//[^@/]*@", "//", stranger))
        finally:
            await db.execute(f"DROP ROLE {role}")

    play(dsn, scenario)


# --- locks


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


UNDO_ADDITIONS = """
    ALTER TABLE pg_task DROP COLUMN position, DROP COLUMN progress;
    DELETE FROM pg_task_schema WHERE version > 7;
"""
"""Undoes the migrations after version 7. Add what a later one adds to `pg_task`."""


@pytest.mark.parametrize("mode", ["ACCESS SHARE", "ROW EXCLUSIVE"])
def test_migration_that_only_adds_holds_up_no_session(dsn: str, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """While a long transaction has read or written the table, the migration gives way to all statements that come."""
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'pg_task'::regclass"

    async def scenario(db: Any) -> None:
        await db.execute(UNDO_ADDITIONS)
        held, other = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        transaction = held.transaction()
        await transaction.start()
        await held.execute(f"LOCK TABLE pg_task IN {mode} MODE")
        await other.execute("SET lock_timeout = '30s'")
        migration = asyncio.create_task(migrate(dsn, lock_timeout=0.2, patience=100))
        for _ in range(3):
            while not await db.fetchval(waits):
                if migration.done():
                    break
            if migration.done():  # it had no need to wait for a reader
                break
            await other.execute("INSERT INTO pg_task (step) VALUES ('{}')")
            await other.fetchval("SELECT count(*) FROM pg_task")
        assert mode == "ACCESS SHARE" or not migration.done()
        await transaction.rollback()
        assert await migration == [f"the schema is at version {SCHEMA_VERSION}"]
        await check_schema(db)
        for connection in (held, other):
            await connection.close()

    play(dsn, scenario)


def test_late_migration_does_not_lock_the_table(empty_dsn: str) -> None:
    """Eight workers boot, one migrates; the other seven must not stall it when their turn comes."""
    ours = "classid = 1885828193 AND objid = 1"
    waits = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND {ours}"

    async def scenario(db: Any) -> None:
        await db.execute("SELECT pg_advisory_lock(1885828193, 1)")
        late = asyncio.create_task(migrate(empty_dsn, lock_timeout=50, patience=0))
        while not await db.fetchval(waits):
            assert not late.done()
        await db.execute(migration_sql().replace("\\set ON_ERROR_STOP on", ""))
        async with db.transaction():
            await db.execute("SELECT FROM pg_task")
            await db.execute("SELECT pg_advisory_unlock(1885828193, 1)")
            assert await late == []

    play(empty_dsn, scenario)


def test_keys_are_given_the_names_of_their_tasks(dsn: str) -> None:
    """Also where one was given by hand that is the new key of another, or where it would be too long for the index."""
    long = "".join(chr(0x10000 + 7919 * n % 0xFFFF) for n in range(512))
    named = chr(0x10000) * 200

    async def scenario(db: Any) -> None:
        await db.execute("ALTER TABLE pg_task DROP COLUMN behind, DROP COLUMN expires_at")
        await db.execute("DELETE FROM pg_task_schema WHERE version >= 12")
        old = {
            '{"Invoice":{"Send":null}}': "17",
            '{"Reminder":{"Send":null}}': "Invoice/17",
            '{"a/b":{"Run":null}}': "k",
            "[]": "Invoice/18",
            '{"Invoice":{"Pay":null}}': "18",
            f'{{"{named}":{{"Run":null}}}}': long,
        }
        await db.executemany("INSERT INTO pg_task (step, key) VALUES ($1, $2)", list(old.items()))
        await migrate(dsn)
        found = dict(map(tuple, await db.fetch("SELECT step, key FROM pg_task")))
        assert [found[step] for step in old] == [
            *("Invoice/17", "Reminder/Invoice/17", "a%2Fb/k", "%/Invoice/18", "Invoice/18", f"%/{long}")
        ]

    play(dsn, scenario)
