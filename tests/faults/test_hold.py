"""Short steps whose rows a transaction holds (hold.py), and what fails under it.

A row that is held has no lease. So a step that waits for a file shows by its row that it is held, and a ledger, written
by triggers, shows which tasks ended without a lease in their rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import fleet
import pytest
from fix_database import run
from fix_pgbouncer import open_directory
from fleet import SHORT_LEASE, Fleet, Rows, put
from held import WARM_UP, Act, open_ledger, runs, until_run
from pooler import Pooler
from proxy import Line

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate

ENDED = "SELECT count(*), count(DISTINCT task) FROM ledger WHERE what = 'DELETE'"
LEASED = "SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL"
SESSION = "FROM pg_stat_activity WHERE state = 'idle in transaction' AND application_name LIKE 'pgtask%'"
LEFT = "SELECT count(*) FROM pg_task"
FREE = "SELECT FROM pg_task FOR UPDATE SKIP LOCKED"


def burst(dsn: str, *arguments: str, procs: int = 2, code: int = 0) -> Fleet:
    return fleet.burst(dsn, *arguments, procs=procs, app="held:app", code=code)


def working(dsn: str, *arguments: str, procs: int = 1) -> Any:
    return fleet.working(dsn, *arguments, procs=procs, app="held:app")


def acts(count: int) -> list[Act]:
    return [Act(number) for number in range(count)]


def put_among(dsn: str, *steps: Any) -> list[Any]:
    """Enqueue steps among others, which a worker holds by the time that it comes to them; return their ids."""
    ids = put(dsn, *acts(2 * WARM_UP), *steps, *acts(WARM_UP))
    return list(ids[2 * WARM_UP : 2 * WARM_UP + len(steps)])


@pytest.fixture
def ledger(rows: Rows) -> Rows:
    open_ledger(rows)
    return rows


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def assert_all_ended_once(ledger: Rows, tasks: int) -> None:
    assert ledger.until(f"{LEFT} HAVING count(*) = 0", holds=lambda value: value == 0) == 0
    assert [tuple(row) for row in ledger(ENDED)] == [(tasks, tasks)]


# --- what it does


def test_short_steps_are_held_and_end_once(dsn: str, ledger: Rows) -> None:
    put(dsn, *acts(4 * WARM_UP))
    done = burst(dsn)
    assert_all_ended_once(ledger, 4 * WARM_UP)
    assert ledger.value("SELECT count(*) FROM ledger WHERE held") > WARM_UP
    assert f"{4 * WARM_UP:,} tasks done" in done.output


def test_outcomes_of_all_kinds_are_written_by_a_turn(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    """Each of them is held when it happens; a retry and a later step are held again, or leased."""
    kinds = ("next", "later", "raise", "fail", "again", "suspend")
    ids = put_among(dsn, *(Act(1, kind, str(tmp_path / "path")) for kind in kinds))
    burst(dsn, "--max-step-bytes", "2000", code=1)
    ended = dict(ledger("SELECT task, max(what) FROM ledger WHERE held AND task = ANY ($1) GROUP BY 1", ids))
    assert ended.keys() >= {ids[kinds.index(kind)] for kind in ("next", "later", "raise", "fail", "again")}
    assert dict(ledger("SELECT id, split_part(error, ' (', 1) FROM pg_task")) == {
        ids[2]: "ValueError: as told",
        ids[3]: "as told",
    }
    assert dict(ledger("SELECT id, tried FROM pg_task")) == {ids[2]: 2, ids[3]: 1}
    assert len(runs(tmp_path / "path")) == len(kinds) + 1


def test_tasks_that_a_held_step_enqueues_come_once(dsn: str, ledger: Rows) -> None:
    """The turn leases the task, and the flush writes its outcome with the new tasks."""
    ids = put_among(dsn, *(Act(1, "enqueue") for _ in range(20)))
    burst(dsn, procs=1)
    assert_all_ended_once(ledger, 3 * WARM_UP + 60)
    assert ledger("SELECT DISTINCT held FROM ledger WHERE task = ANY ($1)", ids) == [(False,)]


def test_transaction_of_a_held_step_waits_for_its_lease(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    """The class was proven. Its first transaction begins when the turn has leased the task, whose row it locks."""
    ledger("CREATE TABLE effect (task uuid)")
    ids = put_among(dsn, *(Act(1, "transact", str(tmp_path / "path")) for _ in range(20)))
    burst(dsn, procs=1)
    assert_all_ended_once(ledger, 3 * WARM_UP + 20)
    assert ledger("SELECT count(*), count(DISTINCT task) FROM effect WHERE task = ANY ($1)", ids) == [(20, 20)]
    assert len(runs(tmp_path / "path")) == 20


def test_rows_without_a_step_are_parked_by_a_turn(dsn: str, ledger: Rows) -> None:
    garbage = ['{"Held": {"Act": {"number": "x"}}}', "[]", '{"Held": {"Gone": {}}}']
    put(dsn, *acts(2 * WARM_UP))
    ledger("INSERT INTO pg_task (step) SELECT unnest($1::text[])", garbage)
    ledger('INSERT INTO pg_task (step) SELECT \'{"Held": {"Act": {"path": "\' || repeat(\'x\', 3000) || \'"}}}\'')
    put(dsn, *acts(WARM_UP))
    burst(dsn, "--max-step-bytes", "2000", "--unknown", "park", code=1)
    assert ledger.value("SELECT count(*) FROM pg_task WHERE error IS NOT NULL AND claims = 0 AND tried = 0") == 4
    assert ledger.value("SELECT count(*) FROM ledger WHERE held AND error IS NOT NULL") == 4


def test_tasks_of_another_app_are_left_untouched_by_a_turn(dsn: str, ledger: Rows) -> None:
    put(dsn, *acts(2 * WARM_UP))
    ledger('INSERT INTO pg_task (step) VALUES (\'{"Other": {"Step": {}}}\')')
    put(dsn, *acts(WARM_UP))
    burst(dsn)
    assert tuple(ledger("SELECT claims, tried, locked_by, error FROM pg_task")[0]) == (0, 0, None, None)
    assert ledger.value(ENDED) == 3 * WARM_UP


def test_class_that_suspends_now_and_then_ends_once(dsn: str, ledger: Rows, tmp_path: Path) -> None:
    """It was proven, and suspends in a turn: the turn leases it. From then on its class is not held."""
    put_among(dsn, *(Act(1, "suspend", str(tmp_path / "path")) for _ in range(100)))
    burst(dsn, procs=1)
    assert_all_ended_once(ledger, 3 * WARM_UP + 100)
    assert len(runs(tmp_path / "path")) == 100


def test_few_tasks_are_leased(dsn: str, ledger: Rows) -> None:
    for _ in range(4):
        put(dsn, *acts(40))
        burst(dsn, procs=1)
    assert ledger.value("SELECT count(*) FROM ledger WHERE held") == 0


def test_burst_waits_for_tasks_that_another_worker_holds(dsn: str, ledger: Rows, gate: Path) -> None:
    """The burst does all tasks that are free, and then waits, though no task is leased."""
    put_among(dsn, Act(0, "gate", str(gate)))
    with working(dsn):
        until_run(gate)
        assert ledger.value(LEASED) == 0
        with Fleet(dsn, "--burst", app="held:app") as other:
            ledger.until(f"SELECT count(*) = 0 FROM ({FREE}) AS free")
            ledger("SELECT pg_sleep(1)")
            assert ledger.value(LEFT) > 0
            assert other.process.poll() is None
            gate.touch()
            assert other.ends() == 0
        assert_all_ended_once(ledger, 3 * WARM_UP + 1)


# --- what fails


def test_kill_in_a_turn_loses_and_doubles_nothing(dsn: str, ledger: Rows, gate: Path) -> None:
    put_among(dsn, Act(0, "gate", str(gate)))
    with working(dsn) as workers:
        pid = until_run(gate)
        assert ledger.value(LEASED) == 0
        os.kill(pid, signal.SIGKILL)
        workers.until("task.suspect")
        gate.touch()
        assert until_run(gate, 2) != pid
        assert_all_ended_once(ledger, 3 * WARM_UP + 1)


@pytest.mark.faults
def test_poison_that_is_held_is_parked_at_third_death(dsn: str, rows: Rows, gate: Path) -> None:
    put_among(dsn, Act(0, "kill", str(gate)))
    burst(dsn, code=1)
    ((error,),) = rows("SELECT error FROM pg_task")
    assert "worker process died 3 times while running Held.Act" in error
    assert 3 <= len(runs(gate)) <= 5


def test_death_in_a_turn_charges_only_the_step_that_ran(dsn: str, rows: Rows, gate: Path) -> None:
    (task,) = put_among(dsn, Act(0, "gate", str(gate)))
    with working(dsn) as workers:
        os.kill(until_run(gate), signal.SIGKILL)
        workers.until("task.suspect")
        assert rows("SELECT id FROM pg_task WHERE claims > 0") == [(task,)]
        gate.touch()


WORKERS = (
    "SELECT split_part(application_name, ' ', 3)::integer FROM pg_stat_activity"
    " WHERE application_name ~ '^pgtask worker [0-9]+ [0-9a-f]{8}'"
)


def test_kills_and_lost_sessions_lose_and_double_nothing(dsn: str, ledger: Rows) -> None:
    tasks = 20_000
    put(dsn, *acts(tasks))
    with working(dsn, procs=3):
        for number in range(12):
            ledger.until("SELECT count(*) >= $1 FROM ledger", number * 1500)
            if number % 3 == 2:
                ledger(f"SELECT pg_terminate_backend(pid) {SESSION}")
            elif pids := ledger(WORKERS):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[number % len(pids)][0], signal.SIGKILL)
        assert_all_ended_once(ledger, tasks)
    assert ledger.value("SELECT count(*) FROM ledger WHERE held") > WARM_UP
    assert ledger.value("SELECT count(*) FROM ledger WHERE error IS NOT NULL") == 0


def test_turn_whose_session_is_terminated_runs_again(dsn: str, ledger: Rows, gate: Path) -> None:
    put_among(dsn, Act(0, "gate", str(gate)))
    with working(dsn) as workers:
        until_run(gate)
        assert ledger.value(f"SELECT count(pg_terminate_backend(pid)) {SESSION}") == 1
        gate.touch()
        workers.until("hold.lost")
        assert_all_ended_once(ledger, 3 * WARM_UP + 1)
    assert len(runs(gate)) == 2


def test_worker_stopped_past_its_lease_writes_nothing(dsn: str, ledger: Rows, gate: Path) -> None:
    put_among(dsn, Act(0, "gate", str(gate)))
    with working(dsn, *SHORT_LEASE, procs=2) as workers:
        stopped = until_run(gate)
        os.kill(stopped, signal.SIGSTOP)
        try:
            until_run(gate, 2)
            gate.touch()
            assert_all_ended_once(ledger, 3 * WARM_UP + 1)
        finally:
            os.kill(stopped, signal.SIGCONT)
        workers.until("hold.lost")
        assert [tuple(row) for row in ledger(ENDED)] == [(3 * WARM_UP + 1, 3 * WARM_UP + 1)]


def test_step_that_blocks_past_the_lease_gets_a_lease(dsn: str, ledger: Rows, gate: Path) -> None:
    """The other tasks of its turn are free, and its worker keeps the task: no other one runs it, and blocks as well."""
    (task,) = put_among(dsn, Act(0, "gate", str(gate)))
    with working(dsn, *SHORT_LEASE) as workers:
        until_run(gate)
        workers.until("hold.blocked")
        assert ledger("SELECT id, claims FROM pg_task WHERE locked_by IS NOT NULL") == [(task, 1)]
        gate.touch()
        assert_all_ended_once(ledger, 3 * WARM_UP + 1)
    assert len(runs(gate)) == 1
    assert ledger.value("SELECT held FROM ledger WHERE task = $1", task) is False


def test_stop_in_a_turn_writes_it_and_leaves_the_rest(dsn: str, ledger: Rows, gate: Path) -> None:
    (task,) = put_among(dsn, Act(0, "gate", str(gate)))
    with working(dsn) as workers:
        until_run(gate)
        workers.send(signal.SIGTERM)
        workers.until("supervisor.stopping")
        gate.touch()
        assert workers.ends() == 0
    ended, once = ledger(ENDED)[0]
    assert ended == once
    assert ended + ledger.value(LEFT) == 3 * WARM_UP + 1
    assert ledger.value("SELECT held FROM ledger WHERE task = $1", task)
    assert ledger.value("SELECT count(*) FROM pg_task WHERE claims > 0") == 0


@pytest.mark.parametrize("how", ["RAISE EXCEPTION 'not this one'", "RAISE EXCEPTION 'slow' USING ERRCODE = '57014'"])
def test_outcome_that_is_refused_or_slow_is_parked_at_last(dsn: str, ledger: Rows, how: str) -> None:
    """The turn rolls back. Its steps run again under leases, where the writer finds the culprit."""
    (task,) = put_among(dsn, Act(0, "done"))
    ledger(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF OLD.id = '{task}' THEN {how}; END IF; RETURN OLD; END $$"
    )
    ledger("CREATE TRIGGER refuse BEFORE DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION refuse()")
    done = burst(dsn, procs=1, code=1)
    assert "hold.lost" in done.output
    ((parked, error),) = ledger("SELECT id, error FROM pg_task")
    assert parked == task
    assert "Held.Act" in error
    assert tuple(ledger(ENDED)[0]) == (3 * WARM_UP, 3 * WARM_UP)


def test_write_that_a_trigger_suppresses_counts_as_lost(dsn: str, ledger: Rows) -> None:
    (task,) = put_among(dsn, Act(0, "done"))
    ledger(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RETURN CASE WHEN OLD.id <> '{task}' OR OLD.locked_by IS NOT NULL THEN OLD END; END $$"
    )
    ledger("CREATE TRIGGER keep BEFORE DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION keep()")
    burst(dsn, procs=1)
    assert_all_ended_once(ledger, 3 * WARM_UP + 1)


def test_server_that_restarts_in_a_turn_loses_nothing(tmp_path: Path, gate: Path) -> None:
    with open_directory("pgtask-hold-") as directory:
        dsn = embedded.start(directory)
        try:
            run(migrate(dsn))
            ledger = Rows(dsn)
            open_ledger(ledger)
            put_among(dsn, Act(0, "gate", str(gate)))
            with working(dsn, procs=2) as workers:
                until_run(gate)
                embedded.stop(directory)
                embedded.start(directory)
                gate.touch()
                workers.until("hold.lost")
                assert_all_ended_once(ledger, 3 * WARM_UP + 1)
        finally:
            embedded.stop(directory)


def test_turns_work_behind_a_pooler(dsn: str, ledger: Rows) -> None:
    put(dsn, *acts(4 * WARM_UP))

    async def main() -> None:
        async with Pooler(dsn, size=8) as pooler:
            await asyncio.to_thread(burst, pooler.dsn, "--no-listen")

    run(main())
    assert_all_ended_once(ledger, 4 * WARM_UP)
    assert ledger.value("SELECT count(*) FROM ledger WHERE held") > WARM_UP


COMMIT_THAT_WAITS = (
    "CREATE TABLE go ()",
    "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " WHILE NOT EXISTS (SELECT FROM go) LOOP PERFORM pg_sleep(0.01); END LOOP; RETURN NULL; END $$",
    "CREATE CONSTRAINT TRIGGER wait AFTER DELETE ON pg_task DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
    " WHEN (OLD.id = '{}') EXECUTE FUNCTION wait()",
)


def test_commit_whose_reply_is_lost_counts_what_is_gone(dsn: str, ledger: Rows) -> None:
    """The server commits a turn, and its answer does not arrive. The tasks that go on are released, and run again."""
    first, last, _ = put_among(dsn, Act(0), Act(1), Act(0, "next"))
    for statement in COMMIT_THAT_WAITS:
        ledger(statement.format(first))

    async def main() -> str:
        async with Line(dsn) as line:
            ended = asyncio.create_task(asyncio.to_thread(burst, line.dsn, "--no-listen", procs=1))
            sleeps = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE 'COMMIT%'"
            await asyncio.to_thread(ledger.until, sleeps)
            line.swallow(b"COMMIT")
            await asyncio.to_thread(ledger, "INSERT INTO go DEFAULT VALUES")
            return (await ended).output

    output = run(main())
    assert "hold.lost" in output
    assert_all_ended_once(ledger, 3 * WARM_UP + 3)
    assert ledger.value("SELECT bool_and(held) FROM ledger WHERE task = ANY ($1)", [first, last])
    assert f"{3 * WARM_UP + 3:,} tasks done" in output
