"""What steps write in `ctx.transaction()` is there exactly once, whatever dies."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fix_database import run
from fix_pgbouncer import Bouncer
from fleet import SHORT_LEASE, Fleet, Rows, put, ready, stop, until_none
from transacting import SINK, Rest

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate

APP = "transacting:app"
TASKS = int(os.environ.get("PGTASK_TEST_SINK_TASKS", "200000"))
"""The size of the large test."""

IDLE = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pgtask step' "
    "AND state LIKE 'idle in transaction%'"
)
END_BACKENDS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name ~ '^pgtask (step|worker)'"
)


def assert_exactly_once(rows: Rows, tasks: int, steps: tuple[str, ...] = ("Insert", "Last")) -> None:
    """Each step of each task has written one row."""
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    for step in steps:
        found = rows("SELECT count(*), count(DISTINCT number) FROM sink WHERE step = $1", step)[0]
        assert tuple(found) == (tasks, tasks), f"{step}: rows, and numbers among them"


def fill(rows: Rows, tasks: int) -> None:
    rows(SINK)
    text = '{"Sinking":{"Insert":{"number":%s}}}'
    rows("INSERT INTO pg_task (step) SELECT format($1, n) FROM generate_series(1, $2) AS n", text, tasks)


def take_away(fleet: Fleet, rows: Rows, faults: str, tasks: int) -> None:
    """Bring about faults, one for each letter, spread over the work: k(ill), t(erminate the backends), s(top a worker
    beyond its lease)."""
    chance = random.Random(7)
    for number, fault in enumerate(faults, 1):
        goal = 2 * tasks * number // (len(faults) + 1)
        rows.until("SELECT count(*) >= $1 FROM sink", goal, timeout=600)
        workers = fleet.family()
        if fault == "k" and workers:
            chance.choice(workers).kill()
        elif fault == "t":
            rows(END_BACKENDS)
        elif fault == "s" and workers:
            frozen = chance.choice(workers)
            frozen.suspend()
            rows.until("SELECT count(*) = 0 FROM pg_task WHERE locked_by::text LIKE $1", tokens_of(rows, frozen) + "%")
            frozen.resume()


def idle_sessions(rows: Rows) -> list[int]:
    """Return the sessions of steps that are between two statements of a transaction."""
    return [row[0] for row in rows(IDLE)]


def tokens_of(rows: Rows, worker: psutil.Process) -> str:
    """Return the beginning of all tokens of a worker."""
    name = rows.value(
        "SELECT application_name FROM pg_stat_activity WHERE application_name ~ $1",
        f"^pgtask worker {worker.pid} [0-9a-f]+$",
    )
    half = name.split()[-1]
    return f"{half[:8]}-{half[8:12]}-{half[12:16]}"


@pytest.mark.timeout(300)
@pytest.mark.faults
def test_rows_are_written_once_under_kills(dsn: str, rows: Rows) -> None:
    fill(rows, 600)
    with ready(dsn, *SHORT_LEASE, procs=2, app=APP) as fleet:
        take_away(fleet, rows, "ktktk", 600)
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=120)
        stop(fleet, dsn)
    assert_exactly_once(rows, 600)


def test_frozen_worker_loses_its_transaction(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The server ends the transaction of a worker that stands still, another worker runs the task, and when the first
    one goes on, it writes nothing."""
    go = tmp_path / "go"
    rows(SINK)
    with ready(dsn, *SHORT_LEASE, procs=2, app=APP) as fleet:
        put(dsn, Rest(1, str(go)))
        held = f"SELECT count(*) FROM ({IDLE}) AS idle"
        rows.until(held)
        token = rows.value("SELECT locked_by FROM pg_task")
        (pid,) = idle_sessions(rows)
        holder = next(worker for worker in fleet.family() if str(token).startswith(tokens_of(rows, worker)))
        holder.suspend()
        rows.until("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1", pid)
        rows.until("SELECT locked_by IS DISTINCT FROM $1 AND locked_by IS NOT NULL FROM pg_task", token)
        rows.until(held)
        go.touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        holder.resume()
        fleet.until("lease.lost")
        stop(fleet, dsn)
    assert rows.value("SELECT array_agg(pid) FROM sink") != [holder.pid]
    assert rows.value("SELECT count(*) FROM sink") == 1


def test_stop_waits_for_a_transaction(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """A drain waits for the step; what the grace does not suffice for is rolled back, and costs no try."""
    go = tmp_path / "go"
    rows(SINK)
    with ready(dsn, procs=1, app=APP) as fleet:
        put(dsn, Rest(1, str(go)))
        rows.until(f"SELECT count(*) FROM ({IDLE}) AS idle")
        fleet.send(signal.SIGTERM)
        fleet.until("stopping")
        go.touch()
        assert fleet.ends() == 0, fleet.output  # a second signal would stop it at once
        stop(fleet, dsn)
    assert_exactly_once(rows, 1, ("Rest",))
    go.unlink()
    with ready(dsn, "--grace", "0.1", procs=1, app=APP) as fleet:
        put(dsn, Rest(2, str(go)))
        rows.until(f"SELECT count(*) FROM ({IDLE}) AS idle")
        stop(fleet, dsn)
    assert rows.value("SELECT count(*) FROM sink") == 1
    assert [tuple(row) for row in rows("SELECT tried, claims, locked_by FROM pg_task")] == [(0, 0, None)]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Path]:
    try:
        run(migrate(embedded.start(tmp_path)))
        yield tmp_path
    finally:
        embedded.stop(tmp_path)


@pytest.mark.timeout(300)
@pytest.mark.faults
def test_rows_are_written_once_across_a_server_restart(own_server: Path) -> None:
    """An immediate shutdown: the server recovers from its log."""
    dsn = embedded.start(own_server)
    rows = Rows(dsn)
    fill(rows, 1000)
    with ready(dsn, *SHORT_LEASE, procs=2, app=APP) as fleet:
        rows.until("SELECT count(*) >= 300 FROM sink")
        restart_at_once(own_server)
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=120)
        stop(fleet, dsn)
    assert_exactly_once(rows, 1000)


def restart_at_once(directory: Path) -> None:
    """Kill the postmaster, as an immediate shutdown does, and start the server again."""
    pid = int((directory / ".pgtask" / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGQUIT)
    until_none(lambda: [psutil.Process(pid)] if psutil.pid_exists(pid) else [])
    embedded.start(directory)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_many_rows_are_written_once_whatever_happens(own_server: Path) -> None:
    """50 kills, 20 terminations, two workers frozen beyond their leases and a restart of the server. The environment
    variable PGTASK_TEST_SINK_TASKS gives another number of tasks."""
    dsn = embedded.start(own_server)
    rows = Rows(dsn)
    faults = list("k" * 50 + "t" * 20 + "ss")
    random.Random(3).shuffle(faults)
    fill(rows, TASKS)
    with ready(dsn, *SHORT_LEASE, procs=2, app=APP) as fleet:
        middle = len(faults) // 2
        take_away(fleet, rows, "".join(faults[:middle]), TASKS // 2)
        restart_at_once(own_server)
        rows.until("SELECT count(*) >= $1 FROM sink", TASKS, timeout=1800)
        take_away(fleet, rows, "".join(faults[middle:]), TASKS)
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=1800)
        stop(fleet, dsn)
    assert_exactly_once(rows, TASKS)


def test_rows_are_written_once_behind_pgbouncer(bouncer: Bouncer) -> None:
    bouncer.start()
    rows = Rows(bouncer.direct)
    fill(rows, 200)
    with Fleet(bouncer.dsn, "--no-listen", *SHORT_LEASE, app=APP, procs=2) as fleet:
        fleet.until("worker.ready", times=2)
        rows.until("SELECT count(*) >= 100 FROM sink")
        fleet.family()[0].kill()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0, fleet.output
    assert_exactly_once(rows, 200)
