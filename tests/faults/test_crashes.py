"""Crashes of a real fleet: leases are released at once, and only the right tasks implicated. See also `test_halves`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import asyncpg
import poison
import psutil
import pytest
from feeder import OPEN_BURST, feeding
from fix_database import run
from fleet import SHORT_LEASE, Fleet, Rows, is_alive, put, until_none
from marks import MARKS
from poison_fleet import burst, until_begun, working

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate

HELD = "SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL"


# --- release of orphaned leases


def test_leases_of_killed_worker_are_released_at_once(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The leases would last a minute. Tasks behind a blocking step never started: their claims are undone."""
    go = tmp_path / "go"
    with working(dsn, "--concurrency", "100", "--batch", "100") as fleet:
        put(dsn, poison.Blocked(str(go)), *(poison.Short(number) for number in range(50)))
        pid = until_begun(go)
        os.kill(pid, signal.SIGKILL)
        fleet.until("leases.released")
        assert rows.until("SELECT count(*) = 50 FROM mark")
        assert until_begun(go, 2) != pid
        assert rows("SELECT claims, tried FROM pg_task") == [(2, 0)]
        go.touch()
        assert rows.until("SELECT count(*) = 0 FROM pg_task")
        assert rows.value("SELECT count(*) FROM mark") == 50
    assert " executing=1" in fleet.output


def test_death_implicates_only_executing_tasks(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """Tasks that are suspended, in a thread or on the loop are executing; tasks that wait for their turn are not."""
    go = tmp_path / "go"
    with working(dsn, "--concurrency", "100", "--batch", "100") as fleet:
        put(dsn, poison.Stubborn(), poison.Begins(), poison.Threaded())
        rows.until("SELECT count(*) = 2 FROM mark")
        put(dsn, poison.Blocked(str(go)), *(poison.Short() for number in range(20)))
        pid = until_begun(go)
        os.kill(pid, signal.SIGKILL)
        fleet.until("leases.released")
        rows.until("SELECT count(*) = 4 FROM pg_task")
        rows("UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL")
        assert {row[0] for row in rows("SELECT tried FROM pg_task")} == {0}
    assert " executing=4" in fleet.output
    assert fleet.output.count("task.suspect") == 4


def test_reaper_waits_for_locked_row(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """It skips the row that another session has locked, releases the others, and that row when it is free."""
    with working(dsn) as fleet:
        task, *_ = put(dsn, *[poison.Begins(str(tmp_path / "go"))] * 3)
        rows.until("SELECT count(*) = 3 FROM mark")
        pid = rows.value("SELECT max(pid) FROM mark")

        async def hold() -> None:
            connection = await asyncpg.connect(dsn)
            async with connection.transaction():
                await connection.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", task)
                os.kill(pid, signal.SIGKILL)
                await asyncio.to_thread(rows.until, f"{HELD} AND claims = 1 HAVING count(*) = 1")
            await connection.close()

        run(hold())
        fleet.until("leases.released")
        (tmp_path / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert "tasks=3 executing=3" in fleet.output


def test_waiting_reapers_do_not_delay_later_ones(dsn: str, rows: Rows) -> None:
    with working(dsn) as fleet:

        async def hold(deaths: int) -> None:
            connection = await asyncpg.connect(dsn)
            async with connection.transaction():
                for death in range(deaths):
                    (task,) = await asyncio.to_thread(put, dsn, poison.Begins())
                    pid = await asyncio.to_thread(rows.until, "SELECT max(pid) FROM mark WHERE task = $1", task)
                    if death < deaths - 1:
                        await connection.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", task)
                    os.kill(pid, signal.SIGKILL)
                    await asyncio.to_thread(fleet.until, "worker.ready")
                assert await asyncio.to_thread(rows.until, "SELECT count(*) > 1 FROM mark WHERE task = $1", task)
            await connection.close()

        run(hold(5))


@pytest.mark.faults
def test_flush_of_a_frozen_backend_does_not_rewind_its_task(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The worker gives up the connection at its deadline and goes on; then the old backend carries out the flush."""
    pump = "SELECT pid FROM pg_stat_activity WHERE application_name ~ '^pgtask worker .*[0-9a-f]$'"
    with working(dsn):
        put(dsn, poison.Follows(os.devnull))  # whose two outcomes prepare the statement on this connection
        rows.until("SELECT count(*) = 0 FROM pg_task")
        put(dsn, poison.Chained(str(tmp_path / "go")))
        rows.until("SELECT count(*) = 1 FROM mark WHERE step = 'step 0'")
        backend = rows.value(pump)
        os.kill(backend, signal.SIGSTOP)
        try:
            (tmp_path / "go").touch()
            rows.until("SELECT count(*) = 1 FROM mark WHERE step = 'step 3'", timeout=60)
        finally:
            os.kill(backend, signal.SIGCONT)
        rows.until("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1", backend)
        assert json.loads(rows.value("SELECT step FROM pg_task"))["Neighbours"]["Chained"]["number"] == 3


def test_reaper_releases_claim_that_commits_after_the_death(dsn: str, rows: Rows) -> None:
    """The session of the claim outlives the worker by more than a second, since it waits for a lock."""
    with working(dsn) as fleet:
        (worker,) = fleet.family()
        (name,) = rows(
            "SELECT application_name FROM pg_stat_activity WHERE application_name ~ '^pgtask worker .*[0-9a-f]$'"
        )
        rows(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
            f"IF current_setting('application_name') = '{name[0]}' THEN "
            "PERFORM set_config('lock_timeout', '0', true); PERFORM pg_advisory_xact_lock(7); END IF; "
            "RETURN NULL; END$$"
        )
        rows("CREATE TRIGGER wait AFTER UPDATE ON pg_task FOR EACH STATEMENT EXECUTE FUNCTION wait()")

        async def hold() -> None:
            connection = await asyncpg.connect(dsn)
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock(7)")
                await asyncio.to_thread(put, dsn, *(poison.Short() for _ in range(20)))
                waits = "SELECT FROM pg_stat_activity WHERE application_name = $1 AND wait_event = 'advisory'"
                await asyncio.to_thread(rows.until, f"SELECT EXISTS ({waits})", name[0])
                worker.kill()
                await asyncio.to_thread(fleet.until, "worker.ready")
                await connection.execute("SELECT pg_sleep(1.5)")
            await connection.close()

        run(hold())
        fleet.until("leases.released")
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert re.search(r"leases\.released .*tasks=[1-9]\d* executing=0", fleet.output)


@pytest.mark.parametrize(
    "order",
    [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2],
    ids=lambda order: order.name,
)
def test_signal_to_process_group_does_not_end_reaper(dsn: str, rows: Rows, order: signal.Signals) -> None:
    """Signals to stop are for workers; the reaper has little to do, and the supervisor waits for it."""
    with working(dsn) as fleet:
        task, *_ = put(dsn, *[poison.Begins()] * 2)
        rows.until("SELECT count(*) = 2 FROM mark")
        pid = rows.value("SELECT max(pid) FROM mark")

        async def hold() -> None:
            connection = await asyncpg.connect(dsn)
            async with connection.transaction():
                await connection.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", task)
                os.kill(pid, signal.SIGKILL)
                await asyncio.to_thread(rows.until, f"{HELD} AND claims = 1 HAVING count(*) = 1")
                (reaper,) = [process for process in fleet.family() if process.name() == "pgtask reaper"]
                reaper.send_signal(order)
            await connection.close()

        run(hold())
        fleet.until("leases.released")


def test_leases_of_workers_killed_at_once_are_released(dsn: str, rows: Rows) -> None:
    with working(dsn, "--concurrency", "10", procs=4) as fleet:
        put(dsn, *[poison.Begins()] * 40)
        rows.until("SELECT count(*) = 40 FROM mark")
        dead = {row[0] for row in rows("SELECT DISTINCT pid FROM mark")}
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        fleet.until("leases.released", times=len(dead))
        assert rows.value("SELECT count(*) FROM pg_task WHERE tried > 0 OR error IS NOT NULL") == 0
        assert fleet.output.count("task.suspect") == 40
        fleet.send(signal.SIGQUIT)
        assert fleet.ends() == 0
    assert rows.value(HELD) == 0


def test_reaper_waits_for_unavailable_database(tmp_path: Path) -> None:
    """The lease would last a minute after the database is back."""
    dsn = embedded.start(tmp_path)
    try:
        run(migrate(dsn))
        rows = Rows(dsn)
        rows(MARKS)
        with working(dsn, procs=1) as fleet:
            put(dsn, poison.Begins())
            pid = rows.until("SELECT max(pid) FROM mark")
            embedded.stop(tmp_path)
            os.kill(pid, signal.SIGKILL)
            fleet.until('database.unavailable connection="pgtask reaper"')
            embedded.start(tmp_path)
            fleet.until("leases.released")
            rows.until("SELECT count(*) = 2 FROM mark")
    finally:
        embedded.stop(tmp_path)


@pytest.mark.faults
def test_outage_longer_than_lease_implicates_no_task(tmp_path: Path) -> None:
    """Each worker releases its own tasks, also those in threads, in any order of reconnection, and no death counts."""
    dsn = embedded.start(tmp_path)
    go = tmp_path / "go"
    try:
        run(migrate(dsn))
        rows = Rows(dsn)
        rows(MARKS)
        lease = ("--lease-timeout", "4", "--heartbeat-interval", "1")
        with working(dsn, *lease, "--concurrency", "20", procs=3) as fleet:
            put(dsn, *[poison.Stubborn(str(go))] * 10, *[poison.Threaded(str(go))] * 3, *[poison.Short()] * 20)
            rows.until("SELECT count(*) = 30 FROM mark")
            embedded.stop(tmp_path)
            lost = 0
            while lost < 13:  # a line may count several, and there are ten of a worker in a second
                more = re.search(r" more=(\d+)", fleet.until("lease.lost"))
                lost += int(more[1]) if more else 1
            embedded.start(tmp_path)
            fleet.until("database.recovered", times=3)
            rows.until("SELECT count(*) >= 40 FROM mark")  # a thread keeps its slot until it ends
            assert rows.value("SELECT max(claims) FROM pg_task") == 1
            go.touch()
            rows.until("SELECT count(*) = 0 FROM pg_task")
            fleet.send(signal.SIGTERM)
            assert fleet.ends() == 0
        assert "lease.expired" not in fleet.output
        assert "suspect" not in fleet.output
    finally:
        embedded.stop(tmp_path)


def test_stop_does_not_wait_for_reaper_without_database(tmp_path: Path) -> None:
    dsn = embedded.start(tmp_path)
    try:
        run(migrate(dsn))
        with Fleet(dsn, "--grace", "1", app="poison:app") as fleet:
            fleet.until("worker.ready")
            (worker,) = fleet.family()
            embedded.stop(tmp_path)
            worker.kill()
            fleet.until('database.unavailable connection="pgtask reaper"')
            fleet.send(signal.SIGTERM)
            assert fleet.ends() == 0
    finally:
        embedded.stop(tmp_path)


# --- the supervisor dies, a worker is suspended


def until_gone(family: list[psutil.Process]) -> None:
    """Wait until all of them have ended; a zombie has, since init may reap it late."""
    until_none(lambda: [process for process in family if is_alive(process)])


def test_worker_with_blocked_loop_exits_with_its_supervisor(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with working(dsn) as fleet:
        put(dsn, poison.Blocked(str(tmp_path / "never")))
        until_begun(tmp_path / "never")
        family = fleet.family()
        fleet.process.kill()
        until_gone(family)


def test_workers_exit_when_their_supervisor_is_killed(dsn: str, rows: Rows) -> None:
    """They do not wait for their grace, and no death counts against the tasks that ran."""
    with working(dsn, "--grace", "600", procs=3) as fleet:
        put(dsn, *[poison.Stubborn()] * 30)
        rows.until("SELECT count(*) = 30 FROM mark")
        family = fleet.family()
        fleet.process.kill()
        until_gone(family)
    assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL OR claims > 0 OR tried > 0") == 0
    rows.until("SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name LIKE 'pgtask worker%'")


@pytest.mark.parametrize("others", ["run it", pytest.param("have finished it", marks=pytest.mark.faults)])
def test_suspended_worker_writes_nothing_after_its_lease(dsn: str, rows: Rows, tmp_path: Path, others: str) -> None:
    go = tmp_path / "go"
    with working(dsn, *SHORT_LEASE, procs=2) as fleet:
        (task,) = put(dsn, poison.Stubborn(str(go)))
        pid = rows.until("SELECT max(pid) FROM mark")
        os.kill(pid, signal.SIGSTOP)
        try:
            rows.until("SELECT count(*) = 2 FROM mark", timeout=20)
            held = rows("SELECT locked_by, claims, tried FROM pg_task")
            assert held[0]["claims"] == 2
            if others == "have finished it":
                go.touch()
                rows.until("SELECT count(*) = 0 FROM pg_task")
                rows("INSERT INTO pg_task (id, step, wakeup_at) VALUES ($1, '{}', 'infinity')", task)
        finally:
            os.kill(pid, signal.SIGCONT)
        go.touch()
        fleet.until("lease.lost")
        if others == "have finished it":
            assert rows.value("SELECT step FROM pg_task") == "{}"
        else:
            rows.until("SELECT count(*) = 0 FROM pg_task")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert rows.value("SELECT count(*) FROM mark") == 2


def test_usr1_to_process_group_harms_no_worker(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with working(dsn, procs=2) as fleet:
        put(dsn, *[poison.Begins(str(tmp_path / "go"))] * 3)
        rows.until("SELECT count(*) = 3 FROM mark")
        os.killpg(fleet.process.pid, signal.SIGUSR1)
        fleet.until("worker.status", times=2)
        (tmp_path / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert "worker.died" not in fleet.output


def test_worker_that_dies_after_stop_command_is_not_replaced(dsn: str, rows: Rows) -> None:
    with working(dsn, procs=2) as fleet:
        put(dsn, poison.Begins())
        pid = rows.until("SELECT max(pid) FROM mark")
        rows("SELECT pg_notify('pg_task_changed', 'stop_worker')")
        fleet.until("supervisor.stopping cause=stop_worker")
        os.kill(pid, signal.SIGKILL)
        assert fleet.ends() == 0
    assert fleet.output.count("worker.ready") == 2


def test_worker_that_recovers_from_silence_has_its_grace(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """It is replaced, but the steps beside the one that blocked the loop finish."""
    with working(dsn, "--stall", "2") as fleet:
        put(dsn, *[poison.Wide(6.0)] * 2)
        rows.until("SELECT count(*) = 2 FROM mark")
        put(dsn, poison.Blocked(str(tmp_path / "go")))
        until_begun(tmp_path / "go")
        fleet.until("worker.stalled")
        (tmp_path / "go").touch()
        fleet.until("worker.exited")
        assert rows.value("SELECT count(*) FROM mark WHERE step = 'end'") == 2
        assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert "worker.overdue" not in fleet.output
    assert "task.suspect" not in fleet.output


# --- implicated and poisoned tasks


@pytest.mark.faults
def test_task_that_silences_its_workers_is_parked_with_stacks(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The supervisor killed the process because of the task, and not because memory was short."""
    (task,) = put(dsn, poison.Blocked(str(tmp_path / "never")))
    rows("UPDATE pg_task SET claims = 2")
    with working(dsn, "--stall", "2") as fleet:
        assert f" task={task}" in fleet.until("worker.silent")
        first, *stack = rows.until("SELECT error FROM pg_task").splitlines()
    assert first == (
        "worker process died 3 times while running Neighbours.Blocked: its loop was silent for 2 s (--stall)"
    )
    assert "thread 0x" in stack[0].lower()
    assert "poison.py" in stack[1]


def test_crash_of_forked_process_does_not_count_for_worker(dsn: str, rows: Rows) -> None:
    put(dsn, poison.ForksACrash())
    with working(dsn) as fleet:
        os.kill(rows.until("SELECT max(pid) FROM mark"), signal.SIGKILL)
        fleet.until("leases.released")
    assert "Segmentation" not in fleet.output


@pytest.mark.faults
def test_tasks_that_kill_their_process_are_parked_with_cause(dsn: str, rows: Rows) -> None:
    """Each needs as many deaths as it takes to run alone, and three at least; its neighbours are unharmed."""
    rows("CREATE TABLE finished (task uuid PRIMARY KEY)")
    rows(
        "CREATE FUNCTION finish() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN INSERT INTO finished VALUES (OLD.id); RETURN NULL; END$$"
    )
    rows("CREATE TRIGGER finish AFTER DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION finish()")
    shorts = [poison.Short(number) for number in range(996)]
    kinds = (poison.Segfault(), poison.Exit(7), poison.KillsItself(), poison.KillsItselfInThread())
    put(dsn, *shorts[:300], kinds[0], *shorts[300:500], kinds[1], *shorts[500:700], *kinds[2:], *shorts[700:])
    fleet = burst(dsn, "--concurrency", "20")
    parked = {row["step"]: row for row in rows("SELECT * FROM pg_task")}
    texts = sorted(row["error"] for row in parked.values())
    assert [text.partition("\n")[0] for text in texts] == [
        "worker process died 3 times while running Poison.Exit: exit code 7",
        "worker process died 3 times while running Poison.KillsItself: SIGKILL (out of memory?)",
        "worker process died 3 times while running Poison.KillsItselfInThread: SIGKILL (out of memory?)",
        "worker process died 3 times while running Poison.Segfault: SIGSEGV",
    ]
    assert "string_at" in texts[3]
    assert {(row["tried"], row["claims"]) for row in parked.values()} == {(0, 0)}
    assert rows.value("SELECT count(*) FROM finished") == 996
    assert 8 < fleet.output.count("worker.died") <= 4 * (5 + 3)  # one death may be the first of two tasks
    runs = rows("SELECT count(*) AS runs FROM mark WHERE step = 'Short' GROUP BY task")
    assert len(runs) == 996
    assert max(row["runs"] for row in runs) <= 4 * (5 + 3)
    retried = rows.value("SELECT count(DISTINCT attempt) FROM mark WHERE step = 'Short'")
    assert retried == 1


@pytest.mark.parametrize("suspends", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_task_that_kills_its_process_after_return_is_parked(dsn: str, rows: Rows, suspends: bool) -> None:
    """Its outcome was not written, so the death implicates it; it does not park a suspect of two crashes beside it."""
    (guilty,) = put(dsn, poison.DiesAfterwards(suspends))
    (innocent,) = put(dsn, poison.Wide(0.5))
    rows("UPDATE pg_task SET claims = CASE id WHEN $1 THEN 1 ELSE 2 END", guilty)
    fleet = burst(dsn, procs=1)
    assert rows("SELECT id, split_part(error, ':', 1) FROM pg_task") == [
        (guilty, "worker process died 3 times while running Poison.DiesAfterwards")
    ]
    assert fleet.output.count("worker.died") == 2
    assert rows.value("SELECT count(*) FROM mark WHERE task = $1 AND step = 'end'", innocent) == 1


def test_returned_task_is_implicated_beside_executing_ones(dsn: str, rows: Rows, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with working(dsn) as fleet:
        put(dsn, *[poison.Begins(str(go))] * 3)
        rows.until("SELECT count(*) = 3 FROM mark")
        (guilty,) = put(dsn, poison.DiesAfterwards(suspends=False))
        fleet.until("executing=4")
        go.touch()
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE error IS NOT NULL AND id = $1", guilty)
        rows.until("SELECT count(*) = 1 FROM pg_task")


def test_crash_keeps_stack_of_crashed_thread_among_many(dsn: str, rows: Rows) -> None:
    put(dsn, poison.SegfaultAmongThreads())
    rows("UPDATE pg_task SET claims = 2")
    burst(dsn, procs=1)
    lines = rows.value("SELECT error FROM pg_task").splitlines()
    assert lines[0] == "worker process died 3 times while running Poison.SegfaultAmongThreads: SIGSEGV"
    assert "Current thread" in lines[3]
    assert "string_at" in lines[4]


@pytest.mark.parametrize("style", ["text", "json"])
def test_log_event_of_crash_has_its_stacks(dsn: str, rows: Rows, style: str) -> None:
    put(dsn, poison.Segfault())
    rows("UPDATE pg_task SET claims = 2")
    fleet = burst(dsn, "--log", style, procs=1)
    if style == "text":
        _, _, below = fleet.output.partition("worker.died worker=1 ")
        assert below.splitlines()[1] == "Fatal Python error: Segmentation fault"
        return
    entries = [json.loads(line) for line in fleet.lines]
    (died,) = [entry for entry in entries if entry["event"] == "worker.died"]
    assert died["fields"]["signal"] == "SIGSEGV"
    assert "string_at" in died["exception"]


@pytest.mark.faults
def test_poisoned_task_among_a_thousand_is_parked(dsn: str, rows: Rows) -> None:
    """Only the tasks that the first death interrupted, or whose outcome was not yet written, run again."""
    others = [poison.Wide(0.2) for _ in range(999)]
    put(dsn, *others[:500], poison.KillsItself(), *others[500:])
    fleet = burst(dsn, "--concurrency", "10", procs=3)
    deaths = re.findall(r"worker\.died .*pid=(\d+)", fleet.output)
    assert 3 <= len(deaths) <= 4 + 3
    cut_off = int(re.findall(r"leases\.released .*executing=(\d+)", fleet.output)[0]) - 1
    runs = rows(
        "SELECT (array_agg(pid ORDER BY at))[1] AS first, count(*) AS times FROM mark "
        "WHERE step = 'begin' GROUP BY task"
    )
    again = [row for row in runs if row["times"] > 1]
    assert len(runs) == 999
    assert {row["first"] for row in again} <= {int(deaths[0])}, "a later death has cut somebody off"
    unwritten = rows.value(
        "SELECT count(*) FROM mark AS one WHERE step = 'end' AND pid = $1 "
        "AND EXISTS (SELECT FROM mark AS two WHERE two.task = one.task AND two.step = 'begin' AND two.pid <> $1)",
        int(deaths[0]),
    )
    assert len(again) <= cut_off + unwritten
    assert max(row["times"] for row in runs) <= len(deaths) + 1
    assert rows("SELECT error, tried, claims FROM pg_task") == [
        ("worker process died 3 times while running Poison.KillsItself: SIGKILL (out of memory?)", 0, 0)
    ]


@pytest.mark.faults
def test_suspect_that_dies_late_is_parked_alone(dsn: str, rows: Rows) -> None:
    """Its second run has company when it dies; that implicates the company too, but only a third death parks it."""
    with working(dsn, "--concurrency", "5", procs=1) as fleet:
        (poisoned,) = put(dsn, poison.DiesLate(6.0), priority=1)
        rows.until("SELECT count(*) = 1 FROM mark")
        pid = rows.value("SELECT pid FROM mark")
        os.kill(pid, signal.SIGKILL)  # its first death
        rows.until("SELECT count(*) = 2 FROM mark")
        put(dsn, poison.Wide(3.0))
        rows.until("SELECT count(*) = 3 FROM mark")  # in company after five seconds
        fleet.until("executing=2")
        assert rows.until("SELECT error FROM pg_task WHERE id = $1", poisoned, timeout=40).startswith("worker process")
        assert rows.value("SELECT count(*) FROM pg_task WHERE error IS NOT NULL") == 1
        assert rows.value("SELECT count(*) FROM mark WHERE task = $1", poisoned) == 3


def test_suspect_runs_alone(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The queue always has other tasks, and it ends when another worker has begun some of them beside it."""
    elsewhere = (
        "SELECT count(*) > 20 FROM mark AS a, mark AS b WHERE b.step = 'alone' AND a.pid <> b.pid AND a.at > b.at"
    )
    with working(dsn, "--concurrency", "20", procs=2) as fleet:
        with feeding(dsn, lambda _: poison.Wide()):
            put(dsn, poison.Recovers(str(tmp_path / "died"), str(tmp_path / "go")), priority=1)
            fleet.until("worker.died")
            rows.until(elsewhere)
            (tmp_path / "go").touch()
            ((pid, begin, end),) = rows_until_alone(rows)
        beside = rows.value(
            "SELECT count(*) FROM mark AS a JOIN mark AS b USING (task, pid) "
            "WHERE a.step = 'begin' AND b.step = 'end' AND pid = $1 AND a.at < $3 AND b.at > $2",
            *(pid, begin, end),
        )
        assert beside == 0


def rows_until_alone(rows: Rows) -> list[Any]:
    rows.until("SELECT count(*) = 1 FROM mark WHERE step = 'alone no more'")
    return rows(
        "SELECT a.pid, a.at, b.at FROM mark AS a JOIN mark AS b USING (task) "
        "WHERE a.step = 'alone' AND b.step = 'alone no more'"
    )


@pytest.mark.faults
def test_many_suspects_do_not_slow_down_the_fleet(dsn: str, rows: Rows) -> None:
    """The end of a host makes all its tasks suspects, and none of them is poisoned."""
    suspects = put(dsn, *(poison.Wide(0.2) for _ in range(100)))
    rows("UPDATE pg_task SET claims = 1")
    put(dsn, *(poison.Short(number) for number in range(2000)))
    with working(dsn, procs=2) as fleet:
        rows.until("SELECT count(*) = 2000 FROM mark WHERE step = 'Short'")
        left = rows.value("SELECT count(*) FROM pg_task WHERE id = ANY ($1)", suspects)
        assert left > 30, "the suspects were all run before the others"
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=60)
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'begin'") == 100


def test_task_lost_with_three_hosts_is_parked(dsn: str, rows: Rows) -> None:
    """The count of its claims alone parks it; a retry by a person resets that count."""
    put(dsn, poison.Short())
    rows("UPDATE pg_task SET claims = 3")
    burst(dsn, procs=1)
    assert rows("SELECT error, claims, tried FROM pg_task") == [
        ("Neighbours.Short was running when its worker was lost 3 times", 0, 0)
    ]
    rows("UPDATE pg_task SET error = NULL")
    burst(dsn, procs=1, code=0)
    assert rows.value("SELECT count(*) FROM mark") == 1


def test_suspect_with_slow_neighbours_gets_its_turn(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """Its worker waits a second in vain and puts it back; later it waits long enough."""
    with working(dsn, "--concurrency", "5") as fleet:
        put(dsn, poison.Gated(str(tmp_path / "go")))
        rows.until("SELECT count(*) = 1 FROM mark")
        rows('INSERT INTO pg_task (step, claims) VALUES (\'{"Neighbours":{"Short":{"number":0}}}\', 1)')
        put(dsn, *[poison.Gated(str(tmp_path / "go"))] * 3)
        fleet.until("suspects.put_off")
        (tmp_path / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0


def test_kill_after_grace_implicates_no_task(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The supervisor kills a step that blocks its loop beyond the grace: that is no crash of the step."""
    with working(dsn, "--grace", "0.2") as fleet:
        put(dsn, poison.Blocked(str(tmp_path / "never")))
        until_begun(tmp_path / "never")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert rows("SELECT claims, locked_by FROM pg_task") == [(0, None)]


def test_thread_that_outlives_stop_does_not_implicate_its_task(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """Its worker cannot release the lease while the thread runs; the reaper can, when the process has ended."""
    with working(dsn, "--grace", "0.2") as fleet:
        put(dsn, poison.BlockedThread(str(tmp_path / "never")))
        until_begun(tmp_path / "never")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert "steps.abandoned steps=1" in fleet.output
    assert "tasks=1 executing=0" in fleet.output
    assert "worker.died" not in fleet.output
    assert rows("SELECT claims, tried, locked_by FROM pg_task") == [(0, 0, None)]


# --- at random


def ready_workers(fleet: Fleet) -> list[int]:
    ready = {int(line.partition("pid=")[2]) for line in list(fleet.lines) if "worker.ready" in line}
    return sorted(ready & {process.pid for process in fleet.family()})


@pytest.mark.faults
def test_random_kills_lose_nothing_and_release_at_once(dsn: str, rows: Rows) -> None:
    """The leases would last for two hours. `python -m bench crashes` has the figures."""
    chance = random.Random(4)
    lease = ("--lease-timeout", "7200")
    with feeding(dsn, poison.One) as fed, Fleet(dsn, *OPEN_BURST, *lease, app="poison:app", procs=4) as fleet:
        fleet.until("worker.ready", times=4)
        for _ in range(20):
            while not (ready := ready_workers(fleet)):
                time.sleep(0.005)
            pid = chance.choice(ready)
            os.kill(pid, signal.SIGKILL)
            fleet.until(f"leases.released pid={pid} ")
        fed.end()
        assert fleet.ends() == 0, fleet.output
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert "lease.lost" not in fleet.output
