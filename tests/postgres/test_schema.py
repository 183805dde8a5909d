"""The schema itself: what it promises its users, and its repair."""

from __future__ import annotations

import asyncio
import subprocess
from functools import partial
from operator import itemgetter
from typing import Any

import asyncpg
import pytest
from crate import OUR_TRIGGERS, STEP
from schema_kit import catalog, names, notified, payloads, play, psql, tool, with_path

from pgtask._postgres.migrate import check_schema, migrate
from pgtask.errors import SchemaError

# --- what the schema promises the worker


LEASED = ", locked_by = gen_random_uuid(), lock_expires_at = now() + '1 hour', claims = 1"
LEASED_BY_RUST = ", locked_by = gen_random_uuid(), lock_expires_at = now() + '1 hour'"
FREE = ", locked_by = NULL, lock_expires_at = NULL"
WRITES = [
    # what the rows are before, the statement, whether it notifies a worker that sleeps, and workers of pg_task in Rust
    ("", "UPDATE pg_task SET wakeup_at = now() + '1 hour'", False, True),
    ("", "UPDATE pg_task SET wakeup_at = now() + '5 s'", True, True),
    ("", "UPDATE pg_task SET queue = 'other'", True, True),
    ("", "UPDATE pg_task SET priority = 5", True, True),
    (", error = 'no such file'", "UPDATE pg_task SET error = NULL", True, True),
    ("", "UPDATE pg_task SET error = NULL", False, False),
    ("", "UPDATE pg_task SET step = '{\"T\":{}}'", True, True),
    ("", "UPDATE pg_task SET tried = 1", True, True),
    ("", "UPDATE pg_task SET error = 'by hand'", False, True),
    (", error = 'no such file'", "UPDATE pg_task SET error = 'no such directory'", False, False),
    (", error = 'no such file'", "UPDATE pg_task SET wakeup_at = now() + '1 hour'", False, False),
    ("", f"UPDATE pg_task SET claims = 1{LEASED_BY_RUST}", False, False),
    (LEASED_BY_RUST, "UPDATE pg_task SET lock_expires_at = now() + '2 hours'", False, False),
    (LEASED_BY_RUST, f"UPDATE pg_task SET tried = 1, wakeup_at = now() + '1 s'::interval{FREE}", True, True),
    (LEASED_BY_RUST, f"UPDATE pg_task SET tried = 0, step = '{{}}'{FREE}", True, True),
    (LEASED_BY_RUST, f"UPDATE pg_task SET tried = 1, error = 'boom'{FREE}", True, True),
    (LEASED, "UPDATE pg_task SET lock_expires_at = now() + '2 hours'", False, False),
    (LEASED, "UPDATE pg_task SET step = '{}', tried = 0, wakeup_at = now() - '1 s'::interval", False, False),
    (LEASED, f"UPDATE pg_task SET tried = 1, wakeup_at = now() + '1 s'::interval{FREE}", False, False),
    (LEASED, f"UPDATE pg_task SET error = 'boom', wakeup_at = now() - '1 s'::interval{FREE}", False, False),
    (LEASED, "DELETE FROM pg_task", False, False),
    ("", "INSERT INTO pg_task (step) VALUES ('{}')", True, True),
    ("", "INSERT INTO pg_task (step, wakeup_at) VALUES ('{}', now() + '1 hour')", False, True),
    ("", "INSERT INTO pg_task (step, wakeup_at) VALUES ('{}', now() + '5 s')", True, True),
    ("", "INSERT INTO pg_task (step, error) VALUES ('{}', 'by hand')", False, True),
    ("", "INSERT INTO pg_task SELECT * FROM pg_task ON CONFLICT DO NOTHING", False, False),
]


@pytest.mark.parametrize(("before", "write", "tells", "tells_rust"), WRITES)
def test_writes_of_people_notify_and_those_of_workers_do_not(
    dsn: str, before: str, write: str, tells: bool, tells_rust: bool
) -> None:
    async def scenario(db: Any) -> None:
        async def prepare() -> None:
            await db.execute("TRUNCATE pg_task; INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 3)")
            await db.execute(f"UPDATE pg_task SET step = '{{}}'{before}")

        await prepare()
        assert await notified(dsn, lambda: db.execute(write)) == tells
        await migrate(dsn, keep_pg_task=True)
        await prepare()
        assert bool(await payloads(dsn, lambda: db.execute(write))) == tells_rust

    play(dsn, scenario)


@pytest.mark.parametrize("channel", ["pg_task_changed", "pg_task_error"])
@pytest.mark.parametrize("switch", ["off", "OFF", "false", "no"])
def test_writer_may_switch_notifications_off(dsn: str, switch: str, channel: str) -> None:
    async def scenario(db: Any) -> None:
        async def write() -> None:
            await db.execute("INSERT INTO pg_task (step) VALUES ('{}')")
            await db.execute("UPDATE pg_task SET error = 'by hand'")
            await db.execute("DELETE FROM pg_task")

        assert await notified(dsn, write, channel) > 0
        await db.execute(f"SET pgtask.notify = {switch}")
        assert await notified(dsn, write, channel) == 0
        await db.execute("RESET pgtask.notify")
        assert await notified(dsn, write, channel) > 0

    play(dsn, scenario)


def test_ids_and_times_of_one_insert_are_ordered(shaped: str) -> None:
    """On PostgreSQL 18; before that, ids are random."""

    async def scenario(db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step) SELECT n FROM generate_series(1, 1000) AS n")
        rows = await db.fetch("SELECT id, wakeup_at FROM pg_task ORDER BY step::int")
        assert rows == sorted(rows, key=itemgetter("wakeup_at"))
        if db.get_server_version().major >= 18:
            assert rows == sorted(rows, key=itemgetter("id"))

    play(shaped, scenario)


def test_inserting_statement_sends_one_notification(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        rows = [(STEP,)] * 1000
        copy = partial(db.copy_records_to_table, "pg_task", records=rows, columns=["step"])
        assert await notified(dsn, copy) == 1
        insert = "INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 1000)"
        # The server merges those of one transaction: count the calls of the trigger.
        async with db.transaction():
            await db.execute("SET LOCAL track_functions = 'all'")
            await db.execute(insert)
            await db.execute(insert)
            calls = await db.fetchval("SELECT pg_stat_get_xact_function_calls('pg_task_notify'::regproc)")
        assert calls == 2

    play(dsn, scenario)


def test_next_step_under_the_lease_is_a_hot_update(dsn: str) -> None:
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


def test_key_is_live_at_most_once(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        insert = "INSERT INTO pg_task (step, key) VALUES ('{}', $1)"
        await db.execute(insert, "once")
        await db.execute(insert, None)
        await db.execute(insert, None)
        with pytest.raises(asyncpg.UniqueViolationError):
            await db.execute(insert, "once")

    play(dsn, scenario)


# --- repaired


NOT_OURS = "contype <> 'n' AND conname <> 'pg_task_pkey'"  # inspect.sql refuses a table without its primary key
OBJECTS = f"""
    SELECT format('DROP TABLE %s', oid::regclass) FROM pg_class
    WHERE relname LIKE 'pg_task%' AND relkind = 'r' AND relname NOT IN ('pg_task', 'pg_task_schema')
    UNION ALL SELECT format('DROP TRIGGER %s ON %s', tgname, tgrelid::regclass) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT format('ALTER TABLE %2$s DISABLE TRIGGER %1$s', tgname, tgrelid::regclass)
    FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT format('ALTER TABLE %2$s ENABLE REPLICA TRIGGER %1$s', tgname, tgrelid::regclass)
    FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT format('DROP FUNCTION %s CASCADE', oid::regprocedure) FROM pg_proc WHERE proname ~ '^pg_?task'
    UNION ALL SELECT format('ALTER FUNCTION %s RESET search_path', oid::regprocedure) FROM pg_proc
    WHERE proname ~ '^pg_?task' AND proconfig IS NOT NULL
    UNION ALL SELECT format('ALTER FUNCTION %s SECURITY INVOKER', oid::regprocedure) FROM pg_proc
    WHERE proname LIKE 'pg_task%' AND prosecdef
    UNION ALL SELECT format('ALTER FUNCTION %s OWNER TO pg_monitor', oid::regprocedure) FROM pg_proc
    WHERE proname LIKE 'pg_task%' AND prosecdef
    UNION ALL SELECT format('DROP INDEX %s', indexrelid::regclass) FROM pg_index
    JOIN pg_class ON pg_class.oid = indexrelid
    WHERE relname LIKE 'pg_task%' AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
    UNION ALL SELECT format('UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text = %L', relname)
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE relname LIKE 'pg_task%' AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
    UNION ALL SELECT format('ALTER TABLE %s DROP CONSTRAINT %s', conrelid::regclass, conname)
    FROM pg_constraint WHERE conrelid::regclass::text LIKE 'pg_task%' AND {NOT_OURS}
    UNION ALL SELECT format('ALTER TABLE %s ALTER %s DROP DEFAULT', attrelid::regclass, attname)
    FROM pg_attribute WHERE attrelid::regclass::text LIKE 'pg_task%' AND atthasdef
"""


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["some", "each"])
def test_missing_object_is_reported_and_repaired(dsn: str, caplog: pytest.LogCaptureFixture, each: bool) -> None:
    """Each thing that the catalog has of ours, by itself; or every eighth."""

    async def scenario(db: Any) -> None:
        before = await catalog(db)
        losses = [row[0] for row in await db.fetch(OBJECTS)]
        assert len(losses) > 80
        for loss in losses if each else losses[::8]:
            caplog.clear()
            await db.execute(loss)
            await check_schema(db)
            assert "schema.damaged missing=" in caplog.text, loss
            assert 'remedy="pgtask migrate"' in caplog.text
            said = await migrate(dsn)
            assert said, loss
            assert said[-1].startswith("repaired: "), loss
            assert await catalog(db) == before, loss
            assert await migrate(dsn) == []

    play(dsn, scenario)


def test_revoked_right_is_no_damage(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    public = "SELECT count(*) FROM pg_class, aclexplode(relacl) WHERE relname LIKE 'pg_task%' AND grantee = 0"

    async def scenario(db: Any) -> None:
        assert await db.fetchval(public) == 8
        await db.execute(
            "REVOKE SELECT ON pg_task_stops, pg_task_schema, pg_task_pauses, pg_task_actions, "
            "pg_task_limits, pg_task_limit_keys, pg_task_schedules, pg_task_groups FROM PUBLIC"
        )
        await check_schema(db)
        assert caplog.text == ""
        assert await migrate(dsn) == []
        await db.execute("DROP TRIGGER pg_task_touched ON pg_task")
        assert await migrate(dsn) == ["repaired: trigger pg_task_touched"]
        assert await db.fetchval(public) == 0

    play(dsn, scenario)


def test_intact_schema_gives_no_warning(shaped: str, caplog: pytest.LogCaptureFixture) -> None:
    play(shaped, check_schema)
    assert caplog.text == ""


def test_restore_without_functions_is_repaired(dsn: str, empty_dsn: str) -> None:
    """`pg_dump -t` dumps no functions, so the restore makes no triggers."""
    dump = subprocess.run(
        [tool("pg_dump"), "--dbname", dsn, "--table", "pg_task*"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip

    async def scenario(db: Any) -> None:
        await asyncio.to_thread(psql, empty_dsn, dump.stdout)
        assert await names(db, "trigger") == set()
        said = await migrate(empty_dsn)
        assert all(trigger in said[-1] for trigger in OUR_TRIGGERS)
        assert await names(db, "trigger") == OUR_TRIGGERS
        assert await notified(empty_dsn, lambda: db.execute("INSERT INTO pg_task (step) VALUES ('{}')")) == 1

    play(empty_dsn, scenario)


def test_renamed_schema_is_repaired(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute('CREATE SCHEMA one; CREATE SCHEMA "Two words"; DROP SCHEMA "Two words"')
        await migrate(with_path(empty_dsn, "one"))
        await db.execute('ALTER SCHEMA one RENAME TO "Two words"; SET search_path = "Two words"')
        said = await migrate(with_path(empty_dsn, '"Two%20words"'))
        named = ("pg_task_run_parked()", "pg_task_run_revived()", "pg_task_stop()", "pgtask_cancel(uuid)")
        assert all(function in said[-1] for function in named)
        assert await migrate(with_path(empty_dsn, '"Two%20words"')) == []

    play(empty_dsn, scenario)


def test_unrepairable_object_is_named(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("DROP INDEX pg_task_lease_idx; CREATE TABLE pg_task_lease_idx (mine int)")
        with pytest.raises(SchemaError, match="cannot make index pg_task_lease_idx"):
            await migrate(dsn)

    play(dsn, scenario)


@pytest.mark.parametrize(
    ("obstacle", "said"),
    [
        ("DROP TABLE pg_task_stops; CREATE VIEW pg_task_stops AS SELECT 1", "table pg_task_stops.*; rename or drop"),
        ("DROP TABLE pg_task_archive; CREATE SEQUENCE pg_task_archive", r'table pg_task_archive.*; rename or drop'),
        ("DROP TABLE pg_task_runs; CREATE VIEW pg_task_runs AS SELECT 1", "table pg_task_runs.*; rename or drop"),
        ("DROP TABLE pg_task_signals; CREATE TABLE pg_task_signals (a int)", "pg_task_signals_run.*; rename or drop"),
        (
            "DROP FUNCTION pg_task_stop; CREATE FUNCTION pg_task_stop() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            r"function pg_task_stop\(\).*; rename or drop",
        ),
        (
            "DROP INDEX pg_task_key_idx; INSERT INTO pg_task (step, key) VALUES ('{}', 'twice'), ('{}', 'twice')",
            r'"pg_task_key_idx": Key .*twice.* is duplicated; change or remove these rows',
        ),
        (
            "ALTER TABLE pg_task DROP CONSTRAINT pg_task_lease_state_check;"
            "INSERT INTO pg_task (step, lock_expires_at) VALUES ('{}', now())",
            r'"pg_task_lease_state_check" .*; change or remove these rows',
        ),
    ],
)  # fmt: skip
def test_conflict_of_a_migration_is_named(dsn: str, obstacle: str, said: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(obstacle)
        before = await catalog(db)
        with pytest.raises(SchemaError, match=f"cannot migrate, nothing was changed: .*{said}.*run: pgtask migrate$"):
            await migrate(dsn)
        assert await catalog(db) == before

    play(dsn, scenario)


def test_any_role_may_check_the_schema(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("SET ROLE pg_monitor")
        await check_schema(db)

    play(dsn, scenario)
