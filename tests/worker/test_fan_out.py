"""Outcomes that enqueue, in real workers and in memory: the same tasks run, and soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trees
from fix_database import run
from fleet import Rows, burst, put, working
from patient import PATIENT

from pgtask.testing import MemoryWorker

START = [
    trees.Node("0", [2, 3]),
    trees.Grows(["a", "b", "a"]),
    trees.Grows(["b", "c"]),
    trees.Fans("now", 0.0),
    trees.Fans("soon", 1.0),
]


def in_memory() -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with MemoryWorker(trees.app) as worker:
            for step in START:
                await worker.client.enqueue(step)
            await worker.run()
            worker.client.assert_enqueued(trees.Node, times=9)
            worker.client.assert_enqueued(trees.Closes("a"), key="a", times=2)
            assert not worker.client.assert_enqueued(trees.Closes("b"), key="b").is_new
            return {
                "finished": sorted(task.raw for task in worker.tasks if task.state == "done"),
                "left": sorted((task.raw, task.key, task.queue) for task in worker.tasks if task.state != "done"),
            }

    return run(main())


def in_postgres(dsn: str, rows: Rows) -> dict[str, Any]:
    for statement in trees.LEDGER:
        rows(statement)
    put(dsn, *START)
    burst(dsn, "--concurrency", "1", "--burst-horizon", "5", app="trees:app")
    return {
        "finished": sorted(row[0] for row in rows("SELECT step FROM ledger")),
        "left": sorted(map(tuple, rows("SELECT step, key, queue FROM pg_task"))),
    }


def test_outcomes_enqueue_in_memory_what_they_do_in_postgres(dsn: str, rows: Rows) -> None:
    found = in_postgres(dsn, rows)
    assert found == in_memory()
    assert len(found["finished"]) == 18
    assert found["left"] == []


def test_archived_tasks_enqueue_too(dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREES_ARE_KEPT", "1")
    put(dsn, trees.Node("0", [3, 3]))
    burst(dsn, app="trees:app", procs=2)
    assert rows("SELECT count(*), count(DISTINCT step) FROM pg_task_archive WHERE outcome = 'done'") == [(13, 13)]


ASLEEP = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock')"


def test_new_tasks_run_at_once_where_nothing_notifies(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The worker that waits for tasks polls by itself: neither a notification nor the next poll, an hour from now, is
    what it waits for."""
    rows(f"ALTER DATABASE {rows.value('SELECT quote_ident(current_database())')} SET pgtask.notify = 'off'")
    for statement in trees.LEDGER:
        rows(statement)
    go = tmp_path / "go"
    put(dsn, trees.Waits(str(go)))
    with working(dsn, *PATIENT, app="trees_patient:app"):
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE locked_by IS NOT NULL")
        rows.until(ASLEEP)
        go.touch()
        rows.until("SELECT count(*) = 3 FROM ledger")


def test_new_task_that_the_database_refuses_parks_its_task(dsn: str, rows: Rows) -> None:
    rows("ALTER TABLE pg_task ADD CONSTRAINT none_is_closed CHECK (queue <> 'closed')")
    (id, _) = put(dsn, trees.Rejects(), trees.Node("0", [2]))
    burst(dsn, app="trees:app", code=1)
    ((parked, error),) = rows("SELECT id, error FROM pg_task")
    assert parked == id
    assert error.startswith("the outcome of Tree.Rejects was refused by the database: ")
    assert "none_is_closed" in error
