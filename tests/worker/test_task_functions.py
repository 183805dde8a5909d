"""Tasks that are functions, in a worker and on the command line."""

from __future__ import annotations

import calls
import pytest
from fix_commands import Command
from fix_database import run
from fleet import Fleet, Rows

from pgtask import Client


def test_worker_runs_functions_on_the_loop_and_in_threads(dsn: str, rows: Rows) -> None:
    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue_many([calls.note("a"), calls.note("b", times=2)])
            await client.enqueue(calls.note_in_thread("c"))
            await client.enqueue(calls.refuse(why="d"))

    rows("CREATE TABLE noted (text text)")
    run(enqueue())
    with Fleet(dsn, "--burst", app="calls:app") as fleet:
        assert fleet.ends() == 1  # one task is parked
        assert 'tasks="note, note in thread, refuse"' in fleet.output
        assert "step=refuse.Call" in fleet.output
    assert sorted(row[0] for row in rows("SELECT text FROM noted")) == ["a", "b", "b"]
    assert [tuple(row) for row in rows("SELECT step, error FROM pg_task")] == [('{"refuse":{"Call":{"why":"d"}}}', "d")]
    assert [row[0] for row in rows("SELECT step FROM pg_task_archive")] == ['{"note in thread":{"Call":{"text":"c"}}}']


@pytest.mark.parametrize("name", ["note", "note.Call"])
def test_command_enqueues_a_function_by_its_name(name: str, dsn: str, rows: Rows, command: Command) -> None:
    assert command("enqueue", "calls:app", name, '{"text": "Ada"}', "--dsn", dsn).code == 0
    assert rows.value("SELECT step FROM pg_task") == '{"note":{"Call":{"text":"Ada","times":1}}}'


def test_command_names_the_functions_of_an_app(dsn: str, command: Command) -> None:
    said = command("enqueue", "calls:app", "nots", '{"text": "Ada"}', "--dsn", dsn)
    assert "it has note.Call, note in thread.Call, refuse.Call; did you mean note?" in said.err
    said = command("enqueue", "calls:app", "note", '{"txt": "Ada"}', "--dsn", dsn)
    assert "step note.Call has no field 'txt'; its fields: text, times; did you mean text?" in said.err
