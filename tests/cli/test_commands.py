"""`pgtask`: its usage, and the commands about the database and the server; some run as real processes."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fix_commands import UNKNOWN_ID, Command, Said, insert, process, query, with_connection
from greeter import APP, HELLO

import pgtask
from pgtask._cli.commands import psql
from pgtask._cli.main import main
from pgtask._postgres.migrate import migration_sql

# --- usage


def test_commands_have_help_and_pgtask_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ["migrate", "enqueue", "list", "show", "retry", "cancel", "stats", "stop", "graph", "psql"]:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"usage: pgtask {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage: pgtask [-h]" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pgtask {pgtask.__version__}\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("frobnicate", "there is no command 'frobnicate'; there are migrate, verify, psql, stop, completion, "),
        ("list --limit 0", "0 is not from 1 to 10000 (see pgtask list --help)"),
        ("list --limit many", "many"),
        ("list --parked", "unrecognized arguments: --parked; did you mean --state parked? (see pgtask list --help)"),
        ("show 01234567 --parked", "unrecognized arguments: --parked (see pgtask show --help)"),
        ("list --state running", "running"),
        ("list --after nonsense", "--after nonsense"),
        ("list --after ready.0.99999999999999999999999.0.1.default", "--after"),
        ("list --task A --step B.C", "--task A has no step B.C"),
        ("show", "ID"),
        ("show 0192", "0192 is not an id"),
        ("show xyzxyzxyz", "xyzxyzxyz is not an id"),
        ("retry", "give IDs, a filter such as --task, or --all"),
        ("retry --limit 3 00000000-0000-4000-8000-000000000000", "give either IDs or filters, not both"),
        ("retry --parked 00000000-0000-4000-8000-000000000000", "give either IDs or filters, not both"),
        ("retry 0192345", "0192345 is not an id, nor the first 8 or more digits of one"),
        ("cancel xyzxyzxyz", "xyzxyzxyz is not an id, nor the first 8 or more digits of one"),
        ("cancel", "ID"),
        ("stop --server", "another database is configured"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    words: str, complaint: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTASK_DSN", "postgresql://nobody@127.0.0.1:1/nowhere")
    said = command(*words.split())
    assert (said.code, said.out) == (2, "")
    assert complaint in said.err
    assert said.err.count("\n") == 1


def test_a_database_that_is_away_is_one_line_and_exit_5(command: Command) -> None:
    said = command("list", "--dsn", "postgresql://u:secret@127.0.0.1:1/x")
    assert (said.code, said.out) == (5, "")
    assert said.err.startswith("pgtask: cannot reach the database: ")
    assert "secret" not in said.err


def test_missing_schema_names_the_command_to_run(empty_dsn: str, command: Command) -> None:
    for words in (
        ["list"],
        ["stats"],
        ["show", "01234567"],
        ["retry", "--parked"],
        ["cancel", UNKNOWN_ID],
        ["enqueue", APP, "SayHello"],
    ):
        said = command(*words, "--dsn", empty_dsn)
        assert (said.code, said.out) == (5, "")
        name = urlsplit(empty_dsn).path[1:]
        remedy = f"pgtask migrate --dsn {shlex.quote(empty_dsn)}"
        assert said.err == f"pgtask: the database {name} has no pg_task table; run: {remedy}\n"


def test_enqueue_refuses_the_schema_of_another_version(database: str, command: Command) -> None:
    query(database, "INSERT INTO pg_task_schema (version) VALUES (1000)")
    said = command("enqueue", APP, "SayHello")
    assert (said.code, said.out) == (5, "")
    assert "is at version 1000" in said.err
    assert query(database, "SELECT count(*) FROM pg_task") == [(0,)]


def test_unreachable_database_names_its_source(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:secret@127.0.0.1:1/x")
    assert command("list").err.endswith(" [DATABASE_URL: postgresql://u:***@127.0.0.1:1/x]\n")
    monkeypatch.setenv("DATABASE_URL", "host=/tmp dbname=x")
    assert command("list").code == 2


# --- migrate


def test_migrate_says_what_it_did(empty_dsn: str, command: Command) -> None:
    said = command("migrate", "--dsn", empty_dsn)
    assert said.code == 0
    assert "created the table pg_task" in said.out
    assert command("migrate", "--dsn", empty_dsn) == (0, "the schema is up to date\n", "")
    assert query(empty_dsn, "SELECT count(*) FROM pg_task") == [(0,)]


def test_migrate_sql_needs_no_database(command: Command) -> None:
    assert command("migrate", "--sql", "--dsn", "postgresql://127.0.0.1:1/x") == (0, migration_sql(), "")
    assert command("migrate", "--sql", "--keep-pg-task").out == migration_sql(keep_pg_task=True)


# --- stop, psql and the embedded server


def test_stop_tells_all_workers_even_of_a_foreign_table(empty_dsn: str, command: Command) -> None:
    async def listen(connection: Any) -> tuple[Said, str]:
        heard: asyncio.Queue[str] = asyncio.Queue()
        await connection.add_listener("pg_task_changed", lambda *said: heard.put_nowait(said[3]))
        said = await asyncio.to_thread(command, "stop", "--dsn", empty_dsn)
        payload = await asyncio.wait_for(heard.get(), 10)
        await connection.reset()
        return said, payload

    said, payload = with_connection(empty_dsn, listen)
    assert payload == "stop_worker"
    assert (said.code, said.err) == (0, "")
    assert said.out == "told all workers, on every host, to finish their running steps and exit\n"


def test_the_embedded_server_is_started_prepared_and_ended(command: Command, tmp_path: Path) -> None:
    nothing = (0, "the embedded PostgreSQL was not running\n", "")
    assert command("stop", "--server") == nothing
    assert command("stop").out == "the embedded PostgreSQL is not running, so no worker is working\n"
    assert not (tmp_path / ".pgtask").exists()
    try:
        said = command("enqueue", APP, "SayHello")
        where = f"starting a new embedded PostgreSQL in {tmp_path / '.pgtask'} (to stop it: pgtask stop --server)"
        assert (said.code, said.err) == (0, f"pgtask: {where}\n")
        assert len(command("list", "--json").objects) == 1
        child = process("psql", "-Atc", "SELECT step FROM pg_task")
        assert child.communicate(timeout=60) == ('{"Greeter":{"SayHello":{"name":"world"}}}\n', "")
        assert command("stop") == (
            0,
            "no worker listens on this database, so there was none to stop; "
            "workers with --no-listen do not receive this: end their supervisors\n",
            "",
        )
        assert command("stop", "--server") == (0, "the embedded PostgreSQL has stopped\n", "")
        again = f"pgtask: {where.replace('a new', 'the')}\n"
        assert command("show", "0" * 32).err.startswith(again), "what is there is started, also to look at it"
    finally:
        said = command("stop", "--server")
    assert said == (0, "the embedded PostgreSQL has stopped\n", "")
    assert command("stop", "--server") == nothing


@pytest.mark.parametrize(
    ("dsn", "shown", "password"),
    [
        ("postgresql://h/db", "postgresql://h/db", None),
        ("postgresql:///db?host=/run/pg&user=me", "postgresql:///db?host=/run/pg&user=me", None),
        ("postgres://me:s%40f%3At@h:5432/db?sslmode=require", "postgres://me@h:5432/db?sslmode=require", "s@f:t"),
        ("postgresql:///db?password=a%26b&host=%2Frun%2Fpg", "postgresql:///db?host=%2Frun%2Fpg", "a&b"),
        ("postgresql://me:x@a:1,b:2/db", "postgresql://me@a:1,b:2/db", "x"),
        ("postgresql://me:@h/db", "postgresql://me@h/db", ""),
    ],
)
def test_psql_gets_the_password_out_of_sight(
    dsn: str, shown: str, password: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "psql"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "${PGPASSWORD-unset}"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    child = process("psql", "--dsn", dsn, "-c", "SELECT 1; --", "--help", "-h")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert out.splitlines() == [
        f"--dbname={shown}",
        *("-c", "SELECT 1; --", "--help", "-h"),
        "unset" if password is None else password,
    ]


def test_psql_on_a_real_server(database: str) -> None:
    insert(database)
    child = process("psql", "--", "-Atc", "SELECT step FROM pg_task")
    assert child.communicate(timeout=60) == (f"{HELLO}\n", "")


def test_no_psql_anywhere_is_one_line(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(psql, "binary", _no_binary)
    said = command("psql", "--dsn", "postgresql://h/db")
    assert said.code == 5
    assert "there is no psql on the path" in said.err


def _no_binary(name: str) -> Path:
    raise pgtask.errors.EmbeddedError(f"there is no {name}")


@pytest.mark.parametrize(
    ("words", "ours", "theirs"),
    [
        ("psql", "psql", ""),
        ("psql -c x", "psql", "-c x"),
        ("psql --dsn D -c x", "psql --dsn D", "-c x"),
        ("psql --dsn=D x --dsn E", "psql --dsn=D --dsn E", "x"),
        ("psql -c x --dsn E -- --dsn F", "psql --dsn E", "-c x --dsn F"),
        ("psql -c x --help", "psql", "-c x --help"),
        ("psql -- --dsn E", "psql", "--dsn E"),
        ("psql --dsn", "psql --dsn", ""),
    ],
)
def test_the_words_of_psql_are_its_own(words: str, ours: str, theirs: str) -> None:
    assert psql.split_words(words.split()) == (ours.split(), theirs.split())


# --- as a process


def test_reader_that_leaves_causes_no_error(database: str) -> None:
    query(database, "INSERT INTO pg_task (step) SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
    child = process("list", "--json", "--limit", "2000")
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline().startswith('{"id":')
    child.stdout.close()
    assert (child.wait(60), child.stderr.read()) == (141, "")
    child.stderr.close()


def test_interrupt_exits_130_without_output(database: str) -> None:
    async def interrupt(connection: Any) -> None:
        async with connection.transaction():
            await connection.execute("LOCK TABLE pg_task IN ACCESS EXCLUSIVE MODE")
            child = process("list")
            waiting = "SELECT FROM pg_stat_activity WHERE application_name = 'pgtask list' AND wait_event_type = 'Lock'"
            while not await connection.fetch(waiting):
                await connection.execute("SELECT pg_stat_clear_snapshot()")
            child.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(child.communicate, timeout=60) == ("", "")
            assert child.returncode == 130

    with_connection(database, interrupt)
