"""`pgtask enqueue`."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from fix_commands import Command, query
from greeter import APP, HELLO


def test_enqueue_takes_steps_by_name_and_label(
    database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert routed == ["emails", -3, "Greeter/k"]
    assert timedelta(seconds=90.5) <= left < timedelta(seconds=100)
    assert command(*words).out == said.out
    assert query(database, "SELECT count(*) FROM pg_task") == [(1,)]
    at = command("enqueue", APP, "SayHello", "--at", "2026-12-24T18:00:00+01:00")
    due = query(database, "SELECT wakeup_at FROM pg_task WHERE id = $1", UUID(at.out.strip()))
    assert due == [(datetime(2026, 12, 24, 17, tzinfo=UTC),)]


LEASE = "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 h'"


def test_enqueue_says_what_became_of_the_step(database: str, command: Command) -> None:
    words = ["enqueue", APP, "SayHello", "--key", "k"]
    first = command(*words)
    assert first.err == ""
    task = first.out.strip()

    def enqueue(name: str, *flags: str) -> tuple[str, str]:
        said = command("enqueue", APP, "SayHello", f'{{"name": "{name}"}}', "--key", "k", *flags)
        assert said.code == 0
        return said.out.strip(), said.err.removeprefix("pgtask: ").strip()

    has = f"nothing new was enqueued: task {task} has the key 'k' already, and"
    assert enqueue("a") == (
        task,
        f"nothing was enqueued: task {task} has the key 'k' already, with another payload, which stays as it is",
    )
    assert enqueue("b", "--on-conflict", "replace") == (task, f"{has} has this step now")
    assert enqueue("b", "--on-conflict", "after")[1].endswith("already, with the same payload")
    assert enqueue("c", "--debounce", "1h", "--ceiling", "2h") == (task, f"{has} has this step now")
    query(database, "UPDATE pg_task SET error = 'boom', tried = 2")
    assert "nothing was enqueued" in enqueue("d", "--on-conflict", "after")[1]
    assert enqueue("d", "--on-parked", "revive") == (task, f"{has} was parked; it is due again")
    query(database, "UPDATE pg_task SET error = 'boom'")
    assert enqueue("e", "--on-parked", "replace") == (task, f"{has} has this step now")
    query(database, LEASE)
    second, says = enqueue("f", "--on-conflict", "after")
    assert says == f"task {second} is new, and waits behind the one that has the key 'k'"
    assert enqueue("g", "--on-conflict", "replace")[1].startswith(
        f"nothing new was enqueued: task {second} has the key"
    )
    rows = query(database, "SELECT step::json -> 'Greeter' -> 'SayHello' ->> 'name' FROM pg_task ORDER BY key DESC")
    assert rows == [("e",), ("g",)]


def test_enqueue_takes_an_expiry(database: str, command: Command) -> None:
    assert command("enqueue", APP, "SayHello", "--expires", "1h").code == 0
    left = "SELECT expires_at - created_at BETWEEN interval '1 h' AND interval '61 min' FROM pg_task"
    assert query(database, left) == [(True,)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["Flush"], "Flush is ambiguous: give one of Mailer.Flush, Other.Flush"),
        (["Nope"], "there is no step Nope in this app; it has Greeter.ReadName, Greeter.SayHello"),
        (["ReadName", '{"filename": 1}'], "Expected `str`, got `int` - at `$.filename`"),
        (["ReadName"], "missing required field `filename`"),
        (["SayHello", '{"nam": "x"}'], "has no field 'nam'; its fields: name; did you mean name?"),
        (["ReadName", '{"filname": "x"}'], "ReadName has no field 'filname'; its fields: filename, encoding; did you"),
        (
            ["SayHello", "--on-conflict", "after"],
            "--on-conflict is about another task with the same key: add --key KEY",
        ),
        (["SayHello", "--on-parked", "revive"], "--on-parked is about another task with the same key: add --key KEY"),
        (["SayHello", "--debounce", "5m"], "--debounce is about another task with the same key: add --key KEY"),
        (["SayHello", "--key", "k", "--ceiling", "5m"], "--ceiling bounds a debounce: add --debounce TIME"),
        (["SayHello", "--key", "k", "--debounce", "5m", "--ceiling", "1m"], "--ceiling must not be shorter than"),
        (["SayHello", "--key", "k", "--debounce", "5m", "--delay", "1m"], "leave out --delay and --at"),
        (["SayHello", "--key", "k", "--on-conflict", "never"], "argument --on-conflict: invalid choice: 'never'"),
        (["SayHello", "--expires", "1m", "--delay", "5m"], "--expires is before the task is due, so it would never"),
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


def test_enqueue_without_an_app_is_refused(database: str, command: Command) -> None:
    said = command("enqueue", "SayHello")
    assert said.code == 2
    assert "PGTASK_APP" in said.err
    assert command("enqueue", "no_such_module:app", "SayHello").code == 4
