"""Batches whose steps a transaction holds (hold.py), and what fails under it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import fleet
import pytest
from fleet import SHORT_LEASE, Fleet, Rows, put
from held import WARM_UP, Together, open_ledger, runs, until_run

ENDED = "SELECT count(*), count(DISTINCT task) FROM ledger WHERE what = 'DELETE'"
HELD = "SELECT count(*) FROM ledger WHERE held AND what = 'DELETE'"


def burst(dsn: str, *arguments: str, code: int = 0) -> Fleet:
    return fleet.burst(dsn, *arguments, procs=1, app="held:app", code=code)


def working(dsn: str, *arguments: str, procs: int = 1) -> Any:
    return fleet.working(dsn, *arguments, procs=procs, app="held:app")


def put_among(dsn: str, *steps: Together) -> list[Any]:
    """Enqueue steps among others, which a worker holds by the time that it comes to them; return their ids."""
    others = [Together(number) for number in range(2 * WARM_UP)]
    ids = put(dsn, *others, *steps, *others[:WARM_UP])
    return list(ids[2 * WARM_UP : 2 * WARM_UP + len(steps)])


@pytest.fixture
def ledger(rows: Rows) -> Rows:
    open_ledger(rows)
    return rows


def assert_ended_once(ledger: Rows, tasks: int) -> None:
    assert ledger.until("SELECT count(*) FROM pg_task HAVING count(*) = 0", holds=lambda value: value == 0) == 0
    assert [tuple(row) for row in ledger(ENDED)] == [(tasks, tasks)]


def test_batches_are_held_and_end_once(dsn: str, ledger: Rows) -> None:
    put_among(dsn)
    burst(dsn)
    assert_ended_once(ledger, 3 * WARM_UP)
    assert ledger.value(HELD) > WARM_UP


def test_each_step_of_a_held_batch_gets_its_own_outcome(dsn: str, ledger: Rows) -> None:
    kinds = ("next", "later", "fail", "error")
    ids = put_among(dsn, *(Together(1, kind) for kind in kinds))
    burst(dsn, code=1)
    assert dict(ledger("SELECT id, split_part(error, ' (', 1) FROM pg_task")) == {
        ids[2]: "as told",
        ids[3]: "ValueError: as told",
    }
    assert dict(ledger("SELECT id, tried FROM pg_task")) == {ids[2]: 1, ids[3]: 2}


def test_culprit_of_a_held_batch_is_found_by_halves(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    """The halves run in the same turn. Both tries of the culprit divide a batch."""
    path = tmp_path / "path"
    (culprit,) = put_among(dsn, Together(1, "raise", str(path)))
    burst(dsn, code=1)
    assert [tuple(row) for row in ledger("SELECT id, tried FROM pg_task")] == [(culprit, 2)]
    assert [tuple(row) for row in ledger(ENDED)] == [(3 * WARM_UP, 3 * WARM_UP)]
    assert len(runs(path)) <= 2 * (2 * 7 + 2)


def test_wrong_number_of_outcomes_fails_a_try_of_all(dsn: str, ledger: Rows) -> None:
    (task,) = put_among(dsn, Together(1, "short"))
    done = burst(dsn, code=1)
    assert "batch.wrong_outcome" in done.output
    parked = dict(ledger("SELECT id, tried FROM pg_task WHERE error LIKE '%outcomes for%'"))
    assert parked[task] == 2
    assert set(parked.values()) == {2}
    assert len(parked) <= 100


@pytest.mark.parametrize("what", ["suspend", "transact"])
def test_held_batch_that_waits_is_leased(dsn: str, ledger: Rows, what: str, tmp_path: Path) -> None:
    """Its class was proven. A transaction of it begins when the turn has leased the tasks."""
    ledger("CREATE TABLE effect (task uuid)")
    ids = put_among(dsn, *(Together(1, what, str(tmp_path / "path")) for _ in range(100)))
    burst(dsn)
    assert_ended_once(ledger, 3 * WARM_UP + 100)
    if what == "transact":
        assert ledger("SELECT count(*), count(DISTINCT task) FROM effect WHERE task = ANY ($1)", ids) == [(100, 100)]


def test_death_in_a_held_batch_charges_its_steps_alone(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    (task,) = put_among(dsn, Together(1, "gate", str(gate)))
    with working(dsn) as workers:
        os.kill(until_run(gate), signal.SIGKILL)
        workers.until("task.suspect")
        charged = {row[0] for row in ledger("SELECT id FROM pg_task WHERE claims > 0")}
        assert task in charged
        assert len(charged) <= 100
        gate.touch()
        assert_ended_once(ledger, 3 * WARM_UP + 1)


@pytest.mark.faults
def test_poison_in_a_held_batch_is_parked_alone(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    (poison,) = put_among(dsn, Together(1, "kill", str(tmp_path / "path")))
    burst(dsn, code=1)
    ((task, error),) = ledger("SELECT id, error FROM pg_task")
    assert task == poison
    assert "worker process died 3 times while running Held.Together" in error
    assert [tuple(row) for row in ledger(ENDED)] == [(3 * WARM_UP, 3 * WARM_UP)]
    assert ledger.value("SELECT count(*) FROM ledger WHERE error IS NOT NULL") <= 1


def test_stop_ends_a_held_batch(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    put_among(dsn, Together(1, "gate", str(gate)))
    with working(dsn) as workers:
        until_run(gate)
        workers.process.terminate()
        gate.touch()
        assert workers.process.wait(30) == 0
    assert ledger.value("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL OR claims > 0 OR tried > 0") == 0
    burst(dsn)
    assert_ended_once(ledger, 3 * WARM_UP + 1)


def test_call_that_blocks_past_the_lease_gets_leases(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    """No other worker runs it, and blocks as well."""
    gate = tmp_path / "gate"
    (task,) = put_among(dsn, Together(1, "gate", str(gate)))
    with working(dsn, *SHORT_LEASE) as workers:
        until_run(gate)
        workers.until("hold.blocked")
        assert ledger("SELECT claims FROM pg_task WHERE locked_by IS NOT NULL AND id = $1", task) == [(1,)]
        gate.touch()
        assert_ended_once(ledger, 3 * WARM_UP + 1)
    assert len(runs(gate)) == 1
