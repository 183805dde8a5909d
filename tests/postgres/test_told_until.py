"""The time until which each write notifies: it depends on no DateStyle, of the migration or of the writer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from schema_kit import notified, payloads, play

from pgtask._postgres.migrate import check_schema, migrate, migration_sql

STYLES = ("ISO, MDY", "SQL, DMY", "SQL, MDY", "German", "Postgres, YMD")
INSERT = "INSERT INTO pg_task (step) VALUES ('{}')"
ARGUMENTS = """
    SELECT tgname::text, split_part(encode(tgargs, 'escape'), '\\000', 1) AS argument
    FROM pg_trigger
    WHERE tgfoid = 'pg_task_notify'::regproc AND tgnargs > 0
    ORDER BY tgname"""
NAMES = ["pg_task_inserted", "pg_task_rescheduled"]


async def arguments(db: Any) -> list[str]:
    """The argument of each trigger that has one."""
    rows = await db.fetch(ARGUMENTS)
    assert [name for name, _ in rows] in ([], NAMES)
    return [argument for _, argument in rows]


async def set_argument(db: Any, argument: str) -> None:
    """Give both triggers this argument, as another migration might have."""
    for name in NAMES:
        definition = await db.fetchval("SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = $1", name)
        head, _, _ = definition.replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER").rpartition("(")
        await db.execute(f"{head}('{argument}')")


async def set_style(db: Any, style: str) -> None:
    """Set the DateStyle of all later sessions of this database."""
    await db.execute(f"ALTER DATABASE {await db.fetchval('SELECT current_database()')} SET datestyle = '{style}'")


async def write_in_each_style(dsn: str, *, told: bool) -> None:
    """Insert in each DateStyle, beside a listener that does not say that it sleeps."""
    for style in STYLES:
        db = await asyncpg.connect(dsn, server_settings={"datestyle": style})
        try:
            assert bool(await payloads(dsn, lambda db=db: db.execute(INSERT))) == told, style  # type: ignore[misc]
        finally:
            await db.close()


@pytest.mark.parametrize("style", STYLES)
def test_time_means_the_same_in_each_datestyle(dsn: str, style: str) -> None:
    async def scenario(db: Any) -> None:
        await set_style(db, style)
        await db.execute("DELETE FROM pg_task_schema WHERE version > 8")
        before = await db.fetchval("SELECT now()")
        await migrate(dsn)
        first, second = await arguments(db)
        assert first == second
        until = await db.fetchval("SELECT $1::text::timestamptz", first)
        assert timedelta(hours=23) < until - before < timedelta(hours=25)
        await write_in_each_style(dsn, told=True)
        assert await migrate(dsn) == []

    play(dsn, scenario)


@pytest.mark.parametrize(
    ("argument", "told"), [("infinity", True), ("2026-01-31T12:00:00Z", False), ("9026-01-31T12:00:00Z", True)]
)
def test_argument_is_a_time_or_infinity(dsn: str, argument: str, told: bool) -> None:
    async def scenario(db: Any) -> None:
        await set_argument(db, argument)
        await write_in_each_style(dsn, told=told)
        assert await migrate(dsn, keep_pg_task=argument == "infinity") == []
        assert await arguments(db) == [argument] * 2

    play(dsn, scenario)


def test_time_is_compared_in_utc(dsn: str) -> None:
    """Whatever the time zone of the session is."""

    async def scenario(db: Any) -> None:
        for zone in ("Pacific/Kiritimati", "Etc/GMT+12"):
            await db.execute(f"SET timezone = '{zone}'")
            for minutes in (-5, 5):
                at = await db.fetchval("SELECT now()") + timedelta(minutes=minutes)
                await set_argument(db, f"{at:%Y-%m-%dT%H:%M:%SZ}")
                assert bool(await payloads(dsn, lambda: db.execute(INSERT))) == (minutes > 0)

    play(dsn, scenario)


@pytest.mark.parametrize("argument", ["30.11.2026 09:00:00+00", "2026-11-30 09:00:00+00", "11/30/2026 09:00:00+00"])
@pytest.mark.parametrize("how", ["migrate", "migrate and keep", "script"])
def test_argument_of_another_form_is_rewritten(dsn: str, how: str, argument: str) -> None:
    async def scenario(db: Any) -> None:
        await set_argument(db, argument)
        await db.execute(INSERT)
        if how == "script":
            await db.execute(
                migration_sql().partition("BEGIN ISOLATION LEVEL READ COMMITTED;")[2].replace("COMMIT;", "")
            )
        else:
            done = await migrate(dsn, keep_pg_task=how == "migrate and keep")
            assert any("each write notifies, until" in line for line in done)
            assert await migrate(dsn, keep_pg_task=how == "migrate and keep") == []
        first, second = await arguments(db)
        assert first == second
        assert first == "infinity" if how == "migrate and keep" else first.endswith("Z")
        await write_in_each_style(dsn, told=True)

    play(dsn, scenario)


def test_worker_names_an_argument_of_another_form(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(db: Any) -> None:
        await set_argument(db, "30.11.2026 09:00:00+00")
        await check_schema(db)

    play(dsn, scenario)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "trigger pg_task_inserted, trigger pg_task_rescheduled" in said


def test_table_without_an_argument_notifies_sleepers_only(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        assert await arguments(db) == []
        await write_in_each_style(dsn, told=False)
        assert await notified(dsn, lambda: db.execute(INSERT)) == 1

    play(dsn, scenario)
