"""`Transient` and `Permanent` mean in the step of a task what they mean in the step of a workflow."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import pytest
import task_retry_flows as flows
from fix_database import run
from fleet import Fleet, Rows

from pgtask import Client, Policy, Transient
from pgtask._delays import MAX_DELAY
from pgtask._retry import seconds_before_retry
from pgtask.testing import MemoryWorker, run_task


async def gaps(step: Any) -> list[float]:
    """Seconds between the tries of a step, by the clock in memory."""
    async with MemoryWorker(flows.app) as worker:
        id = await worker.client.enqueue(step)
        await worker.run()
        task = worker.task(id)
        assert task.state == "done"
        times = [one.at for one in task.tries]
        return [(after - before).total_seconds() for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (flows.Waits(10.0), [10]),
        (flows.Waits(3600.0, times=3), [3600, 3600, 3600]),
        (flows.Waits(0.0), [0]),
        (flows.WaitsInThread(10.0), [10]),
        (flows.AsThePolicySays(), [0.02]),
        (flows.Hides("permanent"), [0.02]),
        (flows.Hides("transient"), [0.02]),
    ],
    ids=repr,
)
def test_transient_sets_the_time_of_the_retry(step: Any, expected: list[float]) -> None:
    assert run(gaps(step)) == pytest.approx(expected)


@pytest.mark.parametrize("step", [flows.Refuses(), flows.RefusesInThread(), flows.RefusesLater()], ids=repr)
def test_permanent_parks_the_task_at_once(step: Any) -> None:
    task = run_task(flows.app, step)
    assert (task.state, task.tried) == ("parked", 1)
    assert (task.error or "").startswith("pgtask.Permanent: it cannot be (at ")


class Unchecked(Transient):
    """A subclass that sets `retry_after` by itself, as it likes."""

    def __init__(self, retry_after: Any) -> None:
        self.retry_after = retry_after


class Broken(Transient):
    @property
    def retry_after(self) -> timedelta | None:  # type: ignore[override]
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Unchecked(timedelta(seconds=7)), 7.0),
        (Unchecked(timedelta(seconds=-7)), 0.0),
        (Unchecked(timedelta.max), MAX_DELAY.total_seconds()),
        (Unchecked(3), 5.0),
        (Unchecked("soon"), 5.0),
        (Broken.__new__(Broken), 5.0),
    ],
    ids=["in bounds", "negative", "too long", "number", "text", "broken"],
)
def test_subclass_of_transient_cannot_break_the_retry(error: Transient, seconds: float) -> None:
    policy = Policy(retry_limit=1, retry_delay=timedelta(seconds=5))
    assert seconds_before_retry(policy, error, 1) == seconds
    assert seconds_before_retry(policy, error, 2) is None


def test_transient_counts_against_the_limit() -> None:
    task = run_task(flows.app, flows.Waits(1.0, times=9))
    assert (task.state, task.tried) == ("parked", 5)


def test_worker_retries_as_memory_does(dsn: str) -> None:
    rows = Rows(dsn)

    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue_many([flows.Waits(10_800.0), flows.WaitsInThread(10_800.0)])
            await client.enqueue_many([flows.Refuses(), flows.RefusesInThread()])
            await client.enqueue_many([flows.AsThePolicySays(), flows.Waits(0.0)])

    run(enqueue())
    with Fleet(dsn, app="task_retry_flows:app") as fleet:
        fleet.until("worker.ready")
        rows.until(
            "SELECT count(*) = 4 AND count(*) FILTER (WHERE locked_by IS NOT NULL) = 0 AND min(tried) = 1 FROM pg_task"
        )
    found = rows("SELECT step, tried, error, wakeup_at - updated_at FROM pg_task")
    assert {row[1] for row in found} == {1}
    for step, _, error, delay in found:
        if "Waits" in step:
            assert error is None
            assert timedelta(hours=2.9) < delay < timedelta(hours=3.1)
        else:
            assert error.startswith("pgtask.Permanent: it cannot be (at ")
