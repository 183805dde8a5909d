"""The promises of one supervisor and its workers on a real database: what runs, how often, in which order, and when."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from uuid import UUID

import apps
import asyncpg
import pytest
from feeder import OPEN_BURST, feeding
from fix_database import run
from fleet import SHORT_LEASE, Fleet, Rows, burst, put, ready
from marks import MARKS
from patient import PATIENT

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate

# --- everything, once


def test_every_step_of_every_task_runs_exactly_once(dsn: str, rows: Rows) -> None:
    rows(apps.ONCE)
    put(dsn, *(apps.First(number) for number in range(2000)))
    fleet = burst(dsn, procs=4)
    assert rows.value("SELECT count(*) FROM mark") == 6000
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert "2,000 tasks done, 6,000 steps, 0 errors" in fleet.output


@pytest.mark.faults
def test_exactly_once_across_a_stop_in_the_middle(dsn: str, rows: Rows) -> None:
    rows(apps.ONCE)
    with feeding(dsn) as fed, Fleet(dsn, *OPEN_BURST, procs=3) as fleet:
        rows.until("SELECT count(*) > 1000 FROM mark")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 143, fleet.output
        assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL OR tried > 0 OR claims > 0") == 0
    burst(dsn, procs=2)
    assert rows.value("SELECT count(*) FROM mark") == 3 * fed.count
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_no_task_is_lost_when_a_worker_is_killed(dsn: str, rows: Rows) -> None:
    with feeding(dsn) as fed, Fleet(dsn, *OPEN_BURST, *SHORT_LEASE, procs=2) as fleet:
        fleet.until("worker.ready", times=2)
        rows.until("SELECT count(*) > 500 FROM mark")
        fleet.family()[0].kill()
        fleet.until("worker.died")
        fed.end()
        assert fleet.ends() == 0, fleet.output
    assert rows.value("SELECT count(DISTINCT (task, step)) FROM mark") == 3 * fed.count
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_no_task_is_lost_when_backends_are_killed(dsn: str, rows: Rows) -> None:
    with feeding(dsn) as fed, Fleet(dsn, *OPEN_BURST, *SHORT_LEASE, procs=2) as fleet:
        fleet.until("worker.ready", times=2)
        for share in (500, 1000, 1500):
            rows.until(f"SELECT count(*) > {share} FROM mark")
            rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name LIKE 'pgtask worker%'"
            )
        fed.end()
        assert fleet.ends() == 0, fleet.output
    assert "worker.died" not in fleet.output
    assert rows.value("SELECT count(DISTINCT (task, step)) FROM mark") == 3 * fed.count
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_long_chain_runs_under_consecutive_leases(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Counts(1000), apps.Counts(1000))
    fleet = burst(dsn)
    assert "2 tasks done, 2,002 steps, 0 errors" in fleet.output


@pytest.mark.parametrize("how", [pytest.param("restarted", marks=pytest.mark.faults), "crashed"])
def test_no_task_is_lost_when_the_server_is_killed(how: str, tmp_path: Path) -> None:
    dsn = embedded.start(tmp_path)
    try:
        run(migrate(dsn))
        rows = Rows(dsn)
        rows(MARKS)
        put(dsn, *(apps.First(number) for number in range(1000)), apps.UntilFile(str(tmp_path / "go")))
        with Fleet(dsn, "--burst", procs=2) as fleet:
            rows.until("SELECT count(*) > 500 FROM mark WHERE EXISTS (SELECT FROM mark WHERE step = 'begin')")
            if how == "restarted":
                embedded.stop(tmp_path)
                fleet.until("database.unavailable")
                embedded.start(tmp_path)
            else:  # the server ends all sessions when one of them dies in this way, and recovers
                pid = rows.value(
                    "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pgtask worker%' LIMIT 1"
                )
                os.kill(pid, signal.SIGKILL)
                fleet.until("database.recovered")
            (tmp_path / "go").touch()
            assert fleet.ends() == 0, fleet.output
        assert "worker.died" not in fleet.output
        assert rows.value("SELECT count(DISTINCT (task, step)) FROM mark") == 3002
        assert rows.value("SELECT count(*) FROM mark WHERE step = 'begin'") == 1, "the step in flight was not harmed"
        assert rows.value("SELECT count(*) FROM pg_task") == 0
    finally:
        embedded.stop(tmp_path)


def test_worker_without_a_dsn_starts_an_embedded_server(tmp_path: Path) -> None:
    try:
        with Fleet(None, procs=2) as fleet:
            fleet.until(f"embedded.starting directory={tmp_path / '.pgtask'}")
            fleet.until("embedded.started")
            fleet.until("worker.ready", times=2)
            dsn = embedded.running_dsn(tmp_path)
            assert dsn is not None
            Rows(dsn)("""INSERT INTO pg_task (step) VALUES ('{"Odd":{"Noop":{}}}')""")
            Rows(dsn).until("SELECT count(*) = 0 FROM pg_task")
            fleet.send(signal.SIGINT)
            assert fleet.ends() == 0
        assert embedded.is_running(tmp_path), "it outlives the supervisor"
    finally:
        embedded.stop(tmp_path)


# --- bad rows


def test_garbage_is_parked_or_put_back_and_the_rest_finishes(dsn: str, rows: Rows) -> None:
    put(dsn, *(apps.Mark() for _ in range(500)))
    put(dsn, *(apps.ReturnsNone() for _ in range(10)), *(apps.Raises("nul \0 here") for _ in range(10)))
    garbage = {
        "not json": "not valid JSON",
        '{"Odd":{"Noop":': "not valid JSON",
        '{"Odd":{"Noop":{"number":"seven"}}}': "Expected `int`, got `str` - at `$.number`",
        '{"Odd":{"Noop":{"number":"' + "x" * 1_000_000 + '"}}}': "1000030 bytes, more than the 524288 allowed",
        '{"Odd":{"Noop":null},"More":{}}': "not of the form",
        "[]": "not of the form",
    }
    for step in garbage:
        rows("INSERT INTO pg_task (step) SELECT $1 FROM generate_series(1, 10)", step)
    rows("""INSERT INTO pg_task (step) SELECT '{"Odd":{"Unheard":{}}}' FROM generate_series(1, 10)""")
    fleet = burst(dsn, procs=2, code=1)
    assert rows.value("SELECT count(*) FROM mark") == 500
    for step, message in garbage.items():
        errors = {row["error"] for row in rows("SELECT error FROM pg_task WHERE step = $1", step)}
        assert len(errors) == 1, step[:80]
        assert message in errors.pop()
    assert rows.value("SELECT count(*) FROM pg_task WHERE error LIKE '%returned None: a return is missing%'") == 10
    assert (
        rows.value("SELECT count(*) FROM pg_task WHERE error LIKE '%nul \u2400 here%caused by ValueError: the cause%'")
        == 10
    )
    unknown = rows("SELECT error, tried, wakeup_at - now() AS wait FROM pg_task WHERE step LIKE '%Unheard%'")
    assert len(unknown) == 10
    assert all(row["error"] is None and row["tried"] == 0 and row["wait"].total_seconds() > 20 for row in unknown)
    assert 1 <= fleet.output.count("step.unknown step=Odd.Unheard") <= 2, "one warning per name and worker"
    assert "worker.died" not in fleet.output
    parked = rows.value("SELECT count(*) FROM pg_task WHERE error IS NOT NULL")
    assert fleet.lines[-2:] == [
        f"pgtask-supervisor: {parked} tasks are parked with an error: pgtask list --state parked\n",
        "pgtask-supervisor: 10 times a worker put a task back, since this app lacks its step: "
        "pgtask list --state scheduled\n",
    ]


@pytest.mark.parametrize("step", ['{"Odd":{"OfAnotherVersion":{}}}', "garbage"], ids=["unknown", "undecodable"])
def test_unrunnable_rows_do_not_slow_down_claims(dsn: str, rows: Rows, step: str) -> None:
    """A worker that has started nothing begins with one task a claim; such rows are no reason to go on like that."""
    rows("INSERT INTO pg_task (step) SELECT $1 FROM generate_series(1, 40_000)", step)
    with ready(dsn):
        put(dsn, *(apps.Mark() for _ in range(10)))
        rows.until("SELECT count(*) = 10 FROM mark")


def test_unknown_steps_are_parked_on_request(dsn: str, rows: Rows) -> None:
    rows("""INSERT INTO pg_task (step) VALUES ('{"Nobody":{"Knows":{}}}')""")
    burst(dsn, "--unknown", "park", code=1)
    assert rows.value("SELECT error FROM pg_task") == "unknown step Nobody.Knows: this app does not define it"


PARK = "INSERT INTO pg_task (step, error) VALUES ($1, 'it was parked before')"


def test_parked_tasks_of_other_apps_do_not_fail_a_burst(dsn: str, rows: Rows) -> None:
    for name in ("Others", "Od", r"Odd\u0020", 'Odd\\"'):
        rows(PARK, f'{{"{name}":{{"Noop":{{}}}}}}')
    assert "4 tasks of other apps are parked too" in burst(dsn).output
    rows(PARK, ' { "\\u004fdd" : {"Noop":{"number":1}}}')
    fleet = burst(dsn, code=1)
    assert "1 task is parked with an error, since before this burst: pgtask list" in fleet.output
    assert "4 tasks of other apps are parked too" in fleet.output
    rows("DELETE FROM pg_task")
    rows(PARK, "no envelope")
    burst(dsn, code=1)


# --- errors, retries, the hand of the operator


def test_failing_step_is_retried_until_it_succeeds(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Retries(3))
    burst(dsn)
    assert [row["step"] for row in rows("SELECT step FROM mark ORDER BY at")] == [f"attempt {n}" for n in (1, 2, 3, 4)]


POLLED = """
    SELECT bool_and(state = 'idle' AND query LIKE '-- Poll %') FROM pg_stat_activity
    WHERE datname = current_database() AND application_name ~ '^pgtask worker .*[0-9a-f]$'
"""
"""The workers have found nothing due, and wait."""


def test_parked_task_resumes_when_its_error_is_cleared(dsn: str, rows: Rows) -> None:
    (task,) = put(dsn, apps.Retries(6))
    with ready(dsn, *PATIENT, app="patient:app"):
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE error IS NOT NULL")
        (row,) = rows("SELECT * FROM pg_task")
        assert (row["tried"], row["step"]) == (6, '{"Odd":{"Retries":{"failures":6}}}')
        assert row["error"].startswith("RuntimeError: not yet (at ")
        assert row["locked_by"] is None
        assert row["claims"] == 0
        rows.until(POLLED)
        rows("""UPDATE pg_task SET error = NULL""")
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert rows.value("SELECT max(attempt) FROM mark WHERE task = $1", UUID(int=task.int)) == 7


def test_fail_parks_at_once(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Gives("no such customer"))
    burst(dsn, code=1)
    assert tuple(rows("SELECT error, tried FROM pg_task")[0]) == ("no such customer", 1)


def test_timeout_counts_as_an_error(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Slow())
    burst(dsn, code=1)
    assert "Odd.Slow ran longer than its timeout of 0.1 s" in rows.value("SELECT error FROM pg_task")


def test_task_scheduled_by_hand_wakes_an_idle_worker(dsn: str, rows: Rows) -> None:
    with ready(dsn, *PATIENT, app="patient:app"):
        rows.until(POLLED)
        rows("""INSERT INTO pg_task (step) VALUES ('{"Odd":{"Mark":{"name":"by hand"}}}')""")
        rows.until("SELECT count(*) = 1 FROM mark WHERE step = 'by hand'")


def test_task_due_in_the_future_starts_on_time(dsn: str, rows: Rows) -> None:
    with ready(dsn, *PATIENT, app="patient:app"):
        rows.until(POLLED)
        insert = "INSERT INTO pg_task (step, wakeup_at) VALUES ($1, now() + interval '1.5 s') RETURNING wakeup_at"
        due = rows.value(insert, '{"Odd":{"Mark":{}}}')
        rows.until("SELECT count(*) = 1 FROM mark")
        assert rows.value("SELECT at FROM mark") >= due


def test_task_moved_by_hand_starts_at_once(dsn: str, rows: Rows) -> None:
    rows("INSERT INTO pg_task (step, wakeup_at) VALUES ($1, now() + interval '1 day')", '{"Odd":{"Mark":{}}}')
    with ready(dsn, *PATIENT, app="patient:app"):
        rows.until(POLLED)
        rows("UPDATE pg_task SET wakeup_at = now()")
        rows.until("SELECT count(*) = 1 FROM mark")


def test_next_with_after_waits(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Later(0.7))
    burst(dsn)
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'later'") == 1


# --- lanes


def test_worker_runs_highest_priority_then_oldest(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Mark("old"))
    put(dsn, apps.Mark("young"))
    put(dsn, apps.Mark("high"), priority=7)
    put(dsn, apps.Mark("low"), priority=-1)
    burst(dsn, "--concurrency", "1", "--batch", "1")
    assert [row["step"] for row in rows("SELECT step FROM mark ORDER BY at")] == ["high", "old", "young", "low"]


def test_worker_serves_only_its_queues(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Mark("mine"), queue="mine")
    put(dsn, apps.Mark("other"), queue="other")
    burst(dsn, "--queue", "mine")
    assert [row["step"] for row in rows("SELECT step FROM mark")] == ["mine"]
    assert rows.value("SELECT queue FROM pg_task") == "other"


def test_policy_of_next_step_moves_the_row_to_its_queue(dsn: str, rows: Rows) -> None:
    put(dsn, apps.GoesUrgent())
    burst(dsn, "--queue", "default")
    assert tuple(rows("SELECT queue, priority, locked_by FROM pg_task")[0]) == ("urgent", 5, None)
    burst(dsn, "--queue", "urgent")
    assert rows.value("SELECT count(*) FROM mark") == 1


def test_task_moved_to_another_queue_wakes_its_workers(dsn: str, rows: Rows) -> None:
    with ready(dsn, *PATIENT, "--queue", "urgent", app="patient:app"), ready(dsn, "--queue", "default"):
        rows.until(POLLED)
        put(dsn, apps.GoesUrgent())
        rows.until("SELECT count(*) = 1 FROM mark")


def test_thread_steps_get_resources_of_the_lifespan(dsn: str, rows: Rows) -> None:
    put(dsn, *(apps.InThread() for _ in range(300)), apps.Uses(), apps.Pair((1, 2)))
    assert rows.value("SELECT step FROM pg_task WHERE step LIKE '%Pair%'") == '{"Odd":{"Pair":[1,2]}}'
    fleet = burst(dsn)
    assert {row["step"] for row in rows("SELECT step FROM mark")} == {"from the lifespan", "[1,2]"}
    assert "302 tasks done" in fleet.output


# --- leases


@pytest.mark.parametrize("kind", [apps.UntilFile, apps.BlocksUntilFile])
def test_long_step_keeps_its_lease(dsn: str, rows: Rows, tmp_path: Path, kind: type[apps.UntilFile]) -> None:
    """A step that awaits, and one that blocks the loop."""
    put(dsn, kind(str(tmp_path / "go")))
    with ready(dsn, "--lease-timeout", "20", "--heartbeat-interval", "0.5", procs=2) as fleet:
        rows.until("SELECT count(*) = 1 FROM mark")
        first = rows.value("SELECT lock_expires_at FROM pg_task")
        rows.until("SELECT lock_expires_at > $1::timestamptz + interval '1.2 s' FROM pg_task", first)
        (tmp_path / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        assert "lease." not in fleet.output
    assert rows.value("SELECT count(*) FROM mark") == 2


def test_step_with_lost_lease_is_cancelled_and_writes_nothing(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Forever("says-goodbye"))
    with ready(dsn, *SHORT_LEASE) as fleet:
        rows.until("SELECT count(*) = 1 FROM mark")
        rows("UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 hour'")
        rows.until("SELECT count(*) = 1 FROM mark WHERE step = 'goodbye'")
        fleet.until("lease.lost")
        assert rows.value("SELECT lock_expires_at > now() + interval '59 min' FROM pg_task")


def test_worker_stopped_past_its_lease_writes_nothing(dsn: str, rows: Rows, tmp_path: Path) -> None:
    put(dsn, apps.UntilFile(str(tmp_path / "go")))
    with ready(dsn, *SHORT_LEASE) as frozen:
        pid = rows.until("SELECT pid FROM mark")
        (worker,) = frozen.family()
        assert worker.pid == pid
        worker.suspend()
        with ready(dsn):
            rows.until("SELECT count(DISTINCT pid) = 2 FROM mark")  # the other one has taken over
            worker.resume()
            frozen.until("lease.lost")
            assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL") == 1
            (tmp_path / "go").touch()
            rows.until("SELECT count(*) = 0 FROM pg_task")
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'end'") == 1


def test_task_that_killed_its_worker_runs_again(dsn: str, rows: Rows, tmp_path: Path) -> None:
    put(dsn, apps.Kills(str(tmp_path / "killed")))
    with ready(dsn, "--lease-timeout", "7200"):
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'survived'") == 1


# --- stopping


def test_stop_releases_the_prefetch_untouched(dsn: str, rows: Rows) -> None:
    put(dsn, *(apps.Forever() for _ in range(20)))
    with ready(dsn, "--concurrency", "5", "--grace", "0") as fleet:
        rows.until("SELECT count(*) = 5 FROM mark")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NULL AND claims = 0 AND tried = 0") == 20


def test_drain_waits_for_running_steps(dsn: str, rows: Rows, tmp_path: Path) -> None:
    put(dsn, apps.UntilFile(str(tmp_path / "go")))
    with ready(dsn) as fleet:
        rows.until("SELECT count(*) = 1 FROM mark")
        fleet.send(signal.SIGTERM)
        fleet.until("supervisor.stopping")
        put(dsn, apps.Mark())
        (tmp_path / "go").touch()
        assert fleet.ends() == 0
    assert [row["step"] for row in rows("SELECT step FROM mark ORDER BY at")] == ["begin", "end"]
    assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NULL") == 1


def test_second_signal_stops_now_and_releases_the_leases(dsn: str, rows: Rows) -> None:
    put(dsn, apps.Forever("says-goodbye"))
    with ready(dsn, "--grace", "600") as fleet:
        rows.until("SELECT count(*) = 1 FROM mark")
        fleet.send(signal.SIGTERM)
        fleet.until("supervisor.stopping")
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert tuple(rows("SELECT locked_by, tried, claims, error FROM pg_task")[0]) == (None, 0, 0, None)
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'goodbye'") == 1


def test_quit_writes_an_outcome_that_waited_for_its_row(dsn: str, rows: Rows) -> None:
    """The row is free again, but its next try is due only in a second."""
    put(dsn, apps.UntilFile("go"))
    with ready(dsn) as fleet:
        rows.until("SELECT count(*) = 1 FROM mark")

        async def hold() -> None:
            connection = await asyncpg.connect(dsn)
            async with connection.transaction():
                await connection.execute("SELECT FROM pg_task FOR UPDATE")
                await asyncio.to_thread(Path("go").touch)
                await asyncio.to_thread(fleet.until, "database.locked")
            fleet.send(signal.SIGQUIT)
            await connection.close()

        asyncio.run(hold())
        assert fleet.ends() == 0
    assert rows.value("SELECT count(*) FROM pg_task") == 0, "the step has ended, and would run again"


def test_workers_drain_and_leave_when_the_supervisor_is_killed(dsn: str, rows: Rows, tmp_path: Path) -> None:
    put(dsn, apps.UntilFile(str(tmp_path / "go")))
    with ready(dsn, procs=2) as fleet:
        rows.until("SELECT count(*) = 1 FROM mark")
        family = fleet.family()
        fleet.process.kill()
        (tmp_path / "go").touch()
        for worker in family:
            worker.wait(30)
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert rows.value("SELECT count(*) FROM mark") == 2


def test_stop_notification_drains_every_worker(dsn: str, rows: Rows) -> None:
    with ready(dsn, procs=2) as one, ready(dsn) as other, ready(dsn, "--ignore-stop-notify") as deaf:
        rows("SELECT pg_notify('pg_task_changed', 'stop_worker')")
        assert one.ends() == 0
        assert other.ends() == 0
        put(dsn, apps.Mark())
        rows.until("SELECT count(*) = 1 FROM mark")
        assert deaf.process.poll() is None


def test_idle_worker_has_three_connections(dsn: str, rows: Rows) -> None:
    query = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'pgtask worker%'"
    )
    put(dsn, apps.Noop())
    with ready(dsn):
        rows.until("SELECT count(*) = 0 FROM pg_task")
        assert rows.value(query) <= 3


# --- without LISTEN


def test_worker_without_listen_polls(dsn: str, rows: Rows) -> None:
    with ready(dsn, "--no-listen") as fleet:
        rows("""INSERT INTO pg_task (step) VALUES ('{"Odd":{"Mark":{}}}')""")
        rows.until("SELECT count(*) = 1 FROM mark")
        listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
        assert rows.value(listening) == 0
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0


# --- refusals


def test_missing_schema_is_one_line_and_exit_code_5(empty_dsn: str) -> None:
    with Fleet(empty_dsn) as fleet:
        assert fleet.ends() == 5
    assert "run: pgtask migrate" in fleet.output
    assert "Traceback" not in fleet.output


def test_database_that_does_not_exist_is_exit_code_5(dsn: str) -> None:
    with Fleet(dsn.replace("pgtask_test", "no_such_database")) as fleet:
        assert fleet.ends() == 5
    assert "does not exist" in fleet.output
    assert "Traceback" not in fleet.output


def test_app_that_cannot_be_loaded_is_exit_code_4(dsn: str) -> None:
    with Fleet(dsn, app="apps:nothing") as fleet:
        assert fleet.ends() == 4
    assert "nothing" in fleet.output
    assert "Traceback" not in fleet.output
