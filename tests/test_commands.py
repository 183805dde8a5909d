"""`pgtask`: what each command says and does, on a real database; a few of them as real processes."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import pytest
from conftest import run

import pgtask
from pgtask import App, Context, Done, Next, Task
from pgtask._cli import arguments, change, look, psql, report
from pgtask._cli.commands import main
from pgtask._postgres import listing, statistics
from pgtask._postgres.migrate import migration_sql
from pgtask._postgres.store import statement

ROOT = str(Path(__file__).parent.parent)


class Greeter(Task):
    pass


class ReadName(Greeter):
    filename: str
    encoding: str = "utf-8"

    async def run(self, ctx: Context) -> Next[SayHello]:
        return Next(SayHello("you"))


class SayHello(Greeter):
    name: str = "world"

    async def run(self, ctx: Context) -> Done:
        return Done()


class Mailer(Task):
    pass


class Flush(Mailer):
    async def run(self, ctx: Context) -> Done:
        return Done()


class Send(Mailer):
    transparent = True
    address: str

    async def run(self, ctx: Context) -> Done:
        return Done()


class Other(Task):
    pass


def _other_flush() -> type[Task]:
    class Flush(Other):
        async def run(self, ctx: Context) -> Done:
            return Done()

    return Flush


OtherFlush = _other_flush()
app = App(Greeter, Mailer, Other)
APP = f"{__name__}:app"
HELLO = '{"Greeter":{"SayHello":{"name":"you"}}}'


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def cursor(self) -> str | None:
        found = re.search(r"--after (\S+)$", self.err.strip())
        return found and found[1]


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; a complaint is always one line."""

    def call(*words: str) -> Said:
        capsys.readouterr()
        said = Said(main(words), *capsys.readouterr())
        assert all(line.startswith("pgtask: ") for line in said.err.splitlines()), said.err
        return said

    return call


@pytest.fixture
def database(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A migrated database that the commands find."""
    monkeypatch.setenv("PGTASK_DSN", dsn)
    return dsn


def with_connection(dsn: str, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    async def connect_and_work() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await work(connection)
        finally:
            await connection.close()

    return run(connect_and_work())


def query(dsn: str, sql: str, *args: Any) -> list[Any]:
    return [tuple(row) for row in with_connection(dsn, lambda connection: connection.fetch(sql, *args))]


def insert(dsn: str, **columns: str) -> str:
    """Insert one task, its columns given as SQL; returns its id."""
    columns = {"step": f"'{HELLO}'", **columns}
    sql = f"INSERT INTO pg_task ({', '.join(columns)}) VALUES ({', '.join(columns.values())}) RETURNING id::text"
    return str(query(dsn, sql)[0][0])


PARKED = {"error": "'boom'", "tried": "6"}
LEASED = {"locked_by": "gen_random_uuid()", "lock_expires_at": "now() + interval '1 min'", "claims": "1"}
EXPIRED = {**LEASED, "lock_expires_at": "now() - interval '1 min'"}


def process(*words: str, environ: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pgtask", *words],
        env={**os.environ, "PYTHONPATH": ROOT, **(environ or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


# --- usage --------------------------------------------------------------------------------------------------


def test_every_command_has_help_and_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
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
        ("", "COMMAND"),
        ("frobnicate", "frobnicate"),
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
        ("retry", "either IDs or --parked"),
        ("retry --limit 3 00000000-0000-4000-8000-000000000000", "either IDs or --parked"),
        ("retry --parked 00000000-0000-4000-8000-000000000000", "either IDs or --parked"),
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


def test_without_the_schema_the_command_to_run_is_named(empty_dsn: str, command: Command) -> None:
    for words in (
        ["list"],
        ["stats"],
        ["show", "01234567"],
        ["retry", "--parked"],
        ["cancel", NOBODY],
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


def test_who_named_the_database_is_said(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:secret@127.0.0.1:1/x")
    assert command("list").err.endswith(" [DATABASE_URL: postgresql://u:***@127.0.0.1:1/x]\n")
    monkeypatch.setenv("DATABASE_URL", "host=/tmp dbname=x")
    assert command("list").code == 2


# --- migrate ------------------------------------------------------------------------------------------------


def test_migrate_says_what_it_did(empty_dsn: str, command: Command) -> None:
    said = command("migrate", "--dsn", empty_dsn)
    assert said.code == 0
    assert "created the table pg_task" in said.out
    assert command("migrate", "--dsn", empty_dsn) == (0, "the schema is up to date\n", "")
    assert query(empty_dsn, "SELECT count(*) FROM pg_task") == [(0,)]


def test_migrate_sql_needs_no_database(command: Command) -> None:
    assert command("migrate", "--sql", "--dsn", "postgresql://127.0.0.1:1/x") == (0, migration_sql(), "")
    assert command("migrate", "--sql", "--keep-pg-task").out == migration_sql(keep_pg_task=True)


# --- enqueue ------------------------------------------------------------------------------------------------


def test_enqueue(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, step in [
        (["ReadName", '{"filename": "a"}'], '{"Greeter":{"ReadName":{"filename":"a","encoding":"utf-8"}}}'),
        (["Greeter.ReadName", '{"filename": ":é"}'], '{"Greeter":{"ReadName":{"filename":":é","encoding":"utf-8"}}}'),
        (["SayHello"], '{"Greeter":{"SayHello":{"name":"world"}}}'),
        (["Mailer.Flush"], '{"Mailer":{"Flush":null}}'),
        (["Mailer.Flush", "{}"], '{"Mailer":{"Flush":null}}'),
        (["Send", '"a@b"'], '{"Mailer":{"Send":"a@b"}}'),
    ]:
        monkeypatch.delenv("PGTASK_APP", raising=False)
        explicit = command("enqueue", APP, *words)
        monkeypatch.setenv("PGTASK_APP", APP)
        configured = command("enqueue", *words)
        for said in (explicit, configured):
            assert (said.code, said.err) == (0, "")
            columns = "step, wakeup_at <= now(), queue, priority, key"
            rows = query(database, f"SELECT {columns} FROM pg_task WHERE id = $1", UUID(said.out.strip()))
            assert rows == [(step, True, "default", 0, None)]


def test_enqueue_reads_stdin(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"name":\n "you"}\n'))
    assert command("enqueue", APP, "SayHello", "-").code == 0
    assert query(database, "SELECT step FROM pg_task") == [(HELLO,)]


def test_enqueue_routes_delays_and_keys(database: str, command: Command) -> None:
    words = ["enqueue", APP, "SayHello", "--queue", "emails", "--priority", "-3", "--key", "k"]
    said = command(*words, "--delay", "90.5")
    ((*routed, left),) = query(database, "SELECT queue, priority, key, wakeup_at - created_at FROM pg_task")
    assert routed == ["emails", -3, "k"]
    assert timedelta(seconds=90.5) <= left < timedelta(seconds=100)
    assert command(*words).out == said.out
    assert query(database, "SELECT count(*) FROM pg_task") == [(1,)]
    at = command("enqueue", APP, "SayHello", "--at", "2026-12-24T18:00:00+01:00")
    due = query(database, "SELECT wakeup_at FROM pg_task WHERE id = $1", UUID(at.out.strip()))
    assert due == [(datetime(2026, 12, 24, 17, tzinfo=UTC),)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["Flush"], "Flush is ambiguous: give one of Mailer.Flush, Other.Flush"),
        (["Nope"], "there is no step Nope in this app; it has Greeter.ReadName, Greeter.SayHello"),
        (["ReadName", '{"filename": 1}'], "Expected `str`, got `int` - at `$.filename`"),
        (["ReadName"], "missing required field `filename`"),
        (["SayHello", '{"nam": "x"}'], "has no field 'nam'; its fields: name"),
        (["Mailer.Flush", '{"x": 1}'], "has no field 'x'; its fields: none"),
        (["SayHello", "{"], "'{' is not JSON (Input data was truncated); for example '{\"name\": \"text\"}'"),
        (
            ["SayHello", "name=you"],
            "'name=you' is not JSON (JSON is malformed: ",
        ),
        (["SayHello", ""], "'' is not JSON (Input data was truncated); for example"),
        (["Send", "me"], "is not JSON (JSON is malformed: invalid character (byte 0)); for example '\"text\"'"),
        (["Mailer.Flush", "x"], "step Mailer.Flush has no fields: leave it out"),
        (["SayHello", "--at", "2026-12-24T18:00"], "has no time zone"),
        (["SayHello", "--at", "tomorrow"], "--at tomorrow: expected a time"),
        (["SayHello", "--delay", "-1"], "-1"),
        (["SayHello", "--delay", "nan"], "nan is not a number of seconds"),
        (["SayHello", "--delay", "1", "--at", "2026-12-24T18:00Z"], "not allowed with"),
        (["SayHello", "{}", "more"], "[APP] STEP [JSON]"),
    ],
)
def test_enqueue_refuses_before_it_connects(words: list[str], complaint: str, command: Command) -> None:
    said = command("enqueue", APP, *words, "--dsn", "postgresql://nobody@127.0.0.1:1/nowhere")
    assert (said.code, said.out) == (2, "")
    assert complaint in said.err
    assert said.err.count("\n") == 1


def test_enqueue_refuses_what_the_client_refuses(database: str, command: Command) -> None:
    for option, complaint in (
        ("--queue=\n", "must be a printable string"),
        ("--priority=99999", "priority 99999 must be"),
        ("--key=", "key '' must be"),
    ):
        said = command("enqueue", APP, "SayHello", option)
        assert (said.code, said.out) == (2, "")
        assert complaint in said.err
    assert query(database, "SELECT count(*) FROM pg_task") == [(0,)]


def test_enqueue_without_an_app(database: str, command: Command) -> None:
    said = command("enqueue", "SayHello")
    assert said.code == 2
    assert "PGTASK_APP" in said.err
    assert command("enqueue", "no_such_module:app", "SayHello").code == 4


# --- list ---------------------------------------------------------------------------------------------------


def test_list_shows_each_state_in_turn(database: str, command: Command) -> None:
    insert(database, **PARKED, wakeup_at="now() - interval '2 h'")
    insert(database, wakeup_at="now() + interval '5 min 25 s'")
    insert(database, **LEASED)
    insert(database, queue="'emails'", priority="7", wakeup_at="now() - interval '2 h'")
    said = command("list")
    assert (said.code, said.err) == (0, "")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["id", "state", "step", "queue", "prio", "tried", "due", "error"]
    assert [line[1:6] for line in lines[1:]] == [
        ["leased", "Greeter.SayHello", "default", "0", "0"],
        ["ready", "Greeter.SayHello", "emails", "7", "0"],
        ["scheduled", "Greeter.SayHello", "default", "0", "0"],
        ["parked", "Greeter.SayHello", "default", "0", "6"],
    ]
    leased, *others = [" ".join(line[6:]) for line in lines[1:]]
    assert re.fullmatch("now|[0-9]+s ago", leased), "since it was inserted"
    assert others == ["2h ago", "in 5m", "2h ago boom"]
    for state in listing.STATES:
        assert [row["state"] for row in command("list", "--state", state, "--json").objects] == [state]


def test_list_orders_each_state_as_it_is_worked_on(database: str, command: Command) -> None:
    def ids(*words: str) -> list[str]:
        return [row["id"] for row in command("list", "--json", *words).objects]

    def at(minutes: int) -> str:
        return f"now() + interval '{minutes} min'"

    parked = [insert(database, **PARKED, wakeup_at=at(-minutes)) for minutes in (5, 1, 9)]
    leased = [insert(database, **{**LEASED, "lock_expires_at": at(minutes)}) for minutes in (5, 1, 9)]
    lanes = [("'a'", "0"), ("'a'", "5"), ("'b'", "9")]
    ready, scheduled = (
        [
            insert(database, queue=queue, priority=priority, wakeup_at=at(minutes))
            for queue, priority in lanes
            for minutes in times
        ]
        for times in ((-1, -2), (2, 1))
    )
    assert ids("--state", "parked") == [parked[1], parked[0], parked[2]]
    assert ids("--state", "leased") == [leased[1], leased[0], leased[2]]
    assert ids("--state", "ready") == [ready[place] for place in (3, 2, 1, 0, 5, 4)]
    assert ids("--state", "scheduled") == [scheduled[place] for place in (3, 2, 1, 0, 5, 4)]
    assert ids("--queue", "b") == [ready[5], ready[4], scheduled[5], scheduled[4]]


FILL = """
    INSERT INTO pg_task (step, queue, priority, wakeup_at, error, locked_by, lock_expires_at)
    SELECT
        format('{"T%s":{"S%s":null}}', i % 2, i % 3),
        CASE i % 7 WHEN 0 THEN 'a b' ELSE 'default' END,
        i % 2,
        CASE i % 5
            WHEN 0 THEN '-infinity'::timestamptz
            WHEN 1 THEN 'infinity'
            WHEN 2 THEN now() - interval '1 h'
            ELSE now() + i / 50 * interval '1 h'
        END,
        CASE WHEN i % 11 = 0 THEN 'boom' END,
        CASE WHEN i % 13 = 0 THEN gen_random_uuid() END,
        CASE WHEN i % 13 = 0 THEN now() + i / 50 * interval '1 min' END
    FROM generate_series(1, 500) AS i
"""


def pages(command: Command, *words: str) -> list[Any]:
    """The rows of all pages."""
    rows, after = [], None
    while True:
        said = command("list", "--json", *words, *(["--after", after] if after else []))
        assert said.code == 0
        rows += said.objects
        after = said.cursor
        if after is None:
            return rows
        assert re.fullmatch(r"[\w.%-]+", after), "it needs no quotes in a shell"


@pytest.mark.parametrize("limit", ["7", "100", "500"])
def test_pages_show_each_task_once(limit: str, database: str, command: Command) -> None:
    query(database, FILL)
    rows = pages(command, "--limit", limit)
    assert len(rows) == len({row["id"] for row in rows}) == 500
    states = [listing.STATES.index(row["state"]) for row in rows]
    assert states == sorted(states)
    one_by_one = command("list", "--json", "--after", rows[249]["cursor"], "--limit", "3").objects
    assert [row["id"] for row in one_by_one] == [row["id"] for row in rows[250:253]]


@pytest.mark.parametrize("scan", [37, 100_000])
def test_filters_find_all_whatever_the_scan_limit(
    scan: int, database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    query(database, FILL)
    monkeypatch.setattr(listing, "SCAN_LIMIT", scan)
    monkeypatch.setattr(look, "SCAN_LIMIT", scan)
    for words, condition in (
        (["--queue", "a b"], "queue = 'a b'"),
        (["--task", "T1"], "step LIKE '{\"T1\"%'"),
        (["--step", "S2"], "step LIKE '%\"S2\":%'"),
        (["--step", "T0.S2"], 'step = \'{"T0":{"S2":null}}\''),
        (["--task", "T0", "--queue", "default"], "step LIKE '{\"T0\":%' AND queue = 'default'"),
        (["--task", "T"], "false"),
        (["--queue", "nowhere"], "false"),
    ):
        rows = pages(command, *words)
        expected = {str(task) for (task,) in query(database, f"SELECT id FROM pg_task WHERE {condition}")}
        assert len(rows) == len(expected)
        assert {row["id"] for row in rows} == expected


def test_a_scan_that_is_cut_says_so(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    query(database, FILL)
    monkeypatch.setattr(listing, "SCAN_LIMIT", 100)
    monkeypatch.setattr(look, "SCAN_LIMIT", 100)
    said = command("list", "--task", "Nope")
    assert (said.code, said.out) == (0, "")
    assert said.err.startswith("pgtask: looked at 100 tasks and stopped among the ready ones; to look on: --after ")


def test_an_empty_list(database: str, command: Command) -> None:
    assert command("list") == (0, "", "pgtask: no tasks\n")
    assert command("list", "--json").out == ""


def test_list_has_the_claims_where_a_task_was_claimed_again(database: str, command: Command) -> None:
    insert(database, claims="1")
    assert "claims" not in command("list").out
    insert(database, claims="3")
    head, *lines = command("list").out.splitlines()
    assert head.split()[-1] == "claims"
    assert sorted(line.split()[-1] for line in lines) == ["1", "3"]


def test_a_filter_that_nothing_passes(database: str, command: Command) -> None:
    insert(database)
    assert command("list", "--step", "Nope") == (0, "", "pgtask: no tasks match\n")
    assert command("list", "--state", "parked") == (0, "", "pgtask: no tasks match\n")


@pytest.mark.parametrize("queue", ["", "a.", "a.b", "default"])
def test_a_cursor_ends_in_no_dot(queue: str) -> None:
    cursor = listing.Cursor("ready", queue, 0, 0, 0, 0)
    assert not str(cursor).endswith(".")
    assert listing.Cursor.parse(str(cursor)) == cursor


def test_an_app_that_is_not_there_names_the_one_that_is(database: str, command: Command) -> None:
    said = command("graph", f"{__name__}:nope")
    assert (said.code, said.out) == (4, "")
    assert said.err.endswith(f"has no attribute 'nope'; did you mean {APP}?\n")
    assert command("graph", f"{__name__}:Greeter").err.endswith(f"not a pgtask.App; did you mean {APP}?\n")
    assert command("enqueue", f"{__name__}.py:app", "SayHello").err.endswith(f"did you mean {APP}?\n")


def test_list_json_holds_the_whole_row_on_one_line(database: str, command: Command) -> None:
    step = """'{ "Greeter":\n {"SayHello": {"name": "é\\u0000"}}}'"""
    task = insert(database, step=step, **PARKED, **LEASED, key="'k'", queue="'q'", priority="-1")
    long = insert(database, step="repeat('x', 5000)", error="repeat('y', 5000)")
    rows = {row["id"]: row for row in command("list", "--json").objects}
    row = rows[task]
    columns = query(database, "SELECT attname FROM pg_attribute WHERE attrelid = 'pg_task'::regclass AND attnum > 0")
    assert set(row) == {*(name for (name,) in columns), "state", "label", "cursor"}
    assert row["step"] == {"Greeter": {"SayHello": {"name": "é\0"}}}
    assert (row["state"], row["label"], row["error"], row["tried"]) == ("parked", "Greeter.SayHello", "boom", 6)
    assert (row["key"], row["queue"], row["priority"], row["claims"]) == ("k", "q", -1, 1)
    assert datetime.fromisoformat(row["wakeup_at"]).utcoffset() == timedelta(0)
    assert row["wakeup_at"].endswith("Z")
    assert UUID(row["locked_by"])
    assert (rows[long]["step"], rows[long]["label"], rows[long]["error"]) == ("x" * 5000, "?", "y" * 5000)


def test_the_table_is_plain_and_whole_when_piped(database: str, command: Command) -> None:
    insert(database, error=r"E'\n  Boom: \x1b[31m' || repeat('z', 300) || E'\nline two'", tried="6")
    big = """'{"Greeter":{"SayHello":{"name":"' || repeat('z', 2000) || '"}}}'"""
    insert(database, step=big)
    out = command("list").out
    assert "Boom: \\x1b[31m" + "z" * 300 in out
    assert "\x1b" not in out
    assert "line two" not in out
    assert out.count("Greeter.SayHello") == 2


@pytest.mark.parametrize(("columns", "expected"), [(150, "one line"), (80, "two lines")])
def test_the_table_fits_a_terminal(columns: int, expected: str, database: str) -> None:
    task = insert(database, error="repeat('日本', 200)", tried="6", wakeup_at="now() - interval '1 h'")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = process("list", stdout=slave, stderr=slave, stdin=slave, environ={"TERM": "xterm", "NO_COLOR": ""})
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    assert child.wait(60) == 0
    text = shown.decode().replace("\r\n", "\n")
    assert "\x1b[31mparked\x1b[0m" in text
    lines = re.sub(r"\x1b\[\d*m", "", text).splitlines()
    assert all(len(line) + len(re.findall("[日本]", line)) <= columns for line in lines)
    assert lines[-1].endswith("…")
    if expected == "one line":
        assert lines[1].startswith(f"{task}  parked  Greeter.SayHello  default     0      6  60m ago  日本")
    else:
        assert lines[0].split() == ["id", "state", "step", "tried", "due"]
        assert lines[1].rstrip() == f"{task}  parked  Greeter.SayHello      6  60m ago"
        assert lines[2].startswith("    日本")
    assert len(lines) == (2 if expected == "one line" else 3)


# --- show ---------------------------------------------------------------------------------------------------


def test_show_has_everything(database: str, command: Command) -> None:
    task = insert(database, **PARKED, key="'k'", wakeup_at="'2026-01-02 03:04:05+00'")
    query(database, "UPDATE pg_task SET error = E'ValueError: no\\n  from \\x1bhere', step = $1", HELLO)
    said = command("show", task)
    assert (said.code, said.err) == (0, "")
    head, step, error = said.out.split("\n\n")
    assert head.splitlines()[:3] == [f"id          {task}", "state       parked", "step        Greeter.SayHello"]
    assert "wakeup_at   2026-01-02 03:04:05 UTC (" in head
    assert "key         k" in head
    assert json.loads(step) == json.loads(HELLO)
    assert step.count("\n") > 3
    assert error == "error\n  ValueError: no\n    from \\x1bhere\n"
    assert command("show", task, "--json").objects[0]["error"] == "ValueError: no\n  from \x1bhere"


def test_show_tells_how_long_a_lease_lasts(database: str, command: Command) -> None:
    live, expired = insert(database, **LEASED), insert(database, **EXPIRED)
    assert re.search(r"lease +[0-9a-f-]{36}, ends in [1-6][0-9]s unless it is renewed\n", command("show", live).out)
    assert re.search(r"ran out ([6-9][0-9]s|[1-9]m) ago: any worker may take the task\n", command("show", expired).out)


def test_show_takes_the_beginning_of_an_id(database: str, command: Command) -> None:
    for last in range(5):
        insert(database, id=f"'01234567-89ab-cdef-8000-00000000000{last}'")
    insert(database, id="'01234567-ffff-ffff-ffff-ffffffffffff'", step="'no JSON'")
    assert "no JSON" in command("show", "01234567-FF").out
    assert command("show", "0123456789abcdef8000000000000003").code == 0
    said = command("show", "01234567-8")
    assert (said.code, said.out) == (1, "")
    assert "more than one task begins so: 01234567-89ab-cdef-8000-000000000000, " in said.err
    assert said.err.endswith(", ...\n")
    for nobody in ("012345670", "00000000-0000-4000-8000-000000000000"):
        said = command("show", nobody)
        assert (said.code, said.out) == (1, "")
        assert said.err == f"pgtask: {nobody}: there is no such task: it is finished, was cancelled or never was\n"


# --- retry and cancel ---------------------------------------------------------------------------------------

STATE = "SELECT tried, error, claims, wakeup_at <= now(), locked_by IS NULL FROM pg_task WHERE id = $1"
AFRESH = [(0, None, 0, True, True)]
NOBODY = "00000000-0000-4000-8000-000000000000"


def test_retry_makes_tasks_due_with_all_their_retries(database: str, command: Command) -> None:
    tasks = [
        insert(database, **PARKED),
        insert(database, tried="2", wakeup_at="now() + interval '1 h'"),
        insert(database, **EXPIRED),
        insert(database, **PARKED, wakeup_at="'infinity'"),
    ]
    assert command("retry", *tasks, tasks[0]) == (0, "4 tasks retried\n", "")
    for task in tasks:
        assert query(database, STATE, UUID(task)) == AFRESH
    assert command("retry", tasks[0]) == (0, "1 task retried\n", "")


def test_retry_keeps_the_place_of_a_task_that_is_due(database: str, command: Command) -> None:
    task = insert(database, wakeup_at="'2026-01-01 00:00+00'", tried="1")
    assert command("retry", task).code == 0
    assert query(database, "SELECT wakeup_at, tried FROM pg_task") == [(datetime(2026, 1, 1, tzinfo=UTC), 0)]


def test_retry_names_what_it_left_alone(database: str, command: Command) -> None:
    parked, leased = insert(database, **PARKED), insert(database, **LEASED)
    said = command("retry", leased, NOBODY, parked)
    assert (said.code, said.out) == (1, "1 task retried\n")
    assert said.err.splitlines() == [
        f"pgtask: {leased}: a worker has it under a live lease",
        f"pgtask: {NOBODY}: there is no such task: it is finished, was cancelled or never was",
    ]
    assert query(database, STATE, UUID(parked)) == AFRESH
    assert query(database, STATE, UUID(leased)) == [(0, None, 1, True, False)]


@pytest.mark.parametrize("columns", [PARKED, EXPIRED], ids=["parked", "expired"])
def test_retry_wakes_workers(columns: dict[str, str], database: str, command: Command) -> None:
    task = insert(database, **columns)

    async def listen(connection: Any) -> None:
        heard = asyncio.Event()
        await connection.add_listener("pg_task_changed", lambda *_: heard.set())
        await asyncio.to_thread(command, "retry", task)
        await asyncio.wait_for(heard.wait(), 10)
        await connection.reset()

    with_connection(database, listen)


@pytest.mark.parametrize(
    ("words", "condition"),
    [
        ("", "true"),
        ("--queue emails", "queue = 'emails'"),
        ("--task Mailer", "step LIKE '%Mailer%'"),
        ("--step Greeter.SayHello --queue emails", "step LIKE '%SayHello%' AND queue = 'emails'"),
    ],
)
def test_retry_all_that_are_parked(
    words: str, condition: str, database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change, "RETRY_CHUNK", 7)
    monkeypatch.setattr(listing, "SCAN_LIMIT", 5)
    query(
        database,
        """
        INSERT INTO pg_task (step, queue, error, tried)
        SELECT
            CASE i % 2 WHEN 0 THEN '{"Mailer":{"Flush":null}}' ELSE '{"Greeter":{"SayHello":{}}}' END,
            CASE i % 3 WHEN 0 THEN 'emails' ELSE 'default' END,
            CASE WHEN i % 5 > 0 THEN 'boom' END,
            3
        FROM generate_series(1, 100) AS i
        """,
    )
    ((expected, parked),) = query(
        database, f"SELECT count(*) FILTER (WHERE {condition}), count(*) FROM pg_task WHERE error IS NOT NULL"
    )
    assert command("retry", "--parked", *words.split(), "--limit", "2").out == "2 tasks retried\n"
    assert command("retry", "--parked", *words.split()) == (0, f"{expected - 2} tasks retried\n", "")
    left = f"SELECT count(*) FILTER (WHERE {condition}), count(*) FROM pg_task WHERE error IS NOT NULL"
    assert query(database, left) == [(0, parked - expected)]
    assert query(database, f"SELECT DISTINCT tried FROM pg_task WHERE error IS NULL AND {condition}") == [(0,), (3,)]


def test_retry_all_ends_though_tasks_are_parked_anew_at_once(
    database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change, "RETRY_CHUNK", 3)
    for _ in range(10):
        insert(database, **PARKED)
    query(
        database,
        """
        CREATE FUNCTION fail_again() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.error = 'again'; NEW.wakeup_at = clock_timestamp(); RETURN NEW; END $$
        """,
    )
    query(database, "CREATE TRIGGER fail BEFORE UPDATE ON pg_task FOR EACH ROW EXECUTE FUNCTION fail_again()")
    assert command("retry", "--parked") == (0, "10 tasks retried\n", "")


def test_cancel_removes_what_no_worker_has(database: str, command: Command) -> None:
    gone = [insert(database, **columns) for columns in (PARKED, {}, EXPIRED)]
    leased = insert(database, **LEASED)
    said = command("cancel", *gone, leased, NOBODY)
    assert (said.code, said.out) == (1, "3 tasks cancelled\n")
    assert said.err.splitlines() == [
        f"pgtask: {leased}: a worker has it under a live lease",
        f"pgtask: {NOBODY}: there is no such task: it is finished, was cancelled or never was",
    ]
    assert query(database, "SELECT id::text FROM pg_task") == [(leased,)]
    assert command("cancel", "--force", leased) == (0, "1 task cancelled\n", "")
    assert query(database, "SELECT count(*) FROM pg_task") == [(0,)]


@pytest.mark.parametrize(("name", "done"), [("retry", "retried"), ("cancel", "cancelled")])
def test_tasks_are_named_by_their_first_digits_too(name: str, done: str, database: str, command: Command) -> None:
    one, two, three = (f"'0192{n:04}-0000-7000-8000-{n:012}'" for n in (1, 2, 3))
    twins = [f"'0193abcd-0000-7000-8000-{n:012}'" for n in (1, 2)]
    for task in (one, two, three, *twins):
        insert(database, id=task, **PARKED)
    said = command(name, "01920001", "0192-0002-0000", three.strip("'"), "01920001-0")
    assert said == (0, f"3 tasks {done}\n", "")
    said = command(name, "0193ABCD", "01990000")
    both = ", ".join(twin.strip("'") for twin in twins)
    assert (said.code, said.out) == (1, f"0 tasks {done}\n")
    assert said.err.splitlines() == [
        f"pgtask: 0193ABCD: more than one task begins so: {both}",
        "pgtask: 01990000: there is no such task: it is finished, was cancelled or never was",
    ]
    assert query(database, "SELECT count(*) FROM pg_task WHERE error IS NOT NULL") == [(2,)]


@pytest.mark.parametrize("name", ["retry", "cancel"])
def test_a_task_that_is_claimed_in_the_same_moment_is_left_alone(name: str, database: str, command: Command) -> None:
    task = insert(database)

    async def claim_meanwhile(connection: Any) -> Said:
        claim = connection.transaction()
        await claim.start()
        await connection.execute(
            "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 min'"
        )
        calling = asyncio.create_task(asyncio.to_thread(command, name, task))
        waiting = f"SELECT FROM pg_stat_activity WHERE application_name = 'pgtask {name}' AND wait_event_type = 'Lock'"
        while not await connection.fetch(waiting):
            await connection.execute("SELECT pg_stat_clear_snapshot()")
            await asyncio.sleep(0)
        await claim.commit()
        return await calling

    said = with_connection(database, claim_meanwhile)
    assert (said.code, said.out.split()[0]) == (1, "0")
    assert said.err == f"pgtask: {task}: somebody else took or changed it just now; try again\n"
    assert query(database, "SELECT locked_by IS NOT NULL FROM pg_task") == [(True,)]


# --- stats --------------------------------------------------------------------------------------------------


def test_stats_counts_by_lane_and_state(database: str, command: Command) -> None:
    for columns, times in (({}, 3), ({"wakeup_at": "now() + interval '1 h'"}, 2), (PARKED, 4), (LEASED, 1)):
        for _ in range(times):
            insert(database, **columns)
    insert(database, queue="'emails'", priority="5", wakeup_at="now() - interval '10 min'")
    insert(database, queue="'only parked'", **PARKED)
    query(database, "ANALYZE pg_task")
    said = command("stats")
    assert (said.code, said.err) == (0, "")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["queue", "prio", "ready", "scheduled", "leased", "parked", "oldest", "due", "next", "due"]
    assert lines[1][:6] == ["default", "0", "3", "2", "1", "4"]
    assert lines[1][-2:] == ["in", "60m"]
    assert lines[2] == ["emails", "5", "1", "0", "0", "0", "10m", "ago", "-"]
    assert lines[3] == ["only", "parked", "0", "0", "0", "0", "1", "-", "-"]
    assert "about 12 rows" in said.out
    assert "warning" not in said.out
    (report,) = command("stats", "--json").objects
    assert [(lane["queue"], lane["ready"], lane["at_least"]) for lane in report["lanes"]] == [
        ("default", 3, []),
        ("emails", 1, []),
        ("only parked", 0, []),
    ]
    assert report["rows"] == 12


def test_stats_says_where_it_stopped_counting(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    query(database, FILL)
    monkeypatch.setattr(statistics, "COUNT_LIMIT", 20)
    monkeypatch.setattr(statistics, "_LOWEST_LIMIT", 10)
    out = command("stats").out
    lane = next(line for line in out.splitlines() if line.startswith("default     1"))
    ready, scheduled, leased, parked = lane.split()[2:6]
    assert (ready, scheduled) == ("20+", "20+")
    assert leased.endswith("+")
    assert parked.endswith("+")
    (report,) = command("stats", "--json").objects
    assert all({"leased", "parked"} <= set(lane["at_least"]) for lane in report["lanes"])
    monkeypatch.setattr(statistics, "_WHOLE_LIMIT", 40)
    assert {lane["ready"] for lane in command("stats", "--json").objects[0]["lanes"]} == {10}


def test_stats_of_an_empty_table(database: str, command: Command) -> None:
    assert command("stats").out.startswith("no tasks\n\ntable   not estimated yet, 0 dead; ")


def test_stats_warns_of_what_ails_the_table(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(database, **EXPIRED)

    async def look_meanwhile(connection: Any) -> tuple[int, str, Any]:
        async with connection.transaction(isolation="repeatable_read"):
            pid = await connection.fetchval("SELECT pg_backend_pid() FROM pg_task")
            await connection.execute("SET application_name = 'a report'")
            quiet = await asyncio.to_thread(command, "stats")
            assert "transaction" not in quiet.out
            monkeypatch.setattr(report, "LONG_TRANSACTION", 0.0)
            out = (await asyncio.to_thread(command, "stats")).out
            (found,) = (await asyncio.to_thread(command, "stats", "--json")).objects
        return pid, out, found["oldest_transaction"]

    pid, out, oldest = with_connection(database, look_meanwhile)
    assert "warning: 1 lease has run out and no worker has taken over: is one running?\n" in out
    assert f"warning: pid {pid} (a report, idle in transaction): a transaction open for " in out
    assert (oldest["pid"], oldest["name"], oldest["state"]) == (pid, "a report", "idle in transaction")
    assert oldest["seconds"] >= 0


# --- stop, psql and the embedded server ---------------------------------------------------------------------


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
    assert said.out == "told all workers, on every host, to finish their running steps and leave\n"


def test_the_embedded_server_is_started_prepared_and_ended(command: Command, tmp_path: Path) -> None:
    nothing = (0, "the embedded PostgreSQL was not running\n", "")
    assert command("stop", "--server") == nothing
    assert command("stop").out == "the embedded PostgreSQL is not running, so no worker is working\n"
    assert not (tmp_path / ".pgtask").exists()
    try:
        said = command("list")
        assert (said.code, said.out) == (0, "")
        where = f"starting the embedded PostgreSQL in {tmp_path / '.pgtask'} (to end it: pgtask stop --server)"
        assert said.err == f"pgtask: {where}\npgtask: no tasks\n"
        assert command("enqueue", APP, "SayHello").err == ""
        assert len(command("list", "--json").objects) == 1
        child = process("psql", "-Atc", "SELECT step FROM pg_task")
        assert child.communicate(timeout=60) == ('{"Greeter":{"SayHello":{"name":"world"}}}\n', "")
        assert command("stop").code == 0
    finally:
        said = command("stop", "--server")
    assert said == (0, "the embedded PostgreSQL has ended\n", "")
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
    raise pgtask.EmbeddedError(f"there is no {name}")


@pytest.mark.parametrize(
    ("words", "ours", "theirs"),
    [
        ("psql", "psql", ""),
        ("psql -c x", "psql", "-c x"),
        ("psql --dsn D -c x", "psql --dsn D", "-c x"),
        ("psql --dsn=D x --dsn E", "psql --dsn=D", "x --dsn E"),
        ("psql -- --dsn E", "psql", "--dsn E"),
        ("psql --dsn", "psql --dsn", ""),
    ],
)
def test_the_words_of_psql_are_its_own(words: str, ours: str, theirs: str) -> None:
    assert arguments._split_psql(words.split()) == (ours.split(), theirs.split())


# --- as a process -------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_error(database: str) -> None:
    query(database, "INSERT INTO pg_task (step) SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
    child = process("list", "--json", "--limit", "2000")
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline().startswith('{"id":')
    child.stdout.close()
    assert (child.wait(60), child.stderr.read()) == (141, "")
    child.stderr.close()


def test_an_interrupt_is_quiet(database: str) -> None:
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


# --- at scale -----------------------------------------------------------------------------------------------


def test_nothing_scans_or_sorts_the_table(database: str) -> None:
    """With and without statistics; a plan that is right for millions of rows is asked for here of a thousand."""
    never, long_ago, now = datetime.max, datetime.min, datetime.now(UTC)
    ids = [UUID(int=number) for number in range(3)]
    statements: list[tuple[Any, ...]] = [
        ("list_parked", "^x", "q", never, (0, 1), 10, 5),
        ("list_leased", "^x", "q", long_ago, (0, 1), 10, 5),
        ("list_waiting", "^x", "q", long_ago, (0, 1), 10, 5, 0, now),
        ("describe", ids, 100),
        ("find_prefix", ids[0], ids[1], 3),
        ("retry", ids),
        ("cancel", ids, False),
        ("count_lanes", ["a"], [1], 10),
        ("count_held", 10),
    ]

    async def explain(connection: Any) -> None:
        await connection.execute(FILL)
        for prepare in ("SELECT 1", "VACUUM ANALYZE pg_task"):
            await connection.execute(prepare)
            for name, *args in statements:
                async with connection.transaction():
                    await connection.fetch(statement("index_scans"))
                    lines = await connection.fetch(f"EXPLAIN {statement(name)}", *args)
                plan = "\n".join(line[0] for line in lines)
                assert "Index" in plan, name
                assert not re.search(r"Seq Scan|Bitmap|Sort", plan), f"{name}:\n{plan}"

    with_connection(database, explain)
