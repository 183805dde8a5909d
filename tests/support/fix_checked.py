"""A database with all that the app of `checked` has left before a change: tasks in each state, and open runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import fleet
import pytest
from checked import CHANGES, FILLED, fan, order, parent
from fix_commands import query
from fix_database import fresh_database, run

from pgtask import Client, Workflow

RUNS: dict[Workflow[Any, Any], int | None] = {order: 1, fan: None, parent: None}
STATES = (
    "wakeup_at = now()",
    "wakeup_at = now() + interval '3 days'",
    "wakeup_at = 'infinity'",
    "error = 'boom'",
    "locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 h', claims = 1",
)


@pytest.fixture(scope="module")
def filled(cluster: str, template: str) -> Iterator[str]:
    """The database, for all tests of a module; they change nothing in it."""
    for dsn in fresh_database(cluster, template):
        run(trigger_runs(dsn))
        fleet.burst(dsn, app="checked:app_before")
        for at, step in enumerate(FILLED):
            query(dsn, "INSERT INTO pg_task (step) VALUES ($1)", step)
            query(dsn, f"UPDATE pg_task SET {STATES[at % len(STATES)]} WHERE step = $1", step)
        yield dsn


async def trigger_runs(dsn: str) -> None:
    async with Client(dsn) as client:
        for flow, value in RUNS.items():
            handle = await client.trigger(flow, value)
            if flow is fan:
                await handle.signal("go", 5)


@pytest.fixture
def waiting(filled: str, cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A copy of that database, which the commands find."""
    for dsn in fresh_database(cluster, urlsplit(filled).path[1:]):
        monkeypatch.setenv("PGTASK_DSN", dsn)
        yield dsn


def parked_by_worker(dsn: str, change: str) -> set[str]:
    """Run all that waits by a worker of the new code; return the steps and workflows that it parks."""
    query(dsn, "UPDATE pg_task_checkpoints SET due_at = now() WHERE kind = 'sleep'")
    query(
        dsn,
        "UPDATE pg_task SET error = NULL, locked_by = NULL, lock_expires_at = NULL, claims = 0, wakeup_at = now()",
    )
    expected = 1 if CHANGES[change].breaks else 0
    fleet.burst(dsn, "--unknown", "park", app=f"checked:app_{change}", code=expected)
    rows = query(dsn, "SELECT split_part(step, '\"', 2), split_part(step, '\"', 4) FROM pg_task WHERE error <> ''")
    return {task if step == "Run" else f"{task}.{step}" for task, step in rows}
