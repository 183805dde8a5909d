"""The answers of both programs to a beginner: typing errors, habits of other tools, secrets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fix_commands import PARKED, Command, insert, query
from fix_database import with_database
from greeter import APP, HELLO
from paths import REPOSITORY

from pgtask._cli import supervisor
from pgtask._cli.main import COMMANDS, GROUPS, main

AWAY = "postgresql://nobody@127.0.0.1:1/nowhere"


# --- help ---------------------------------------------------------------------------------------------------


def test_pgtask_alone_prints_help_and_exits_2(command: Command) -> None:
    said = command()
    assert (said.code, said.err) == (2, "")
    assert said.out.startswith("usage: pgtask ")
    for title, group in GROUPS.items():
        assert f"\n{title}:\n" in said.out
        assert all(f"\n  {name} " in said.out for name in group)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal(
    columns: int, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = command().out.splitlines()
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            command(name, "--help")
        lines += capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        supervisor.main(["--help"])
    lines += capsys.readouterr().out.splitlines()
    assert sum(line.startswith("usage: ") for line in lines) == len(COMMANDS) + 2
    assert [line for line in lines if len(line) > columns] == []


def test_help_is_a_command_too(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for words, usage in ((["help"], "usage: pgtask [-h]"), (["help", "list"], "usage: pgtask list")):
        with pytest.raises(SystemExit) as ended:
            command(*words)
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(usage)
    assert "did you mean list?" in command("help", "lst").err


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_both_programs_say_their_version(
    flag: str, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in (command, lambda *words: supervisor.main(words)):
        with pytest.raises(SystemExit) as ended:
            program(flag)
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("pgtask")


# --- what was meant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lst", "there is no command 'lst'; did you mean list?"),
        ("ls", "did you mean list?"),
        ("status", "did you mean stats?"),
        ("enqeue x:y Z", "did you mean enqueue?"),
        ("requeue 01234567", "did you mean retry?"),
        ("List", "did you mean list?"),
        ("worker greetings:app", "workers are started by: pgtask-supervisor greetings:app"),
        ("start", "workers are started by: pgtask-supervisor APP"),
        ("supervisor --procs 2 a.b:app", "workers are started by: pgtask-supervisor a.b:app"),
        ("run greetings:app", "workers are started by: pgtask-supervisor greetings:app"),
        ("run greetings:app --procs 2", "workers are started by: pgtask-supervisor greetings:app"),
        ("list --limt 3", "unrecognized arguments: --limt 3; did you mean --limit?"),
        ("list --jsn", "did you mean --json?"),
        ("retry --praked", "did you mean --parked?"),
        ("cancel --forse 01234567", "did you mean --force?"),
        ("--jsn list", "unrecognized arguments: --jsn"),
        ("--dsn postgresql:///x", "there is no command"),
        ("list --state PARKD", "--state"),
        (f"enqueue {APP} ReadNam", "there is no step ReadNam in this app; it has "),
        (f"enqueue {APP} ReadNam", "did you mean ReadName?"),
        (f"enqueue {APP} Greeter.SayHelo", "did you mean Greeter.SayHello?"),
    ],
)
def test_mistyped_word_names_the_probable_one(
    words: str, said: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--dsn" not in words:
        monkeypatch.setenv("PGTASK_DSN", AWAY)
    done = command(*words.split())
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--burts", "unrecognized arguments: --burts; did you mean --burst?"),
        ("--proc 2", "did you mean --procs?"),
        ("--workers 2", "did you mean --procs?"),
        ("--loglevel debug", "did you mean --log-level?"),
        ("--grcae=3", "did you mean --grace?"),
        ("--url postgresql://u:secret@h/x", "did you mean --dsn?"),
    ],
)
def test_supervisor_mistyped_flag_names_the_probable_one(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert supervisor.main(["a:b", *words.split()]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "secret" not in err


def test_a_command_of_the_other_program_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pgtask._cli.supervisor", "list"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PGTASK_DSN": AWAY},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "; to list tasks: pgtask list" in done.stderr


def test_short_flags() -> None:
    assert supervisor._parse(["-p", "2", "-c3", "-q", "a", "-q", "b", "-l", "debug"]) == {
        "procs": "2",
        "concurrency": "3",
        "queue": ["a", "b"],
        "log_level": "debug",
    }


# --- the database -------------------------------------------------------------------------------------------


def test_the_database_is_named_before_or_after_the_command(dsn: str, empty_dsn: str, command: Command) -> None:
    insert(dsn)
    for words in (["--dsn", dsn, "list"], [f"--dsn={dsn}", "list"], ["list", "--dsn", dsn]):
        assert len(command(*words, "--json").objects) == 1
    assert command("--dsn", empty_dsn, "list", "--dsn", dsn, "--json").code == 0, "the nearer one counts"
    assert "leave out --dsn" in command("--dsn", dsn, "graph", APP).err


SECRETS = [
    "postgresql://ada:hunter2@h/db",
    "postgres://ada:hunter2@h/db?x=1",
    "postgresql://h/db?user=a&password=hunter2",
    "host=h password=hunter2 dbname=x",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "words",
    [
        ["{}"],
        ["{}", "list"],
        ["list", "{}"],
        ["list", "--{}"],
        ["list", "--limit", "{}"],
        ["list", "--state", "{}"],
        ["list", "--after", "{}"],
        ["list", "--dns", "{}"],
        ["--dns={}", "list"],
        ["show", "{}"],
        ["run", "{}"],
        ["runs", "--before", "{}"],
        ["retry", "{}"],
        ["enqueue", "{}", "Step"],
        ["enqueue", APP, "{}"],
        ["enqueue", APP, "SayHello", "{}"],
        ["enqueue", APP, "SayHello", "--delay", "{}"],
        ["enqueue", APP, "SayHello", "--at", "{}"],
        ["prune", "--older-than", "{}"],
        ["graph", "{}"],
        ["worker", "{}"],
        ["signal", "00000000-0000-4000-8000-000000000000", "x", "{}"],
        ["help", "{}"],
    ],
)
def test_errors_show_no_password(
    words: list[str], secret: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTASK_DSN", AWAY)
    said = command(*(word.format(secret) for word in words))
    assert said.code in (2, 4)
    assert "hunter2" not in said.err


@pytest.mark.parametrize("secret", SECRETS)
def test_supervisor_errors_show_no_password(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        [secret],
        ["a:b", secret],
        ["a:b", "--procs", secret],
        ["a:b", f"--url={secret}"],
        ["--grace", secret],
    ):
        assert supervisor.main(words) in (2, 4)
        assert "hunter2" not in capsys.readouterr().err


def test_a_remedy_can_be_typed(empty_dsn: str, command: Command) -> None:
    with_password = empty_dsn.replace("postgres@", "postgres:hunter2@")
    said = command("list", "--dsn", with_password)
    assert said.err.endswith("; run: pgtask migrate with the same --dsn\n")


# --- ids ----------------------------------------------------------------------------------------------------


def test_last_digits_name_a_task_as_first_ones_do(dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    tasks = [insert(dsn, **PARKED) for _ in range(4)]
    assert tasks[0] in command("show", tasks[0][-8:]).out
    assert command("retry", tasks[1][-8:], tasks[2][-12:].upper()).out == "2 tasks made due\n"
    assert command("cancel", tasks[3].replace("-", "")[-20:]).out == "1 task cancelled\n"
    assert query(dsn, "SELECT count(*) FROM pg_task WHERE error IS NULL") == [(2,)]


def test_digits_that_begin_one_id_and_end_another_name_none(
    dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    one = insert(dsn, id="'abcdef12-0000-4000-8000-000000000001'")
    other = insert(dsn, id="'00000000-0000-4000-8000-0000abcdef12'", **PARKED)
    said = command("cancel", "abcdef12")
    assert (said.code, said.out) == (1, "0 tasks cancelled\n")
    assert said.err.splitlines()[1:] == [
        f"pgtask:   {other}  parked  Greeter.SayHello",
        f"pgtask:   {one}  ready  Greeter.SayHello",
    ]
    assert query(dsn, "SELECT count(*) FROM pg_task") == [(2,)]


def test_states_are_read_in_any_case(dsn: str, command: Command) -> None:
    insert(dsn, **PARKED)
    for state in ("parked", "PARKED", "Parked"):
        assert len(command("list", "--dsn", dsn, "--state", state, "--json").objects) == 1
    for state in ("error", "ERROR", "Error"):
        assert command("runs", "--dsn", dsn, "--state", state).code == 0


# --- a key that is taken ------------------------------------------------------------------------------------


def test_enqueue_with_a_taken_key_is_noted(dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    words = ["enqueue", APP, "SayHello", '{"name": "you"}', "--key", "k"]
    first = command(*words)
    task = first.out.strip()
    assert (first.code, first.err) == (0, "")
    note = f"pgtask: nothing was enqueued: task {task} has the key 'k' already, with"
    assert command(*words) == (0, f"{task}\n", f"{note} the same payload\n")
    words[3] = '{"name": "me"}'
    assert command(*words) == (0, f"{task}\n", f"{note} another payload, which stays as it is\n")
    assert command(*words, "--delay", "1h").err == f"{note} another payload, which stays as it is\n"
    assert query(dsn, "SELECT step FROM pg_task") == [(HELLO,)]


def test_app_that_fails_to_load_shows_traceback_if_asked(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first_day_broken.py").write_text("def f():\n    raise RuntimeError('no')\nf()\n")
    assert command("graph", "first_day_broken:app").err.count("\n") == 1
    for words in (["graph", "first_day_broken:app"], ["enqueue", "first_day_broken:app", "Step"]):
        assert main([*words, "--traceback"]) == 4
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err
        assert "first_day_broken.py" in err
        assert err.splitlines()[-1].startswith("pgtask: app 'first_day_broken:app': importing it failed")


def test_psql_takes_dsn_at_any_place(dsn: str, tmp_path: Path) -> None:
    insert(dsn)
    count = ["-Atc", "SELECT count(*) FROM pg_task"]
    for words in (["psql", *count, "--dsn", dsn], ["--dsn", dsn, "psql", *count], ["psql", f"--dsn={dsn}", *count]):
        done = subprocess.run(
            [sys.executable, "-m", "pgtask", *words],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    assert not (tmp_path / ".pgtask").exists()


def test_stop_without_a_listening_worker_is_reported(cluster: str, dsn: str, command: Command) -> None:
    said = command("stop", "--dsn", dsn)
    assert said == (
        0,
        "no worker listens on this database, so there was none to stop; "
        "workers with --no-listen do not receive this: end their supervisors\n",
        "",
    )
    assert with_database(cluster, "postgres") != dsn
