"""What a batch writes in `ctx.transaction()` commits together with the outcomes of its steps, or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from uuid import uuid4

import asyncpg
import batched
import pytest
from fix_database import run
from fleet import SHORT_LEASE, Fleet, Rows, burst, put, ready, working

APP = "batched:app"


@pytest.fixture(autouse=True)
def tables(rows: Rows) -> None:
    rows(batched.CALLS.strip())
    rows(batched.LOADED)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHED_GATE", str(tmp_path / "gate"))
    return tmp_path / "gate"


def loaded(rows: Rows) -> list[int]:
    return [row[0] for row in rows("SELECT number FROM loaded ORDER BY number")]


def test_rows_and_outcomes_commit_together(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Loaded(number) for number in range(1, 201)))
    fleet = burst(dsn, procs=2, app=APP)
    assert loaded(rows) == list(range(1, 201))
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert "200 tasks done, 200 steps, 0 errors" in fleet.output


def test_each_step_of_a_transaction_gets_its_outcome(dsn: str, rows: Rows) -> None:
    hows = ["", "next", "fail", "error"]
    put(dsn, *(batched.Loaded(number, hows[number % 4]) for number in range(1, 41)))
    burst(dsn, app=APP, code=1)
    assert loaded(rows) == list(range(1, 41))
    errors = rows("SELECT substring(error, 1, 8) AS what, count(*) FROM pg_task GROUP BY what ORDER BY what")
    assert [tuple(row) for row in errors] == [("KeyError", 10), ("no", 10)]
    assert rows.value("SELECT count(*) FROM call WHERE step = 'Single'") == 10


@pytest.mark.parametrize(
    ("how", "error"), [("raise", "ValueError: after"), ("wrong", "Batched.Loaded returned 5; return Next")]
)
def test_step_that_fails_leaves_no_row_and_the_others_do(dsn: str, rows: Rows, how: str, error: str) -> None:
    put(dsn, *(batched.Loaded(number, how if number == 7 else "") for number in range(1, 17)))
    burst(dsn, app=APP, code=1)
    assert loaded(rows) == [number for number in range(1, 17) if number != 7]
    assert [row[0].startswith(error) for row in rows("SELECT error FROM pg_task")] == [True]


def test_row_that_is_refused_at_the_commit_fails_its_step(dsn: str, rows: Rows) -> None:
    rows("ALTER TABLE loaded ADD CONSTRAINT none UNIQUE (number) DEFERRABLE INITIALLY DEFERRED")
    rows("INSERT INTO loaded VALUES (5)")
    rows("ALTER TABLE loaded DROP CONSTRAINT loaded_pkey")
    put(dsn, *(batched.Loaded(number) for number in range(1, 17)))
    burst(dsn, app=APP, code=1)
    assert loaded(rows) == list(range(1, 17))
    (error,) = rows("SELECT error FROM pg_task")
    assert "duplicate key" in error[0]


def test_lost_lease_repeats_the_call_without_its_step(dsn: str, rows: Rows, gate: Path) -> None:
    put(dsn, *(batched.Loaded(number, "gate") for number in range(1, 17)))
    with ready(dsn, app=APP) as fleet:
        rows.until("SELECT count(*) > 0 FROM call WHERE step = 'inside'")
        rows.until("SELECT sum(cardinality(numbers)) = 16 FROM call WHERE step = 'Loaded'")
        stolen = "UPDATE pg_task SET locked_by = $1, lock_expires_at = 'infinity' WHERE step LIKE '%\"number\":4,%'"
        rows(stolen, uuid4())
        gate.touch()
        rows.until("SELECT count(*) = 1 FROM pg_task")
        fleet.until("lease.lost")
    assert loaded(rows) == [number for number in range(1, 17) if number != 4]


def test_lease_that_is_known_to_be_lost_is_not_called_again(dsn: str, rows: Rows, gate: Path) -> None:
    put(dsn, *(batched.Loaded(number, "gate") for number in range(1, 17)))
    with ready(dsn, *SHORT_LEASE, app=APP) as fleet:
        rows.until("SELECT sum(cardinality(numbers)) = 16 FROM call WHERE step = 'Loaded'")
        stolen = "UPDATE pg_task SET locked_by = $1, lock_expires_at = 'infinity' WHERE step LIKE '%\"number\":4,%'"
        rows(stolen, uuid4())
        fleet.until("lease.lost")
        gate.touch()
        rows.until("SELECT count(*) = 1 FROM pg_task")
    assert loaded(rows) == [number for number in range(1, 17) if number != 4]
    assert rows.value("SELECT count(*) FROM call WHERE 4 = ANY (numbers)") == 1
    assert fleet.output.count("lease.lost") == 1


def test_locked_key_of_one_step_delays_that_step_only(dsn: str, rows: Rows) -> None:
    async def hold_key() -> None:
        connection = await asyncpg.connect(dsn)
        async with connection.transaction():
            await connection.execute(
                "INSERT INTO pg_task (step, key, wakeup_at) VALUES ('\"x\"', 'Batched/k', 'infinity')"
            )
            await asyncio.to_thread(rows.until, "SELECT count(*) = 7 FROM loaded")
        await connection.close()

    put(dsn, *(batched.Keyed(number, "k" if number == 3 else None) for number in range(8)))
    with working(dsn, app=APP):
        run(hold_key())
        rows.until("SELECT count(*) = 8 FROM loaded")
        rows("DELETE FROM pg_task WHERE key = 'Batched/k'")
    assert rows.value("SELECT count(*) FROM pg_task WHERE error IS NOT NULL") == 0


def test_transaction_after_the_end_of_a_call_is_refused(dsn: str, rows: Rows, gate: Path) -> None:
    put(dsn, batched.Stray(1))
    with working(dsn, app=APP):
        rows.until("SELECT count(*) = 0 FROM pg_task")
        gate.touch()
        rows.until("SELECT count(*) = 1 FROM call WHERE kind ~ 'outside of the call'")
    assert loaded(rows) == []


def test_kills_and_lost_sessions_write_each_row_once(dsn: str, rows: Rows, gate: Path) -> None:
    put(dsn, *(batched.Loaded(number, "gate" if number % 50 == 0 else "") for number in range(1, 301)))
    with Fleet(dsn, "--burst", app=APP, procs=2) as fleet:
        rows.until("SELECT count(*) > 0 FROM call WHERE step = 'inside'")
        os.kill(rows.value("SELECT pid FROM call WHERE pid IS NOT NULL LIMIT 1"), signal.SIGKILL)
        fleet.until("worker.died")
        rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )
        gate.touch()
        assert fleet.ends(100) == 0, fleet.output
    assert loaded(rows) == list(range(1, 301))
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_transaction_in_a_thread_is_refused(dsn: str, rows: Rows) -> None:
    put(dsn, batched.LoadedInThread(1))
    burst(dsn, app=APP, code=1)
    assert "runs in a thread, where ctx.transaction() cannot be used: make it async def run_batch" in rows.value(
        "SELECT error FROM pg_task"
    )
