"""Metrics of real fleets: what they count is what the ledger of the test has."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from counted import LEDGER, Awaits, First, Plain, Refused, Threaded, Together, Writes, counted_flow
from exported import ANY_PORT, APP, Exported
from fleet import Rows, put, ready, stop, working

from pgtask import Client


def until_equal(look: Callable[[], Any], wanted: Any, timeout: float = 20) -> None:
    """Look until it is what is wanted: the last answer of the database precedes its counts."""
    deadline = time.monotonic() + timeout
    while (found := look()) != wanted:
        assert time.monotonic() < deadline, (found, wanted)


def drained(rows: Rows) -> None:
    rows.until("SELECT count(*) FROM pg_task WHERE error IS NULL", holds=lambda left: left == 0, timeout=60)


def test_counters_equal_the_ledger(dsn: str, rows: Rows) -> None:
    put(dsn, *[Plain()] * 3000, *[Plain(fails=1)] * 200, *[Plain(fails=9)] * 30)
    put(dsn, *[Refused()] * 50, *[First()] * 390, *[First(0.001)] * 10, *[Awaits()] * 300, *[Threaded()] * 60)
    put(dsn, *[Together()] * 700, *[Together(bad=True)] * 3)
    put(dsn, *[Plain()] * 20, expires=datetime.now(UTC) - timedelta(seconds=1))
    with working(dsn, *ANY_PORT, procs=2, app=APP) as fleet:
        drained(rows)
        exported = Exported(fleet)
        wanted = {
            ("Plain", "done"): 3200,
            ("Plain", "retried"): 200 + 2 * 30,
            ("Plain", "parked"): 30,
            ("Plain", "expired"): 20,
            ("Refused", "parked"): 50,
            ("First", "next"): 400,
            ("Second", "done"): 400,
            ("Awaits", "done"): 300,
            ("Threaded", "done"): 60,
            ("Together", "done"): 700,
            ("Together", "retried"): 3,
            ("Together", "parked"): 3,
        }
        until_equal(exported.outcomes, wanted)
        samples = exported.samples()
        assert samples["pgtask_step_transitions_total", "Second", "First", "Counted"] == 400
        runs = ("messaging_process_duration_seconds_count", "process", "pgtask")
        assert samples[*runs, "Plain", "Counted"] == 3200 + 260 + 30
        assert samples[*runs, "Threaded", "Counted"] == 60
        assert samples[*runs, "Together", "Counted"] == 700 + 2 * 3


def test_they_never_fall_while_workers_die(dsn: str, rows: Rows) -> None:
    rows(LEDGER)
    put(dsn, *[Writes()] * 6000)
    with working(dsn, *ANY_PORT, "--lease-timeout", "4", "--heartbeat-interval", "0.5", procs=2, app=APP) as fleet:
        exported = Exported(fleet)
        before: dict[tuple[str, ...], float] = {}
        kills = 0
        deadline = time.monotonic() + 60
        while rows.value("SELECT count(*) FROM pg_task"):
            assert time.monotonic() < deadline
            now = {key: value for key, value in exported.samples().items() if key[0].endswith(("_total", "_count"))}
            fallen = {key: (value, now.get(key)) for key, value in before.items() if now.get(key, -1.0) < value}
            assert not fallen
            before = now
            workers = [child for child in fleet.family() if child.name().startswith("pgtask w")]
            if (
                workers
                and kills < 5
                and now.get(("pgtask_step_outcomes_total", "done", "Writes", "Counted"), 0) > kills * 900
            ):
                os.kill(workers[kills % len(workers)].pid, signal.SIGKILL)
                kills += 1
        assert kills == 5
        done = rows.value("SELECT count(*) FROM ledger")
        assert done == 6000
        # A kill loses the outcomes that were committed and not yet counted: those of one step each that was committing.
        time_out = time.monotonic() + 5
        while (counted := exported.outcomes()["Writes", "done"]) < done - 5 * 100 and time.monotonic() < time_out:
            pass
        assert done - 5 * 100 <= counted <= done


def test_runs_of_workflows_are_counted(dsn: str, rows: Rows) -> None:
    async def trigger() -> None:
        async with Client(dsn) as client:
            for number in range(12):
                await client.trigger(counted_flow, number % 4 == 0)

    asyncio.run(trigger())
    with working(dsn, *ANY_PORT, app=APP) as fleet:
        drained(rows)
        until_equal(Exported(fleet).outcomes, {("Run", "done"): 9, ("Run", "retried"): 15, ("Run", "parked"): 3})


def test_an_exporter_that_dies_is_replaced(dsn: str, rows: Rows) -> None:
    put(dsn, *[Plain()] * 100)
    with working(dsn, *ANY_PORT, app=APP) as fleet:
        drained(rows)
        exported = Exported(fleet)
        until_equal(exported.outcomes, {("Plain", "done"): 100})
        (exporter,) = [child for child in fleet.family() if child.name() == "pgtask exporter"]
        exporter.kill()
        fleet.until("exporter.died")
        until_equal(exported.outcomes, {("Plain", "done"): 100})
        assert exporter.pid not in [child.pid for child in fleet.family()]


def test_counts_survive_a_rolling_restart(dsn: str, rows: Rows) -> None:
    put(dsn, *[Plain()] * 500)
    with working(dsn, *ANY_PORT, procs=2, app=APP) as fleet:
        drained(rows)
        exported = Exported(fleet)
        until_equal(exported.outcomes, {("Plain", "done"): 500})
        fleet.send(signal.SIGHUP)
        fleet.until("reload.done")
        assert exported.outcomes() == {("Plain", "done"): 500}
        put(dsn, *[Plain()] * 500)
        until_equal(exported.outcomes, {("Plain", "done"): 1000})
        assert exported.samples()["pgtask_workers_ready",] == 2


def test_waits_and_durations_are_those_of_the_clock(dsn: str, rows: Rows) -> None:
    put(dsn, *[Awaits(seconds=0.3)] * 10)
    rows("UPDATE pg_task SET wakeup_at = now() - interval '20 s'")
    with working(dsn, *ANY_PORT, app=APP) as fleet:
        drained(rows)
        exported = Exported(fleet)
        until_equal(exported.outcomes, {("Awaits", "done"): 10})
        samples = exported.samples()
        duration = samples["messaging_process_duration_seconds_sum", "process", "pgtask", "Awaits", "Counted"]
        assert 2.9 <= duration < 10
        assert 200 <= samples["pgtask_queue_wait_seconds_sum", "Awaits", "Counted"] < 400


def test_a_scrape_does_not_wait_for_a_hung_worker(dsn: str) -> None:
    with ready(dsn, *ANY_PORT, app=APP) as fleet:
        exported = Exported(fleet)
        workers = [child for child in fleet.family() if child.name().startswith("pgtask w")]
        for worker in workers:
            worker.suspend()
        assert exported.samples()["pgtask_workers_wanted",] == 1
        for worker in workers:
            worker.resume()
        stop(fleet, dsn)
