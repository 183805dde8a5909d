"""`pgtask list` and `pgtask show`: each state, all pages, and plans that never sort the table."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import termios
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from fix_commands import EXPIRED, FILL, LEASED, PARKED, Command, insert, process, query, with_connection
from greeter import APP, HELLO

from pgtask._cli.commands import list as list_command
from pgtask._postgres import listing
from pgtask._postgres.store import statement

# --- list


def test_list_shows_each_state_in_turn(database: str, command: Command) -> None:
    insert(database, **PARKED, wakeup_at="now() - interval '2 h'")
    insert(database, wakeup_at="now() + interval '5 min 25 s'")
    insert(database, **LEASED)
    insert(database, queue="'emails'", priority="7", wakeup_at="now() - interval '2 h'")
    said = command("list")
    assert (said.code, said.err) == (0, "")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["id", "state", "step", "queue", "prio", "tried", "when", "error"]
    assert [line[1:6] for line in lines[1:]] == [
        ["leased", "Greeter.SayHello", "default", "0", "0"],
        ["ready", "Greeter.SayHello", "emails", "7", "0"],
        ["scheduled", "Greeter.SayHello", "default", "0", "0"],
        ["parked", "Greeter.SayHello", "default", "0", "6"],
    ]
    leased, *others = [" ".join(line[6:]) for line in lines[1:]]
    assert re.fullmatch("ends in [0-9]+s", leased)
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
def test_filters_find_all_tasks_at_any_scan_limit(
    scan: int, database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    query(database, FILL)
    monkeypatch.setattr(listing, "SCAN_LIMIT", scan)
    monkeypatch.setattr(list_command, "SCAN_LIMIT", scan)
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


def test_cut_scan_is_noted(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    query(database, FILL)
    monkeypatch.setattr(listing, "SCAN_LIMIT", 100)
    monkeypatch.setattr(list_command, "SCAN_LIMIT", 100)
    said = command("list", "--task", "Nope")
    assert (said.code, said.out) == (0, "")
    assert said.err.startswith("pgtask: read 100 tasks and stopped among the ready ones; to continue: --after ")


def test_list_of_an_empty_table_is_noted(database: str, command: Command) -> None:
    assert command("list") == (0, "", "pgtask: no tasks\n")
    assert command("list", "--json").out == ""


def test_list_shows_claims_if_a_task_was_claimed_again(database: str, command: Command) -> None:
    insert(database, claims="1")
    assert "claims" not in command("list").out
    insert(database, claims="3")
    head, *lines = command("list").out.splitlines()
    assert head.split()[-1] == "claims"
    assert sorted(line.split()[-1] for line in lines) == ["1", "3"]


def test_filter_without_matches_is_noted(database: str, command: Command) -> None:
    insert(database)
    assert command("list", "--step", "Nope") == (0, "", "pgtask: no tasks match\n")
    assert command("list", "--state", "parked") == (0, "", "pgtask: no tasks match\n")


@pytest.mark.parametrize("queue", ["", "a.", "a.b", "default"])
def test_cursor_never_ends_in_a_dot(queue: str) -> None:
    cursor = listing.Cursor("ready", queue, 0, 0, 0, 0)
    assert not str(cursor).endswith(".")
    assert listing.Cursor.parse(str(cursor)) == cursor


def test_missing_app_attribute_names_the_real_app(database: str, command: Command) -> None:
    said = command("graph", "greeter:nope")
    assert (said.code, said.out) == (4, "")
    assert said.err.endswith(f"has no attribute 'nope'; did you mean {APP}?\n")
    assert command("graph", "greeter:Greeter").err.endswith(f"not a pgtask.App; did you mean {APP}?\n")
    assert command("enqueue", "greeter.py:app", "SayHello").err.endswith(f"did you mean {APP}?\n")


HIDDEN = ("trace", "limit_cost", "group_id")


def test_list_json_holds_the_whole_row_on_one_line(database: str, command: Command) -> None:
    step = """'{ "Greeter":\n {"SayHello": {"name": "é\\u0000"}}}'"""
    task = insert(database, step=step, **PARKED, **LEASED, key="'k'", queue="'q'", priority="-1")
    long = insert(database, step="repeat('x', 5000)", error="repeat('y', 5000)")
    rows = {row["id"]: row for row in command("list", "--json").objects}
    row = rows[task]
    columns = query(database, "SELECT attname FROM pg_attribute WHERE attrelid = 'pg_task'::regclass AND attnum > 0")
    assert set(row) == {*(name for (name,) in columns if name not in HIDDEN), "state", "label", "cursor", "behind_id"}
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


@pytest.mark.parametrize(("columns", "expected"), [(150, "one line"), (60, "two lines")])
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
        assert lines[1].startswith(f"{task[-8:]}  parked  Greeter.SayHello  default     0      6  60m ago  日本")
    else:
        assert lines[0].split() == ["id", "state", "step", "tried", "when"]
        assert lines[1].rstrip() == f"{task[-8:]}  parked  Greeter.SayHello      6  60m ago"
        assert lines[2].startswith("    日本")
    assert len(lines) == (2 if expected == "one line" else 3)


# --- show


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
    assert re.search(r"expired ([6-9][0-9]s|[1-9]m) ago: any worker may take the task\n", command("show", expired).out)


def test_show_takes_the_beginning_of_an_id(database: str, command: Command) -> None:
    for last in range(12):
        insert(database, id=f"'01234567-89ab-cdef-8000-0000000000{last:02}'")
    insert(database, id="'01234567-ffff-ffff-ffff-ffffffffffff'", step="'no JSON'")
    assert "no JSON" in command("show", "01234567-FF").out
    assert command("show", "0123456789abcdef8000000000000003").code == 0
    said = command("show", "01234567-8")
    assert (said.code, said.out) == (1, "")
    first, *lines, more = said.err.splitlines()
    assert first == "pgtask: 01234567-8: more than one task has these digits, give more of them:"
    assert lines[0] == "pgtask:   01234567-89ab-cdef-8000-000000000000  ready  Greeter.SayHello"
    assert (len(lines), more) == (10, "pgtask:   and more than 10 in all")
    for nobody in ("012345670", "00000000-0000-4000-8000-000000000000"):
        said = command("show", nobody)
        assert (said.code, said.out) == (1, "")
        assert said.err == f"pgtask: {nobody}: there is no such task: finished, cancelled, or never existed\n"


# --- at scale


# A branch of a plan that a constant has switched off.
NOTHING_TO_SORT = re.compile(r"->  Sort [^>]*->  Result [^>]*One-Time Filter: false")


MATCHING = (["parked", "ready"], "^x", ["q"], "E%", 1.5, ["a", "1"])


def test_statements_never_scan_or_sort_the_table(database: str) -> None:
    """With and without statistics; a plan that is right for millions of rows is asked for here of a thousand."""
    never, long_ago, now = datetime.max, datetime.min, datetime.now(UTC)
    ids = [UUID(int=number) for number in range(3)]
    statements: list[tuple[Any, ...]] = [
        ("list_tasks", "parked", "^x", ["q"], 0, now, never, (0, 1), 10, 5, "E%", now, ["%1%", "1", "a", "1"], now),
        ("list_tasks", "leased", "^x", ["q"], 0, now, long_ago, (0, 1), 10, 5, "E%", now, ["%1%", "1", "a", "1"], now),
        ("list_tasks", "waiting", "^x", ["q"], 0, now, long_ago, (0, 1), 10, 5, "E%", now, ["%1%", "1", "a", "1"], now),
        ("describe", ids, 100),
        ("find_prefix", ids[0], ids[1], 3),
        ("find_ending", "01234567", 3),
        ("retry", ids),
        ("cancel", ids, False),
        ("reschedule", ids, now),
        ("move", ids, "other", 1),
        ("find_runs", ids),
        ("keyed", ["Greeter/one"], *MATCHING),
        ("bulk/retry", ids, *MATCHING),
        ("bulk/reschedule", ids, *MATCHING, now),
        ("bulk/move", ids, *MATCHING, "other", 1),
        ("bulk/lock", ids, *MATCHING, False),
        ("bulk/count_retry", ids, *MATCHING),
        ("bulk/count_reschedule", ids, *MATCHING, now),
        ("bulk/count_move", ids, *MATCHING, "other", 1),
        ("bulk/count_cancel", ids, *MATCHING, False),
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
                plan = NOTHING_TO_SORT.sub("", "\n".join(line[0] for line in lines))
                assert "Index" in plan, name
                # Parked tasks of one time only: their order in the index is not that of their places.
                assert ("Presorted Key: pg_task.wakeup_at" in plan or "Presorted Key: wakeup_at" in plan) == (
                    "parked" in args[:1]
                )
                assert not re.search(r"Seq Scan|Bitmap|(?<!Incremental )Sort(?! Key)", plan), f"{name}:\n{plan}"

    with_connection(database, explain)


# --- keys, and tasks that wait behind others


BEHIND = {"key": "'/Greeter/k'", "behind": "now() + interval '1 h'", "wakeup_at": "'infinity'"}


def test_task_behind_another_one_names_it(database: str, command: Command) -> None:
    first = insert(database, **LEASED, key="'Greeter/k'")
    second = insert(database, **BEHIND)
    insert(database, key="'Greeter/other'")
    lines = command("list").out.splitlines()
    assert lines[-1].split()[1:] == ["scheduled", "Greeter.SayHello", "default", "0", "0", "behind", first]
    assert f"\nbehind      {first}, which has its key; when that has left the table" in command("show", second).out
    assert "behind" not in command("show", first).out
    assert [row["behind_id"] for row in command("list", "--json").objects] == [None, None, first]
    assert command("show", second, "--json").objects[0]["behind_id"] == first
    query(database, "DELETE FROM pg_task WHERE id = $1", UUID(first))
    assert command("list").out.splitlines()[-1].endswith("is next")
    assert "has just gone: a worker makes this one due" in command("show", second).out


def test_list_and_retry_find_tasks_by_key(database: str, command: Command) -> None:
    first = insert(database, **PARKED, key="'Greeter/k'")
    second = insert(database, **BEHIND)
    for others in ("'Greeter/l'", "'Mailer/k'"):
        insert(database, **PARKED, key=others)
    for scope in (["--task", "Greeter"], ["--step", "Greeter.SayHello"]):
        found = command("list", "--key", "k", *scope, "--json")
        assert (found.code, found.err) == (0, "")
        assert [row["id"] for row in found.objects] == sorted([first, second])
    assert len(command("list", "--key", "k", "--task", "Greeter").out.splitlines()) == 3
    assert len(command("list", "--key", "k", "--task", "Greeter", "-n", "1", "--json").objects) == 1
    assert command("list", "--key", "m", "--task", "Greeter").err == "pgtask: no tasks match\n"
    assert command("retry", "--parked", "--key", "k", "--task", "Greeter").out == "1 task made due\n"
    assert command("list", "--json", "--key", "k", "--task", "Greeter").objects[0]["state"] == "ready"


@pytest.mark.parametrize("command_words", [["list"], ["retry", "--parked"]])
def test_key_without_its_task_is_refused(command: Command, command_words: list[str]) -> None:
    said = command(*command_words, "--key", "k", "--step", "SayHello")
    assert (said.code, said.err) == (2, "pgtask: --key k: a key belongs to a task or workflow; name it by --task\n")
    said = command(*command_words, "--key", "", "--task", "Greeter")
    assert (said.code, said.err) == (2, "pgtask: --key '' must be 1 to 512 characters without NUL\n")


def test_several_queues_are_listed(database: str, command: Command) -> None:
    ids = {
        queue: [insert(database, queue=f"'{queue}'"), insert(database, queue=f"'{queue}'", **PARKED)] for queue in "abc"
    }
    wanted = {*ids["a"], *ids["c"]}
    for words in (["-q", "a,c"], ["-q", "a", "-q", "c"], ["--queue", "a, c"], ["-q", "c,a,c"]):
        found = [row["id"] for row in command("list", "--json", *words).objects]
        assert (len(found), set(found)) == (4, wanted)
    assert command("retry", "--parked", "-q", "a,c").out == "2 tasks made due\n"
    said = command("list", "-q", "a,")
    assert (said.code, said.out) == (2, "")
    assert "queue '' must be a printable string" in said.err
