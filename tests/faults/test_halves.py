"""The implicated tasks of a death run again at once, in halves, until the poison is alone: on a real fleet."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import poison
import pytest
from claim_kit import ALL_LEASES
from fix_database import run
from fleet import SHORT_LEASE, Fleet, Rows, put, working
from poison_fleet import burst

from pgtask._postgres.connection import connect
from pgtask._postgres.store import HOT_SETTINGS, statement

BEGUN = "SELECT count(*) = $1 FROM mark WHERE step = 'begin'"


def deaths(fleet: Fleet) -> int:
    return fleet.output.count("worker.died")


def runs_of(rows: Rows) -> list[tuple[str, list[tuple[float, str, int]]]]:
    """Return the marks of each task in order: time, step, process."""
    found: dict[str, list[tuple[float, str, int]]] = {}
    for task, at, step, pid in rows("SELECT task, at, step, pid FROM mark ORDER BY at"):
        found.setdefault(task, []).append((at.timestamp(), step, pid))
    return list(found.items())


def parked(rows: Rows) -> list[str]:
    return [row[0].partition("\n")[0] for row in rows("SELECT error FROM pg_task WHERE error IS NOT NULL")]


# --- deaths of a process


def test_kill_among_suspended_steps_costs_one_more_run(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The tasks of the dead worker run again at the same time, in two groups, one in the worker that follows it."""
    go = tmp_path / "go"
    put(dsn, *[poison.Gated(str(go)) for _ in range(80)])
    with Fleet(dsn, "--burst", "--concurrency", "40", app="poison:app", procs=2) as fleet:
        rows.until(BEGUN, 80)
        os.kill(rows.value("SELECT max(pid) FROM mark"), signal.SIGKILL)
        rows.until(BEGUN, 100)
        go.touch()
        assert fleet.ends() == 0, fleet.output
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    again = [marks for _, marks in runs_of(rows) if len(marks) > 2]
    assert len(again) == 40
    second = [(marks[1], marks[2]) for marks in again]
    assert all((begin[1], end[1]) == ("begin", "end") for begin, end in second), "a task ran a third time"
    ends = sorted(end[0] for _, end in second)
    assert sum(begin[0] < ends[0] for begin, _ in second) >= 20, "they ran one after the other"


@pytest.mark.faults
def test_one_segfault_among_many_parks_only_its_task(dsn: str, rows: Rows) -> None:
    steps: list[Any] = [poison.Wide(0.5) for _ in range(64)]
    put(dsn, *steps[:40], poison.Segfault(), *steps[40:])
    fleet = burst(dsn, "--concurrency", "65", procs=1)
    assert parked(rows) == ["worker process died 3 times while running Poison.Segfault: SIGSEGV"]
    assert rows("SELECT tried, claims FROM pg_task") == [(0, 0)]
    assert 3 <= deaths(fleet) <= 7 + 3
    assert rows.value("SELECT count(DISTINCT task) FROM mark WHERE step = 'end'") == 64
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'end'") == 64, "a task that had ended ran again"


@pytest.mark.faults
def test_poisons_of_all_kinds_are_parked_and_no_other(dsn: str, rows: Rows) -> None:
    poisons = [poison.Segfault(), poison.KillsItselfInThread(), poison.Exit(7), poison.KillsItself()]
    steps: list[Any] = [poison.Wide(0.3) for _ in range(96)]
    for at, step in enumerate(poisons):
        steps.insert(20 * at + 5, step)
    put(dsn, *steps)
    fleet = burst(dsn, "--concurrency", "50", procs=2)
    texts = parked(rows)
    assert sorted(text.partition(":")[0].rpartition(".")[2] for text in texts) == [
        *("Exit", "KillsItself", "KillsItselfInThread", "Segfault")
    ]
    assert rows.value("SELECT count(*) FROM pg_task") == 4
    assert {row[0] for row in rows("SELECT tried FROM pg_task")} == {0}
    assert rows.value("SELECT count(DISTINCT task) FROM mark WHERE step = 'end'") == 96
    assert deaths(fleet) <= 4 * (6 + 3)


def test_tasks_too_many_for_a_process_run_in_smaller_groups(dsn: str, rows: Rows) -> None:
    """Each dies beside the others but not alone, and none is parked."""
    put(dsn, *[poison.NeedsRoom(5) for _ in range(16)])
    fleet = burst(dsn, "--concurrency", "16", procs=1, code=0)
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert 1 <= deaths(fleet) <= 5


def test_two_workers_that_die_at_once_leave_four_groups(dsn: str, rows: Rows, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with working(dsn, "--concurrency", "10", procs=2, app="poison:app") as fleet:
        put(dsn, *[poison.Begins(str(go))] * 20)
        rows.until(BEGUN, 20)
        for (pid,) in rows("SELECT DISTINCT pid FROM mark"):
            os.kill(pid, signal.SIGKILL)
        fleet.until("leases.released", times=2)
        groups = rows("SELECT wakeup_at, count(*) FROM pg_task GROUP BY wakeup_at")
        assert [row["count"] for row in groups] == [5, 5, 5, 5]
        go.touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")


@pytest.mark.parametrize("claims", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_death_by_left_behind_timer_parks_no_other_member(dsn: str, rows: Rows, tmp_path: Path, claims: int) -> None:
    """Its outcome is written when its timer kills the process, under a task that was never alone there."""
    put(dsn, poison.LeavesADeath(str(tmp_path / "die")), poison.Gated(str(tmp_path / "go")))
    rows("UPDATE pg_task SET claims = $1, wakeup_at = now()", claims)
    dies_with_others(dsn, rows, tmp_path, others=1)
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'end'") == 1


def test_left_behind_timers_park_no_neighbours(dsn: str, rows: Rows, tmp_path: Path) -> None:
    others = [poison.Gated(str(tmp_path / "go"))] * 10
    put(dsn, *others, poison.LeavesADeath(str(tmp_path / "die")), *others)
    dies_with_others(dsn, rows, tmp_path, others=20)
    assert rows.value("SELECT count(DISTINCT task) FROM mark WHERE step = 'end'") == 20


def dies_with_others(dsn: str, rows: Rows, directory: Path, others: int) -> None:
    """Run a burst of a `LeavesADeath` and others. It dies once, when that one has been written and the others run."""
    with Fleet(dsn, "--burst", "--concurrency", "21", app="poison:app") as fleet:
        rows.until(BEGUN, others)
        rows.until("SELECT count(*) = $1 FROM pg_task", others)
        (directory / "die").touch()
        fleet.until("worker.died")
        (directory / "die").unlink()
        (directory / "go").touch()
        assert fleet.ends() == 0, fleet.output
    assert deaths(fleet) == 1


@pytest.mark.faults
def test_poison_that_dies_late_beside_its_group_is_parked(dsn: str, rows: Rows) -> None:
    """From the second death on the group is alone to its end, so that each further death leaves half of it."""
    (poisoned, *_) = put(dsn, poison.DiesLate(6.0), poison.Wide(8.0))
    rows("UPDATE pg_task SET claims = 2, wakeup_at = now()")
    with working(dsn, procs=1, app="poison:app", order=signal.SIGQUIT) as fleet:
        put(dsn, *[poison.Wide(0.2) for _ in range(5)])
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE error IS NOT NULL", timeout=90)
        assert rows.value("SELECT id FROM pg_task WHERE error IS NOT NULL") == poisoned
        assert deaths(fleet) == 2


def test_group_runs_alone_and_delays_no_other_task(dsn: str, rows: Rows) -> None:
    """No worker starts another task beside the members, and all other due tasks are done. Two workers that claim at the
    same moment may divide a group between them."""
    put(dsn, *[poison.Wide(1.0) for _ in range(10)])
    rows("UPDATE pg_task SET claims = 1, wakeup_at = now()")
    put(dsn, *[poison.Short(number) for number in range(500)])
    burst(dsn, "--concurrency", "20", procs=2, code=0)
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'Short'") == 500
    workers = rows("SELECT pid, min(at), max(at) FROM mark WHERE step <> 'Short' GROUP BY pid")
    assert workers
    beside = "SELECT count(*) FROM mark WHERE step = 'Short' AND pid = $1 AND at BETWEEN $2 AND $3"
    assert [rows.value(beside, *worker) for worker in workers] == [0] * len(workers)


def test_suspects_left_to_others_do_not_delay_other_lanes(dsn: str, rows: Rows) -> None:
    """Its claims bring nothing from the lane of the suspects, whose priority is higher, and go on to the next lane."""
    with working(dsn, "--concurrency", "20", app="poison:app", order=signal.SIGQUIT):
        put(dsn, poison.Wide(60.0))
        rows.until(BEGUN, 1)
        suspects = "SELECT step, 5, 1, now() FROM pg_task CROSS JOIN generate_series(1, 3)"
        rows(f"INSERT INTO pg_task (step, priority, claims, wakeup_at) {suspects}")
        for number in range(1, 6):
            put(dsn, *[poison.Short()] * 10)
            rows.until("SELECT count(*) = $1 FROM mark WHERE step = 'Short'", 10 * number, timeout=20)
        assert rows.value("SELECT count(*) FROM mark WHERE step = 'begin'") == 1, "the suspects ran"


def test_group_runs_at_once_despite_small_claims(dsn: str, rows: Rows, tmp_path: Path) -> None:
    put(dsn, *[poison.Gated(str(tmp_path / "go")) for _ in range(60)])
    rows("UPDATE pg_task SET claims = 1, wakeup_at = now(), priority = 1")
    put(dsn, *[poison.Short(number) for number in range(100)])
    with Fleet(dsn, "--burst", "--concurrency", "60", "--batch", "7", app="poison:app") as fleet:
        rows.until(BEGUN, 60)
        (tmp_path / "go").touch()
        assert fleet.ends() == 0, fleet.output
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'end'") == 60


@pytest.mark.faults
def test_idle_worker_runs_suspects_a_busy_one_put_off(dsn: str, rows: Rows) -> None:
    add = 'INSERT INTO pg_task (step, claims) VALUES (\'{"Neighbours":{"Short":{"number":0}}}\', 1)'
    with working(dsn, "--concurrency", "5", app="poison:app", order=signal.SIGQUIT) as busy:
        put(dsn, poison.Wide(120.0))
        rows.until(BEGUN, 1)
        rows(add)
        busy.until("suspects.put_off", times=3)
        with Fleet(dsn, "--concurrency", "5", app="poison:app") as idle:
            idle.until("worker.ready")
            rows.until("SELECT count(*) = 1 FROM pg_task")
            for _ in range(8):
                rows.until("SELECT now() > max(at) + interval '1.2 s' FROM mark")
                rows(add)
                rows("NOTIFY pg_task_changed")
                rows.until("SELECT count(*) = 1 FROM pg_task", timeout=6)
        assert busy.output.count("suspects.put_off") <= 5, "it held a group that an idle worker could run"


def test_blocked_outcome_does_not_delay_suspects(dsn: str, rows: Rows, tmp_path: Path) -> None:
    async def scenario() -> None:
        holder = await asyncpg.connect(dsn)
        try:
            async with holder.transaction():
                await holder.execute("SELECT FROM pg_task FOR UPDATE")
                (tmp_path / "go").touch()
                await asyncio.to_thread(fleet.until, "database.locked")
                suspect = "INSERT INTO pg_task (step, claims, wakeup_at) SELECT step, 1, now() FROM pg_task"
                await asyncio.to_thread(rows, suspect)
                await asyncio.to_thread(rows.until, "SELECT count(*) = 2 FROM mark WHERE step = 'end'")
        finally:
            await holder.close()

    with working(dsn, app="poison:app") as fleet:
        put(dsn, poison.Gated(str(tmp_path / "go")))
        rows.until(BEGUN, 1)
        run(scenario())
        rows.until("SELECT count(*) = 0 FROM pg_task")


def test_task_with_locked_row_does_not_continue_beside_group(dsn: str, rows: Rows, tmp_path: Path) -> None:
    async def scenario() -> None:
        holder = await asyncpg.connect(dsn)
        try:
            async with holder.transaction():
                await holder.execute("SELECT FROM pg_task FOR UPDATE")
                (tmp_path / "go").touch()
                await asyncio.to_thread(fleet.until, "database.locked")
                suspect = "INSERT INTO pg_task (step, claims) VALUES ($1, 1)"
                gate = f'{{"Neighbours":{{"Gated":{{"path":"{tmp_path / "alone"}"}}}}}}'
                await asyncio.to_thread(rows, suspect, gate)
                await asyncio.to_thread(rows.until, BEGUN, 2)
        finally:
            await holder.close()

    with working(dsn, app="poison:app") as fleet:
        put(dsn, poison.Follows(str(tmp_path / "go")))
        rows.until(BEGUN, 1)
        run(scenario())
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE step LIKE '%Wide%'")  # the outcome is written
        rows("SELECT pg_sleep(0.3)")  # the time to begin, if it may
        (tmp_path / "alone").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert [row[0] for row in rows("SELECT step FROM mark ORDER BY at")] == ["begin", "begin", "end", "begin", "end"]


# --- the loss of a host


def lose_host(fleet: Fleet) -> None:
    os.killpg(fleet.process.pid, signal.SIGKILL)
    fleet.process.wait()


@pytest.mark.faults
def test_tasks_of_lost_host_run_again_in_halves(dsn: str, rows: Rows) -> None:
    put(dsn, *[poison.Wide(3.0) for _ in range(40)])
    with Fleet(dsn, *SHORT_LEASE, "--concurrency", "20", app="poison:app", procs=2) as fleet:
        rows.until(BEGUN, 40)
        lose_host(fleet)
    with working(dsn, *SHORT_LEASE, "--concurrency", "20", app="poison:app", procs=2):
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=60)
    second = [marks[1:] for _, marks in runs_of(rows)]
    assert all([step for _, step, _ in marks] == ["begin", "end"] for marks in second)
    ends = sorted(marks[1][0] for marks in second)
    assert sum(marks[0][0] < ends[0] for marks in second) >= 10, "they ran one after the other"


@pytest.mark.faults
def test_task_that_kills_its_host_is_parked_and_no_other(dsn: str, rows: Rows) -> None:
    steps: list[Any] = [poison.Wide(1.5) for _ in range(12)]
    put(dsn, *steps[:5], poison.KillsItsHost(), *steps[5:])
    over = "SELECT count(*) = 1 AND count(*) FILTER (WHERE error IS NOT NULL) = 1 FROM pg_task"
    for _ in range(25):
        with Fleet(dsn, *SHORT_LEASE, "--concurrency", "10", app="poison:app", procs=2) as fleet:
            while fleet.process.poll() is None and not rows.value(over):
                rows("SELECT pg_sleep(0.05)")
        if rows.value(over):
            break
    assert parked(rows) == ["Poison.KillsItsHost was running when its worker was lost 3 times"]
    assert rows("SELECT tried, claims FROM pg_task") == [(0, 0)]
    assert rows.value("SELECT count(DISTINCT task) FROM mark WHERE step = 'end'") == 12


@pytest.mark.faults
def test_host_lost_again_and_again_parks_no_task(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """The host is lost each time with two tasks under their third claim, in one worker or in two."""
    go = tmp_path / "go"
    put(dsn, *[poison.Begins(str(go))] * 2)
    for number in range(1, 5):
        with Fleet(dsn, *SHORT_LEASE, "--concurrency", "1", app="poison:app", procs=2) as fleet:
            rows.until(BEGUN, 2 * number, timeout=60)
            assert parked(rows) == []
            lose_host(fleet)
    go.touch()
    burst(dsn, *SHORT_LEASE, "--burst-horizon", "20", procs=2, code=0)
    assert rows.value("SELECT count(*) FROM pg_task") == 0


# --- the rows that the statements write


async def put_leased(db: Any, token: str, claims: list[int], *, ends: str = "-1 s") -> list[Any]:
    """Insert tasks under one token, whose leases end at that time."""
    return [
        await db.fetchval(
            "INSERT INTO pg_task (step, locked_by, lock_expires_at, claims)"
            ' VALUES (\'{"T":{"S":null}}\', $1, now() + $2::text::interval, $3) RETURNING id',
            *(token, ends, number),
        )
        for number in claims
    ]


def of(worker: str) -> str:
    return f"{worker * 8}-{worker * 4}-{worker * 4}-0000-000000000000"


def expire(
    dsn: str, *held: tuple[str, list[int], str], bounds: tuple[float, ...] = ALL_LEASES
) -> list[list[tuple[int, Any]]]:
    """Expire the leases of these workers. Return the claims and the due time of each task."""

    async def main() -> list[list[tuple[int, Any]]]:
        db = await connect(dsn, name="test", settings=HOT_SETTINGS)
        try:
            ids = [await put_leased(db, of(worker), claims, ends=ends) for worker, claims, ends in held]
            await db.fetch(statement("expire"), 1000, *bounds)
            query = "SELECT claims, wakeup_at FROM pg_task WHERE id = ANY ($1)"
            return [[tuple(row) for row in await db.fetch(query, mine)] for mine in ids]
        finally:
            await db.close()

    found: list[list[tuple[int, Any]]] = run(main())
    return found


def test_leases_of_one_lost_worker_become_two_groups(dsn: str) -> None:
    one, other = expire(dsn, ("a", [1] * 5, "-1 s"), ("b", [1] * 4, "-2 s"))
    assert sorted(Counter(at for _, at in one).values()) == [2, 3]
    assert sorted(Counter(at for _, at in other).values()) == [2, 2]
    assert not {at for _, at in one} & {at for _, at in other}


@pytest.mark.parametrize("ends", ["-1 s", "5 s"], ids=["lost as well", "not yet known to be lost"])
@pytest.mark.parametrize("worker", ["a", "b"], ids=["in its worker", "in another"])
def test_third_loss_beside_another_third_loss_parks_none(dsn: str, worker: str, ends: str) -> None:
    ((mine,), (others,)) = expire(dsn, ("a", [3], "-1 s"), (worker, [3], ends))
    assert (mine[0], others[0]) == (2, 2)


def test_third_loss_beside_one_that_was_not_freed_parks_none(dsn: str) -> None:
    """Its row was locked when the last statement passed its end: it lies before the floor of this one."""
    since = float("inf"), 30.0, float("-inf"), float("inf")
    ((mine,), (others,)) = expire(dsn, ("a", [3], "-1 s"), ("b", [3], "-1 min"), bounds=since)
    assert (mine[0], others[0]) == (2, 2)


def test_third_loss_alone_counts(dsn: str) -> None:
    ((one,), others) = expire(dsn, ("a", [3], "-1 s"), ("a", [2, 1], "-1 s"))
    assert one[0] == 3
    assert sorted(claims for claims, _ in others) == [1, 2]


def test_lost_consumer_leases_keep_claims_and_due_time(dsn: str) -> None:
    async def old() -> Any:
        db = await asyncpg.connect(dsn)
        try:
            token = "68616e64-0000-0000-0000-000000000000"
            ids = await put_leased(db, token, [1, 1, 3, 3])
            before = await db.fetch("SELECT id, wakeup_at FROM pg_task WHERE claims = 1 ORDER BY id")
            await db.fetch(statement("expire"), 1000, *ALL_LEASES)
            assert await db.fetch("SELECT id, wakeup_at FROM pg_task WHERE claims = 1 ORDER BY id") == before
            return await db.fetchval("SELECT array_agg(claims ORDER BY claims) FROM pg_task WHERE id = ANY ($1)", ids)
        finally:
            await db.close()

    assert asyncio.run(old()) == [1, 1, 3, 3]


def test_consumer_token_has_the_consumer_prefix(dsn: str) -> None:
    from pgtask import Client

    async def main() -> Any:
        async with Client(dsn) as client, client.consumer("default") as consumer:
            await client.enqueue_many([poison.Short()])
            assert len(await consumer.claim()) == 1
            db = await asyncpg.connect(dsn)
            try:
                return str(await db.fetchval("SELECT locked_by FROM pg_task"))
            finally:
                await db.close()

    assert run(main()).startswith("68616e64-")


def test_claim_statements_differ_in_one_condition() -> None:
    def body(name: str) -> list[str]:
        return [line for line in statement(name).splitlines() if not line.startswith("--")]

    ours = body("claim_unsuspected")
    ours.remove("      AND claims = 0")
    assert ours == body("claim")
