"""Steps that run in batches, on real workers: who shares a call, what each step gets, and what a failure costs."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from pathlib import Path
from uuid import uuid4

import batched
import pytest
from fleet import Fleet, Rows, burst, put, ready, stop, working

APP = "batched:app"


@pytest.fixture(autouse=True)
def calls(rows: Rows) -> None:
    rows(batched.CALLS.strip())


def sizes(rows: Rows, step: str) -> list[int]:
    return [row[0] for row in rows("SELECT cardinality(numbers) FROM call WHERE step = $1 AND kind = ''", step)]


def ran(rows: Rows, step: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for (numbers,) in rows("SELECT numbers FROM call WHERE step = $1", step):
        found.update(numbers)
    return found


def parked(rows: Rows) -> dict[int, str]:
    """Return the first lines of the errors of parked tasks, by the number of their step."""
    query = "SELECT (substring(step FROM '\"number\":(\\d+)'))::integer, error FROM pg_task WHERE error IS NOT NULL"
    return {number: error.partition("\n")[0] for number, error in rows(query)}


# --- which steps share a call


def test_each_step_runs_once_in_batches_of_the_size(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Plain(number) for number in range(400)))
    fleet = burst(dsn, procs=2, app=APP)
    assert ran(rows, "Plain") == Counter(range(400))
    found = sizes(rows, "Plain")
    assert max(found) == 16
    assert len(found) <= 100, "most batches are small"
    assert "400 tasks done, 400 steps, 0 errors" in fleet.output


def test_steps_of_one_call_have_one_value_of_by(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.ByModel(number, "abc"[number % 3]) for number in range(90)))
    burst(dsn, app=APP)
    assert {row[0] for row in rows("SELECT kind FROM call")} == {"a", "b", "c"}
    assert ran(rows, "ByModel") == Counter(range(90))


def test_steps_that_wait_for_a_batch_hold_no_slot(dsn: str, rows: Rows) -> None:
    with working(dsn, "--concurrency", "1", app=APP):
        put(dsn, *(batched.Lingering(number) for number in range(7)))
        rows.until("SELECT count(*) = 7 FROM pg_task WHERE locked_by IS NOT NULL")
        put(dsn, batched.Single(1))
        rows.until("SELECT count(*) = 1 FROM call WHERE step = 'Single'")
        assert sizes(rows, "Lingering") == []
        put(dsn, batched.Lingering(7))  # which fills the batch
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert sizes(rows, "Lingering") == [8]


def test_batch_takes_the_slot_of_a_single_step_that_ends(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with working(dsn, "--concurrency", "1", app=APP):
        put(dsn, *(batched.Brief(number) for number in range(3)))
        rows.until("SELECT count(*) = 3 FROM pg_task WHERE locked_by IS NOT NULL")
        put(dsn, batched.Held(1, str(tmp_path / "go")))
        rows.until("SELECT count(*) = 1 FROM call WHERE step = 'Held'")
        (tmp_path / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert ran(rows, "Brief") == Counter(range(3))


def test_linger_ends_a_batch_that_is_not_full(dsn: str, rows: Rows) -> None:
    with working(dsn, app=APP):
        put(dsn, *(batched.Brief(number) for number in range(30)))
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert sum(sizes(rows, "Brief")) == 30


def test_end_of_a_burst_does_not_wait_for_a_linger(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Lingering(number) for number in range(11)))
    burst(dsn, app=APP)
    assert sorted(sizes(rows, "Lingering")) == [3, 8]


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGQUIT])
def test_stop_releases_what_lingers_untouched(dsn: str, rows: Rows, order: signal.Signals) -> None:
    with ready(dsn, app=APP) as fleet:
        put(dsn, *(batched.Lingering(number) for number in range(5)))
        rows.until("SELECT count(*) = 5 FROM pg_task WHERE locked_by IS NOT NULL")
        stop(fleet, dsn, order)
    assert rows.value("SELECT count(*) FROM pg_task WHERE tried = 0 AND claims = 0 AND error IS NULL") == 5
    assert ran(rows, "Lingering") == Counter()


def test_reload_during_a_linger_charges_no_step(dsn: str, rows: Rows) -> None:
    with working(dsn, app=APP) as fleet:
        put(dsn, *(batched.Lingering(number) for number in range(5)))
        rows.until("SELECT count(*) = 5 FROM pg_task WHERE locked_by IS NOT NULL")
        fleet.send(signal.SIGHUP)
        fleet.until("reload.done")
        rows.until("SELECT count(*) = 5 FROM pg_task WHERE locked_by IS NOT NULL AND claims = 1")
        put(dsn, *(batched.Lingering(number) for number in range(5, 8)))
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert ran(rows, "Lingering") == Counter(range(8))


def test_kill_during_a_linger_charges_no_step(dsn: str, rows: Rows) -> None:
    with working(dsn, app=APP) as fleet:
        put(dsn, *(batched.Lingering(number) for number in range(5)))
        rows.until("SELECT count(*) = 5 FROM pg_task WHERE locked_by IS NOT NULL")
        fleet.family()[0].kill()
        fleet.until("worker.died")
        rows.until("SELECT count(*) = 5 FROM pg_task WHERE locked_by IS NOT NULL AND claims = 1")
        put(dsn, *(batched.Lingering(number) for number in range(5, 8)))
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert sizes(rows, "Lingering") == [8]


# --- what each step gets


def test_each_step_gets_its_own_outcome(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Each(number) for number in range(40)))
    fleet = burst(dsn, app=APP, code=1)
    assert Counter(parked(rows).values()) == {"no": 10, "KeyError: 'one'": 10}
    assert all((number % 4 == 1) == (error == "no") for number, error in parked(rows).items())
    assert "20 tasks done, 20 parked" in fleet.output


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("short", r"returned \d+ outcomes for \d+ steps; return .* for all, or a list"),
        ("long", r"returned \d+ outcomes for \d+ steps; return"),
        ("none", "returned None: a return is missing; return"),
        ("generator", "returned <generator object .*>; return"),
        ("number", "returned 7; return"),
    ],
)
def test_wrong_result_fails_all_steps_and_is_logged_once(dsn: str, rows: Rows, how: str, error: str) -> None:
    put(dsn, *(batched.Wrong(number, how) for number in range(10)))
    fleet = burst(dsn, app=APP, code=1)
    assert sorted(parked(rows)) == list(range(10))
    for text in parked(rows).values():
        assert re.match(f"Batched.Wrong {error}", text), text
    assert "task.parked" not in fleet.output
    assert fleet.output.count("batch.wrong_outcome") <= 5, "each step has a line"


def test_wrong_element_fails_its_step(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Wrong(number, "elements") for number in range(3)))
    burst(dsn, app=APP, code=1)
    assert set(parked(rows).values()) == {"Batched.Wrong returned 3; return Next(...), Done() or Fail(...)"}


def test_finished_steps_are_archived(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Kept(number) for number in range(25)))
    burst(dsn, app=APP)
    assert rows.value("SELECT count(*) FROM pg_task_archive") == 25


# --- what a failure costs


def test_exception_parks_the_step_that_raises_alone(dsn: str, rows: Rows) -> None:
    bad = {5, 6, 150}
    put(dsn, *(batched.Plain(number, bad=number in bad) for number in range(160)))
    burst(dsn, app=APP, code=1)
    assert parked(rows) == {
        number: f"ValueError: bad are [{number}] (at {batched.__file__}:{line_of('bad are')} in run_batch)"
        for number in bad
    }
    query = "SELECT array_length(numbers, 1) FROM call"
    assert len(rows(query)) <= len(sizes(rows, "Plain")) <= 160 / 2 + len(bad) * 10
    assert rows.value("SELECT max(attempt) FROM (SELECT unnest(attempts) AS attempt FROM call) AS each") == 1


def line_of(text: str) -> int:
    lines = Path(batched.__file__).read_text().splitlines()
    return 1 + next(at for at, line in enumerate(lines) if text in line)


def test_one_culprit_costs_two_calls_for_each_halving(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Plain(number, bad=number == 9) for number in range(16)))
    rows("UPDATE pg_task SET wakeup_at = '2026-01-01'")
    burst(dsn, app=APP, code=1)
    found = sizes(rows, "Plain")
    whole = sum(1 for size in found if size == max(found))
    assert len(found) - whole <= 2 * 4 + 2
    assert len(parked(rows)) == 1


def test_retried_step_keeps_its_own_count_of_tries(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Retried(number, fails=number % 3) for number in range(30)))
    burst(dsn, app=APP, code=1)
    assert sorted(parked(rows)) == list(range(2, 30, 3))
    assert rows.value("SELECT array_agg(DISTINCT tried) FROM pg_task") == [2]
    assert ran(rows, "Retried") == Counter({number: 1 + (number % 3 > 0) for number in range(30)})


def test_timeout_fails_the_step_that_hangs_alone(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Slow(number, hangs=number == 3) for number in range(16)))
    burst(dsn, app=APP, code=1)
    assert list(parked(rows)) == [3]
    assert parked(rows)[3].startswith("Batched.Slow ran longer than its timeout of 0.3 s")
    assert ran(rows, "Slow") == Counter(set(range(16)) - {3})


def test_halves_of_a_thread_wait_for_its_end(dsn: str, rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "calls"
    put(dsn, *(batched.SlowInThread(number, str(path), waits=number == 3) for number in range(8)))
    fleet = burst(dsn, app=APP, code=1)
    assert parked(rows) == {3: "Batched.SlowInThread ran longer than its timeout of 0.3 s"}
    assert "worker.died" not in fleet.output
    under_way: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        kind, _, numbers = line.partition(" ")
        under_way.update(dict.fromkeys(numbers.split(","), 1 if kind == "begin" else -1))
        assert max(under_way.values()) <= 1, "two calls with the same step ran side by side"


def test_step_that_ends_its_session_harms_no_other(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Cutter(number, cuts=number == 3) for number in range(8)))
    burst(dsn, app=APP, code=1)
    assert list(parked(rows)) == [3]
    assert rows.value("SELECT count(*) FROM pg_task") == 1


def test_lost_lease_drops_the_outcome_of_its_step_only(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with ready(dsn, app=APP) as fleet:
        put(dsn, *(batched.Gated(number, str(tmp_path / "go")) for number in range(10)))
        rows.until("SELECT sum(cardinality(numbers)) = 10 FROM call")
        rows(
            """UPDATE pg_task SET locked_by = $1, lock_expires_at = 'infinity' WHERE step LIKE '%"number":4,%'""",
            uuid4(),
        )
        (tmp_path / "go").touch()
        rows.until("SELECT count(*) = 1 FROM pg_task")
        fleet.until("lease.lost")
    assert rows.value("SELECT step FROM pg_task").count('"number":4,') == 1


def test_stop_cancels_a_batch_and_releases_its_steps(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with ready(dsn, "--grace", "0.2", app=APP) as fleet:
        put(dsn, *(batched.Gated(number, str(tmp_path / "never")) for number in range(10)))
        rows.until("SELECT sum(cardinality(numbers)) = 10 FROM call")
        stop(fleet, dsn)
    assert rows.value("SELECT count(*) FROM pg_task WHERE tried = 0 AND claims = 0 AND error IS NULL") == 10


def test_lost_connection_of_a_batch_costs_no_try(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with ready(dsn, app=APP) as fleet:
        put(dsn, *(batched.Gated(number, str(tmp_path / "go")) for number in range(10)))
        rows.until("SELECT sum(cardinality(numbers)) = 10 FROM call")
        rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )
        (tmp_path / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        stop(fleet, dsn)
    assert rows.value("SELECT max(attempt) FROM (SELECT unnest(attempts) AS attempt FROM call) AS each") == 1


def test_death_parks_the_step_that_kills_and_no_other(dsn: str, rows: Rows) -> None:
    put(dsn, *(batched.Poisoned(number, kills=number == 7) for number in range(30)))
    with Fleet(dsn, "--burst", app=APP) as fleet:
        assert fleet.ends(100) == 1, fleet.output
    assert list(parked(rows)) == [7]
    assert parked(rows)[7].startswith("worker process died 3 times while running Batched.Poisoned")
    assert rows("SELECT tried FROM pg_task") == [(0,)]
    assert rows.value("SELECT count(*) FROM pg_task") == 1
    assert set(ran(rows, "Poisoned")) == set(range(30))


def test_kill_of_a_worker_loses_no_step_of_its_batches(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with Fleet(dsn, "--burst", app=APP, procs=2) as fleet:
        put(dsn, *(batched.Gated(number, str(tmp_path / "go")) for number in range(40)))
        rows.until("SELECT sum(cardinality(numbers)) = 40 FROM call")
        os.kill(rows.value("SELECT max(pid) FROM call"), signal.SIGKILL)
        fleet.until("worker.died")
        (tmp_path / "go").touch()
        assert fleet.ends(100) == 0, fleet.output
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    ended: Counter[int] = Counter()
    for (numbers,) in rows("SELECT numbers FROM call WHERE kind = 'end'"):
        ended.update(numbers)
    assert set(ended) == set(range(40))
