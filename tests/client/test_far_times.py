"""Times that Postgres holds and Python does not: one row with such a time hides no other, and is shown as it is."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from fix_commands import LEASED, PARKED, Command, insert, insert_many, query
from fix_database import run
from fleet import Fleet, Rows

from pgtask import Client
from pgtask._cli.quantities import format_time, relative_time
from pgtask._postgres.times import FarTime, allow_far_times, from_microseconds, to_microseconds

FAR = {
    "to_timestamp(1764400000000)": "57881-08-11T07:06:40Z",
    "'294276-12-31 23:59:59.999999+00'": "294276-12-31T23:59:59Z",
    "'9999-12-31 23:59:59.999999+00'": "9999-12-31T23:59:59Z",
    "'0001-01-01 00:00+00'": "0001-01-01T00:00:00Z",
    "'10000-01-01 00:00+00'": "10000-01-01T00:00:00Z",
    "'0001-12-31 12:00+00 BC'": "0001-12-31T12:00:00Z BC",
    "'0044-03-15 12:00+00 BC'": "0044-03-15T12:00:00Z BC",
    "'4713-01-01 00:00+00 BC'": "4713-01-01T00:00:00Z BC",
}
NEAR = ("'9999-12-31 23:59:59+00'", "'0001-01-01 00:00:01+00'", "'infinity'", "'-infinity'", "'2026-01-02 03:04:05+00'")
WORKFLOW = """'{"hello":{"Run":null}}'"""


def test_far_time_is_read_and_written_to_the_microsecond(dsn: str) -> None:
    async def check() -> None:
        connection = await asyncpg.connect(dsn)
        await allow_far_times(connection)
        for text in (*FAR, *NEAR):
            time = await connection.fetchval(f"SELECT {text}::timestamptz")
            assert await connection.fetchval(f"SELECT {text}::timestamptz = $1", time), text
            assert time.tzinfo is UTC
            assert isinstance(time, FarTime) == (text in FAR)
            if text in FAR:
                assert str(time) == FAR[text]
                assert await connection.fetchval(f"SELECT date_trunc('s', {text}::timestamptz) = '{time}'::timestamptz")
                assert from_microseconds(to_microseconds(time)) == time
        await connection.close()

    run(check())


def test_far_time_shows_its_distance() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    far = from_microseconds(to_microseconds(now) + 1_000_000_000_000_000_000)
    assert relative_time(far, now) == "in 31688y"
    assert format_time(far, now) == "33714-09-28T01:46:40Z (in 31688y)"
    assert relative_time(from_microseconds(to_microseconds(now) - 100_000_000_000_000_000), now) == "3169y ago"
    assert relative_time(datetime.max.replace(tzinfo=UTC), now) == "never"
    assert relative_time(now + timedelta(days=800), now) == "in 2y"
    assert relative_time(now - timedelta(days=700), now) == "700d ago"
    with pytest.raises(OverflowError):
        from_microseconds(2**64)


@pytest.mark.parametrize("column", ["wakeup_at", "created_at", "updated_at", "lock_expires_at"])
def test_commands_show_far_times(column: str, dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    insert(dsn)
    state = LEASED if column == "lock_expires_at" else {}
    tasks = {insert(dsn, **{**state, column: text}): shown for text, shown in FAR.items()}
    listed = {row["id"]: row[column] for row in command("list", "--json").objects}
    assert {task: listed[task] for task in tasks} == tasks
    assert len(command("list").out.splitlines()) == 2 + len(tasks)
    assert command("stats").code == command("stats", "--json").code == command("runs").code == 0
    for task, shown in tasks.items():
        assert shown in command("show", task).out or column == "lock_expires_at"
        assert command("show", task, "--json").objects[0][column] == shown
    assert command("cancel", *tasks, "--force").out == f"{len(tasks)} tasks cancelled\n"


def test_lists_continue_through_far_times(dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    states: list[tuple[dict[str, str], str]] = [({}, "wakeup_at"), (PARKED, "wakeup_at"), (LEASED, "lock_expires_at")]
    insert_many(dsn, 2 * [{**state, column: text} for text in (*FAR, *NEAR) for state, column in states])
    seen: list[str] = []
    words: list[str] = []
    for _ in range(len(FAR) + len(NEAR)):
        page = command("list", "--json", "-n", "7", *words)
        seen += [row["id"] for row in page.objects]
        if page.cursor is None:
            break
        words = ["--after", page.cursor]
    assert len(seen) == len(set(seen)) == 6 * (len(FAR) + len(NEAR))
    assert command("retry", "--parked").out == f"{2 * (len(FAR) + len(NEAR))} tasks made due\n"


def test_runs_of_far_times_have_the_last_datetime(dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    tasks = {insert(dsn, step=WORKFLOW, wakeup_at=text): text for text in FAR}
    for task, text in tasks.items():
        query(dsn, "INSERT INTO pg_task_runs (id, name) VALUES ($1, 'hello')", UUID(task))
        query(
            dsn,
            "INSERT INTO pg_task_checkpoints (run, number, place, kind, name, due_at) "
            f"VALUES ($1, 1, '1', 'sleep', 'nap', {text})",
            UUID(task),
        )
    assert {row["id"]: row["due_at"] for row in command("runs", "--json").objects} == {
        task: FAR[text] for task, text in tasks.items()
    }
    for task, text in tasks.items():
        assert FAR[text] in command("run", task).out
        page = json.loads(command("run", task, "--json").out)
        assert (page["due_at"], page["checkpoints"][0]["due_at"]) == (FAR[text], FAR[text])

    async def ask() -> list[Any]:
        async with Client(dsn) as client:
            return [*[await client.run(UUID(task)).status() for task in tasks], *(await client.runs())]

    for status in run(ask()):
        assert status.due_at.year in (1, 9999)
        assert status.due_at.tzinfo is UTC


def test_run_due_before_year_one_is_run(dsn: str) -> None:
    """Its worker reads its time as well."""
    rows = Rows(dsn)
    for text in ("'4713-01-01 00:00+00 BC'", "'0001-01-01 00:00+00'", "'-infinity'"):
        insert(dsn, step="""'{"child":{"Run":21}}'""", wakeup_at=text)
    with Fleet(dsn, app="flows:app") as fleet:
        rows.until("SELECT count(*) = 3 FROM pg_task_runs WHERE output = '42'")
    assert "worker.died" not in fleet.output


def test_prune_goes_through_far_times(dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    for text in FAR:
        insert(dsn, **PARKED, wakeup_at=text)
    assert command("prune", "--parked", "--older-than", "1d", "--batch", "1").out == "4 parked tasks removed\n"
