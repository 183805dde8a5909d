"""`pgtask verify`: each difference of the schema is named, and repaired without a loss."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, NamedTuple

import asyncpg
import fleet
import pytest
from fix_checked import trigger_runs
from fix_commands import Command, insert, query
from fix_database import run
from schema_kit import catalog, play, with_path

from pgtask._postgres.migrate import migrate
from pgtask._postgres.verify import MANIFEST, WORKER, find_differences, read_live


@pytest.mark.parametrize("keep", [False, True])
def test_manifest_is_what_the_migrations_make(empty_dsn: str, keep: bool) -> None:
    run(migrate(empty_dsn, keep_pg_task=keep))
    live = play(empty_dsn, read_live)
    made = [tuple(thing) for thing in json.loads(MANIFEST.read_text())]
    assert {tuple(thing[:4]) for thing in live} >= set(made), "run ci/manifest after a change of a migration"
    assert keep or len(live) == len(made)


def test_schema_of_each_origin_is_as_it_should_be(shaped: str) -> None:
    assert play(shaped, find_differences) == []


class Damage(NamedTuple):
    """A statement that damages the schema, and the difference that it makes."""

    sql: str
    named: str
    is_repaired: bool = True


async def _execute(sql: str, db: Any) -> None:
    await db.execute(sql)


NEW_BODY = "CREATE OR REPLACE FUNCTION pg_task_touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
DAMAGES = [
    Damage("DROP TABLE pg_task_checkpoints", "table pg_task_checkpoints is missing"),
    Damage("ALTER TABLE pg_task DROP COLUMN progress", "column pg_task.progress is missing"),
    Damage("ALTER TABLE pg_task ALTER queue SET DEFAULT 'x'", "default of pg_task.queue is 'x'::text, not 'default'"),
    Damage("ALTER TABLE pg_task ALTER claims DROP DEFAULT", "default of pg_task.claims is missing"),
    Damage(NEW_BODY, "function pg_task_touch() has another body"),
    Damage("ALTER FUNCTION pg_task_family(text) VOLATILE", "function pg_task_family(step text) is"),
    Damage("DROP FUNCTION pgtask_cancel", "function pgtask_cancel(task uuid) is missing"),
    Damage("ALTER TABLE pg_task DISABLE TRIGGER pg_task_touched", "trigger pg_task_touched is disabled"),
    Damage(
        "CREATE OR REPLACE TRIGGER pg_task_touched AFTER DELETE ON pg_task EXECUTE FUNCTION pg_task_touch()",
        "trigger pg_task_touched is CREATE TRIGGER",
    ),
    Damage("DROP TRIGGER pg_task_run_parked ON pg_task", "trigger pg_task_run_parked is missing"),
    Damage("DROP INDEX pg_task_key_idx", "index pg_task_key_idx is missing"),
    Damage(
        "DROP INDEX pg_task_ready_idx; CREATE INDEX pg_task_ready_idx ON pg_task (queue)",
        "index pg_task_ready_idx is CREATE INDEX",
    ),
    Damage(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pg_task_lease_idx'::regclass",
        "index pg_task_lease_idx is not valid",
    ),
    Damage("ALTER TABLE pg_task DROP CONSTRAINT pg_task_lease_state_check", "constraint pg_task_lease_state_check is"),
    Damage("COMMENT ON COLUMN pg_task.step IS NULL", "comment of pg_task.step is missing"),
    Damage("COMMENT ON FUNCTION pgtask_signal IS 'x'", "comment of pgtask_signal() differs"),
    Damage(
        "ALTER TABLE pg_task ALTER expires_at TYPE timestamp",
        "column pg_task.expires_at is timestamp without time zone, not timestamp with time zone; "
        "run: ALTER TABLE pg_task ALTER expires_at TYPE timestamp with time zone "
        "USING expires_at::timestamp with time zone",
        is_repaired=False,
    ),
    Damage(
        "ALTER TABLE pg_task ALTER queue DROP NOT NULL",
        "column pg_task.queue is text, not text NOT NULL; run: ALTER TABLE pg_task ALTER queue SET NOT NULL",
        is_repaired=False,
    ),
    Damage(
        "ALTER TABLE pg_task_archive SET UNLOGGED",
        "table pg_task_archive is unlogged, not logged; run: ALTER TABLE pg_task_archive SET LOGGED",
        is_repaired=False,
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.named.partition(" is")[0])
def test_difference_is_named_and_repaired(database: str, command: Command, damage: Damage) -> None:
    before = play(database, catalog)
    task = insert(database, error="'boom'")
    play(database, partial(_execute, damage.sql))
    said = command("verify")
    assert (said.code, said.err.startswith("pgtask: 1 difference")) == (1, True)
    assert said.out.startswith(damage.named)
    repaired = command("verify", "--repair")
    if damage.is_repaired:
        assert (repaired.code, repaired.err) == (0, "pgtask: 1 repaired; the schema is as it should be\n")
        assert repaired.out.startswith(f"repaired: {damage.named.partition(' is ')[0].partition(' has ')[0]}"[:20])
        assert _without_order(play(database, catalog)) == _without_order(before)
    else:
        assert (repaired.code, repaired.out) == (1, said.out)
        query(database, said.out.strip().partition("; run: ")[2])
    assert command("verify").code == 0
    assert query(database, "SELECT id::text, error FROM pg_task") == [(task, "boom")]


def _without_order(found: dict[str, list[str]]) -> dict[str, set[str]]:
    """Leave out the numbers of the columns, and the validity that a rebuilt index has too."""
    return {name: set(lines) for name, lines in found.items() if name not in ("comments",)}


@pytest.mark.parametrize("broken", ["missing", "different", "not valid"])
def test_key_that_two_tasks_have_is_named_with_its_remedy(database: str, command: Command, broken: str) -> None:
    """And no index is left behind that is not valid."""
    query(database, "DROP INDEX pg_task_key_idx")
    tasks = [insert(database, key="'Greeter/a'") for _ in range(2)]
    if broken == "different":
        query(database, "CREATE INDEX pg_task_key_idx ON pg_task (key) WHERE key IS NOT NULL")
    elif broken == "not valid":
        with pytest.raises(asyncpg.UniqueViolationError):
            query(database, "CREATE UNIQUE INDEX CONCURRENTLY pg_task_key_idx ON pg_task (key) WHERE key IS NOT NULL")
    before = query(database, INDEXES)
    for _ in range(2):
        said = command("verify", "--repair")
        assert (said.code, said.out) == (5, "")
        assert "pg_task_key_idx: Key (key)=(Greeter/a) is duplicated; several tasks have one key" in said.err
        assert said.err.endswith("(pgtask cancel ID), then run: pgtask verify --repair\n")
        assert query(database, INDEXES) == before
    assert command("cancel", tasks[0]).code == 0
    assert command("verify", "--repair").code == 0


INDEXES = """
    SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indrelid = 'pg_task'::regclass ORDER BY 1
"""


def test_many_differences_are_repaired_at_once(database: str, command: Command) -> None:
    for damage in DAMAGES[1:]:
        if damage.is_repaired:
            play(database, partial(_execute, damage.sql))
    assert command("verify", "--repair", "--json").code == 0
    assert command("verify", "--json") == (0, "", "")


def test_verify_changes_nothing_and_needs_no_right(database: str, command: Command) -> None:
    query(database, "COMMENT ON TABLE pg_task IS 'mine'")
    query(database, "CREATE ROLE looks LOGIN")
    try:
        dsn = database.replace("postgres@", "looks@") + "&options=-cdefault_transaction_read_only%3Don"
        said = command("verify", "--dsn", dsn)
        assert said.code == 1
        assert "comment of pg_task differs\n" in said.out
        assert "table pg_task is not for the role; run: GRANT SELECT, INSERT, UPDATE, DELETE ON public.pg_task TO" in (
            said.out
        )
        assert query(database, "SELECT obj_description('pg_task'::regclass)") == [("mine",)]
        refused = command("verify", "--repair", "--dsn", dsn)
        assert refused.code == 5, "a role without rights repairs nothing"
    finally:
        query(database, "DROP OWNED BY looks")
        query(database, "DROP ROLE looks")


def test_grants_that_verify_names_are_enough_for_a_worker(database: str, command: Command) -> None:
    query(database, "CREATE ROLE works LOGIN")
    try:
        missing = command("verify", "--role", "works", "--json").objects
        assert {one["thing"] for one in missing} >= {f"table {table}" for table in WORKER} - {
            "table pg_task_schema",
            "table pg_task_stops",
            "table pg_task_pauses",
        }
        for one in missing:
            query(database, one["remedy"])
        assert command("verify", "--role", "works").code == 0
        dsn = database.replace("postgres@", "works@")
        run(trigger_runs(dsn))
        fleet.burst(dsn, app="checked:app_before")
        assert query(database, "SELECT count(*) FROM pg_task WHERE error IS NOT NULL") == [(0,)]
        assert query(database, "SELECT count(*) FROM pg_task_checkpoints") == [(10,)]
        assert command("list", "--dsn", dsn).code == 0
    finally:
        query(database, "DROP OWNED BY works")
        query(database, "DROP ROLE works")


def test_grants_of_an_operator_are_enough_for_each_command(database: str, command: Command) -> None:
    query(database, "CREATE ROLE operates LOGIN")
    try:
        for one in command("verify", "--operator", "--role", "operates", "--json").objects:
            query(database, one["remedy"])
        assert command("verify", "--operator", "--role", "operates").code == 0
        dsn = database.replace("postgres@", "operates@")
        for words in (
            ("pause", "reports"),
            ("resume", "reports"),
            ("retry", "--all"),
            ("cancel", "--all"),
            ("prune", "--older-than", "0"),
            ("prune", "--older-than", "0", "--runs", "--parked"),
        ):
            said = command(*words, "--dsn", dsn)
            assert (said.code, said.err) == (0, ""), words
    finally:
        query(database, "DROP OWNED BY operates")
        query(database, "DROP ROLE operates")


def test_reader_needs_less_than_a_worker(database: str, command: Command) -> None:
    query(database, "CREATE ROLE reads")
    try:
        query(database, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reads")
        assert command("verify", "--role", "reads", "--reader").code == 0
        assert command("verify", "--role", "reads").code == 1
    finally:
        query(database, "DROP OWNED BY reads")
        query(database, "DROP ROLE reads")


def test_schema_with_a_name_of_its_own_is_verified(empty_dsn: str, command: Command) -> None:
    async def make(db: Any) -> None:
        await db.execute('CREATE SCHEMA "my tasks"')

    play(empty_dsn, make)
    dsn = with_path(empty_dsn, '"my tasks"'.replace('"', "%22").replace(" ", "%20"))
    run(migrate(dsn))
    assert command("verify", "--dsn", dsn).code == 0
    query(empty_dsn, 'DROP INDEX "my tasks".pg_task_ready_idx')
    query(empty_dsn, 'DROP TRIGGER pg_task_touched ON "my tasks".pg_task')
    assert command("verify", "--repair", "--dsn", dsn).code == 0


def test_wrong_use_of_verify_is_one_line(database: str, empty_dsn: str, command: Command) -> None:
    assert command("verify", "--role", "missing").code == 2
    assert command("verify", "--dsn", empty_dsn).code == 5
    query(database, "INSERT INTO pg_task_schema (version) VALUES (9999)")
    assert "is at version 9999" in command("verify").err
    query(database, "DELETE FROM pg_task_schema WHERE version > 5")
    assert "run: pgtask migrate" in command("verify").err
