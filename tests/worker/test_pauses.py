"""Pauses: no worker or consumer starts what is paused, on any host, until it is resumed; nothing else waits for it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import flows
import pytest
from fleet import Fleet, Rows, burst, put, ready
from pausing import Nap
from sessions import connected
from shifts import Begin, Put, Shift, Tell, told

from pgtask import Client, Enqueue
from pgtask._worker.foreign import Foreign

pytestmark = pytest.mark.timeout(120)

WAITING = "SELECT count(*) FROM pg_task WHERE locked_by IS NULL AND queue = $1"
ROWS = "SELECT count(*) FROM pg_task"


def none(value: int) -> bool:
    return value == 0


def pause(rows: Rows, kind: str, name: str) -> None:
    rows("INSERT INTO pg_task_pauses (kind, name) VALUES ($1, $2)", kind, name)


def resume(rows: Rows) -> None:
    rows("DELETE FROM pg_task_pauses")


# --- queues


@pytest.mark.parametrize("options", [(), ("--no-listen",), ("--queue", "a", "--queue", "b")], ids=repr)
def test_paused_queue_waits_and_others_do_not(dsn: str, rows: Rows, options: tuple[str, ...]) -> None:
    with ready(dsn, *options, procs=2, app="shifts:app") as fleet:
        pause(rows, "queue", "a")
        fleet.until("work.paused", times=2)
        put(dsn, *(Tell("a") for _ in range(20)), queue="a")
        put(dsn, *(Tell("b") for _ in range(20)), queue="b")
        rows.until("SELECT count(*) FROM pg_task WHERE queue = 'b'", holds=none)
        assert told(rows) == ["b"] * 20
        assert rows.value(WAITING + " AND claims = 0", "a") == 20
        resume(rows)
        rows.until(ROWS, holds=none)
    assert sorted(told(rows)) == ["a"] * 20 + ["b"] * 20


def test_pause_is_obeyed_within_a_second(dsn: str, rows: Rows) -> None:
    """While two workers drain the queue, with tasks in hand."""
    rows("CREATE TABLE begun (at timestamptz DEFAULT clock_timestamp())")
    with ready(dsn, "--concurrency", "4", procs=2, app="pausing:app") as fleet:
        put(dsn, *(Nap() for _ in range(3000)), queue="a")
        rows.until("SELECT count(*) FROM begun")
        pause(rows, "queue", "a")
        fleet.until("work.paused", times=2)
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL", holds=none)
        paused_at, last = rows("SELECT paused_at, (SELECT max(at) FROM begun) FROM pg_task_pauses")[0]
        assert last - paused_at < timedelta(seconds=1)
        assert rows.value(WAITING, "a") > 0
        assert rows.value("SELECT max(claims) FROM pg_task") == 0, "what had not started was released as never claimed"
        resume(rows)
        rows.until(ROWS, holds=none)
    assert rows.value("SELECT count(*) FROM begun") == 3000


def test_pause_survives_a_restart_and_ends_a_burst(dsn: str, rows: Rows) -> None:
    pause(rows, "queue", "a")
    pause(rows, "step", "Tale.Park")
    put(dsn, Tell("a"), queue="a")
    put(dsn, Tell("b"))
    fleet = burst(dsn, app="shifts:app", procs=2)
    assert told(rows) == ["b"]
    assert "queue a, step Tale.Park: paused, so tasks of these may be left" in fleet.output
    resume(rows)
    fleet = burst(dsn, app="shifts:app")
    assert told(rows) == ["b", "a"]
    assert "paused" not in fleet.output


# --- tasks and steps


@pytest.mark.parametrize("options", [(), ("--unknown", "park")], ids=repr)
@pytest.mark.parametrize(("kind", "name"), [("task", "Tale"), ("step", "Tale.Tell")])
def test_paused_task_or_step_waits(dsn: str, rows: Rows, kind: str, name: str, options: tuple[str, ...]) -> None:
    with ready(dsn, *options, procs=2, app="shifts:app") as fleet:
        pause(rows, kind, name)
        fleet.until("work.paused", times=2)
        put(dsn, *(Tell("paused") for _ in range(500)))
        put(dsn, Put("goes on"))
        rows.until("""SELECT count(*) FROM pg_task WHERE step NOT LIKE '{"Tale":%'""", holds=none)
        assert told(rows) == ["goes on"] * 2
        assert rows.value(WAITING + " AND claims = 0 AND tried = 0", "default") == 500
        resume(rows)
        rows.until(ROWS, holds=none)


def test_paused_key_waits_and_others_of_its_task_do_not(dsn: str, rows: Rows) -> None:
    with ready(dsn, procs=2, app="shifts:app") as fleet:
        pause(rows, "key", "Tale/a.b$")
        fleet.until("work.paused", times=2)
        keys = ["a.b$", "a.b", "axb$", "a.b$$", None]
        put(dsn, *(Enqueue(Tell(str(key)), key=key) for key in keys))
        rows.until(ROWS, holds=lambda value: value == 1)
        assert sorted(told(rows)) == ["None", "a.b", "a.b$$", "axb$"]
        assert rows("SELECT key, claims, tried FROM pg_task") == [("Tale/a.b$", 0, 0)]
        resume(rows)
        rows.until(ROWS, holds=none)
    assert told(rows)[-1] == "a.b$"


def test_next_step_of_a_paused_key_waits(dsn: str, rows: Rows) -> None:
    with ready(dsn, app="shifts:app") as fleet:
        put(dsn, Enqueue(Shift("slow", then="went on"), key="k"))
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL", holds=lambda value: value == 1)
        pause(rows, "key", "Shifts/k")
        fleet.until("work.paused")
        told(rows)
        rows("INSERT INTO told (text) VALUES ('go')")
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NULL", holds=lambda value: value == 1)
        assert "went on" not in told(rows)
        resume(rows)
        rows.until(ROWS, holds=none)
    assert "went on" in told(rows)


def test_next_step_that_is_paused_waits(dsn: str, rows: Rows) -> None:
    """Also the one that would go on in the same worker."""
    with ready(dsn, app="shifts:app") as fleet:
        pause(rows, "step", "Shifts.Put")
        fleet.until("work.paused")
        put(dsn, *(Begin() for _ in range(5)))
        waiting = """SELECT count(*) FROM pg_task WHERE step LIKE '{"Shifts":{"Put"%' AND locked_by IS NULL"""
        rows.until(waiting, holds=lambda value: value == 5)
        assert told(rows) == []
        resume(rows)
        rows.until(ROWS, holds=none)


@pytest.mark.parametrize("kind", ["task", "queue"])
def test_what_runs_in_turns_is_paused(dsn: str, rows: Rows, kind: str) -> None:
    """Short steps whose rows a transaction holds."""
    with ready(dsn, app="shifts:app") as fleet:
        put(dsn, *(Tell("") for _ in range(20_000)))
        rows.until(ROWS, holds=none)
        put(dsn, *(Tell("") for _ in range(60_000)))
        rows.until(ROWS, holds=lambda value: 0 < value < 50_000)
        pause(rows, kind, "Tale" if kind == "task" else "default")
        fleet.until("work.paused")
        put(dsn, Put("goes on"), queue="other")
        rows.until("SELECT count(*) FROM pg_task WHERE queue = 'other'", holds=none)
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL", holds=none)
        left = rows.value(ROWS)
        resume(rows)
        rows.until(ROWS, holds=none)
    assert left > 0


def test_task_behind_a_flood_of_paused_ones_runs(dsn: str, rows: Rows) -> None:
    pause(rows, "step", "Tale.Tell")
    step = '{"Tale":{"Tell":{"text":""}}}'
    rows("INSERT INTO pg_task (step) SELECT $1 FROM generate_series(1, 60000)", step)
    put(dsn, Put("goes on"))
    burst(dsn, "--burst-horizon", "3", app="shifts:app")
    assert told(rows) == ["goes on"] * 2
    assert rows.value(ROWS) == 60_000


def test_paused_workflow_waits(dsn: str, rows: Rows) -> None:
    async def trigger() -> Any:
        async with Client(dsn) as client:
            return await client.trigger(flows.typed, flows.Params(1))

    pause(rows, "task", "typed")
    asyncio.run(trigger())
    burst(dsn, app="flows:app")
    assert rows.value(ROWS) == 1
    resume(rows)
    burst(dsn, app="flows:app")
    assert rows.value(ROWS) == 0


def test_lanes_are_claimed_as_before_once_a_task_is_resumed() -> None:
    """But for those that held tasks of other apps."""
    foreign = Foreign(None, ["Ours"])  # type: ignore[arg-type]
    foreign.remember_claim(UUID(int=1), "shared", 0)
    foreign.mark_lane(UUID(int=1))
    before = foreign.pattern
    foreign.set_paused(["Ours"], [])
    assert all(foreign.is_mixed(queue, 0) for queue in ("shared", "own"))
    foreign.set_paused([], [], ["Ours/k"])
    assert foreign.is_mixed("own", 0)
    foreign.set_paused([], [])
    assert [foreign.is_mixed(queue, 0) for queue in ("shared", "own")] == [True, False]
    assert foreign.pattern == before


def test_nothing_is_claimed_before_the_pauses_were_read(dsn: str, rows: Rows) -> None:
    put(dsn, Tell("a"))
    rows("ALTER TABLE pg_task_pauses RENAME COLUMN name TO word")
    with Fleet(dsn, app="shifts:app") as fleet:
        fleet.until("database.refused")
    assert rows.value(ROWS + " WHERE claims = 0") == 1


def test_worker_that_cannot_read_the_pauses_waits_at_rest(dsn: str, rows: Rows) -> None:
    """And goes on by itself, as does a consumer."""
    put(dsn, *(Tell("a") for _ in range(3)))

    async def main() -> None:
        async with connected(dsn) as db:
            await db.execute("BEGIN; LOCK TABLE pg_task_pauses")
            with Fleet(dsn, app="shifts:app") as fleet:
                await asyncio.to_thread(fleet.until, "worker.ready")
                worker = max(fleet.family(), key=lambda process: process.create_time())
                before = worker.cpu_times()
                async with Client(dsn) as client, client.consumer() as consumer:
                    assert await consumer.claim(wait=timedelta(seconds=2)) == []
                used = worker.cpu_times().user - before.user
                assert used < 0.5, "seconds of CPU in two seconds"
                assert await asyncio.to_thread(rows.value, ROWS + " WHERE claims = 0") == 3
                await db.execute("ROLLBACK")
                await asyncio.to_thread(rows.until, ROWS, holds=none)

    asyncio.run(main())


def test_task_in_a_paused_queue_does_not_go_on_to_its_next_step(dsn: str, rows: Rows) -> None:
    with ready(dsn, app="shifts:app") as fleet:
        pause(rows, "queue", "other")
        fleet.until("work.paused")
        put(dsn, *(Begin() for _ in range(5)))
        rows.until(ROWS, holds=none)
    assert set(told(rows)) == {"went on"}, "five, and the tries of those that ran before the first had told"


# --- consumers


@pytest.mark.parametrize(("kind", "name"), [("queue", "a"), ("task", "Tale"), ("key", "Tale/k")])
def test_consumer_obeys_pauses(dsn: str, rows: Rows, kind: str, name: str) -> None:
    put(dsn, Enqueue(Tell("x"), queue="a", key="k"))

    async def main() -> None:
        async with Client(dsn) as client, client.consumer("a") as consumer:
            await asyncio.to_thread(pause, rows, kind, name)
            assert await consumer.claim(wait=timedelta(seconds=0.2)) == []
            waits = asyncio.create_task(consumer.claim(wait=timedelta(seconds=30)))
            await asyncio.to_thread(resume, rows)
            assert len(await waits) == 1

    asyncio.run(main())
