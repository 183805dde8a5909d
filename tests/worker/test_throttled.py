"""`Throttled` puts a step off, in a task and in a workflow, and costs no try."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import throttled_flows as flows
from fix_database import run
from fleet import Fleet, Rows
from run_kit import SOON, ask, working

from pgtask import App, Client, Context, Done, Permanent, Policy, Task, Throttled, WorkflowContext, workflow
from pgtask._delays import MAX_DELAY
from pgtask._retry import seconds_before_retry, throttled_seconds
from pgtask.testing import MemoryWorker, Try


class Quiet(Task):
    policy = Policy(retry_limit=1, retry_delay=timedelta(seconds=1))


class Call(Quiet):
    async def run(self, ctx: Context) -> Done:
        return Done()


class CallInThread(Quiet):
    def run(self, ctx: Context) -> Done:
        return Done()


async def finished(step: Task, *faults: tuple[BaseException, int]) -> tuple[Any, int, Sequence[Try]]:
    """Run a step that raises these errors first, so often. Returns its task, the count of errors, and its tries."""
    async with MemoryWorker(App(Quiet)) as worker:
        for error, times in faults:
            worker.fail(type(step), error, times=times)
        id = await worker.client.enqueue(step)
        await worker.run()
        task = worker.task(id)
        return task, worker._dispatch.errors, task.tries


# --- tasks in memory


@pytest.mark.parametrize("step", [Call(), CallInThread()], ids=repr)
def test_throttled_step_costs_no_try_however_often(step: Task) -> None:
    task, errors, tries = run(finished(step, (Throttled(60), 50)))
    assert (task.state, task.tried, errors) == ("done", 0, 0)
    assert [one.attempt for one in tries] == [1] * 51
    assert tries[-1].at - tries[0].at == timedelta(minutes=50)
    assert (tries[0].error or "").startswith("pgtask.Throttled: retry after 60")


def test_throttled_step_keeps_the_tries_that_have_failed() -> None:
    task, errors, tries = run(finished(Call(), (OSError("no"), 1), (Throttled(1), 3), (OSError("no"), 1)))
    assert (task.state, task.tried, errors) == ("parked", 2, 2)
    assert [one.attempt for one in tries] == [1, 2, 2, 2, 2]


# --- tasks in a worker


def test_throttled_task_waits_in_its_row(dsn: str, rows: Rows) -> None:
    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue_many([flows.Ask(10_800.0), flows.AskInThread(10_800.0)])

    run(enqueue())
    with Fleet(dsn, app="throttled_flows:app") as fleet:
        rows.until("SELECT count(*) = 2 AND bool_and(wakeup_at > now() + '2 h'::interval) FROM pg_task")
        fleet.until("step.throttled")
        assert "step.failed" not in fleet.output
    found = rows("SELECT tried, claims, error, locked_by, wakeup_at - updated_at FROM pg_task")
    for *state, delay in found:
        assert state == [0, 0, None, None]
        assert timedelta(hours=2.9) < delay < timedelta(hours=3.1)


def test_throttled_task_is_done_in_the_end(dsn: str, rows: Rows) -> None:

    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue(flows.AskThrice())

    run(enqueue())
    with Fleet(dsn, "--burst", app="throttled_flows:app") as fleet:
        assert fleet.ends() == 0
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert rows.value("SELECT count(*) FROM mark") == 4


# --- steps of workflows


def test_throttled_step_of_a_run_keeps_its_tries(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(flows.asking, 5)
        return await started.result(timeout=SOON)

    with working(dsn, app="throttled_flows:app"):
        assert ask(dsn, question) == 6
    assert [tuple(row) for row in rows("SELECT tried, result, due_at FROM pg_task_checkpoints")] == [(0, "6", None)]


def test_throttled_step_pauses_its_run(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(flows.asking_later)
        await asyncio.to_thread(
            rows.until,
            "SELECT locked_by IS NULL AND wakeup_at = paused_until AND wakeup_at > now() + '2 h'::interval"
            " FROM pg_task JOIN pg_task_runs USING (id)",
        )
        before = await started.status()
        await started.resume()
        return before, await started.result(timeout=SOON)

    with working(dsn, app="throttled_flows:app"):
        status, result = ask(dsn, question)
    assert (status.state, status.waits_on, result) == ("PAUSED", "try 1 of step ask", 2)


def test_throttled_step_of_a_run_costs_no_try_in_memory() -> None:
    async def call() -> int:
        return 7

    @workflow("calls", policy=Policy(retry_limit=1, retry_delay=timedelta(0)))
    async def calls(ctx: WorkflowContext) -> int:
        return await ctx.step("call", call)

    async def main(replays: bool) -> None:
        async with MemoryWorker(App(calls), replays=replays) as worker:
            worker.fail("call", OSError("no"))
            worker.fail("call", Throttled(timedelta(days=1)), times=20)
            start = worker.now
            started = await worker.client.trigger(calls)
            await worker.run(within=timedelta(days=2))
            (put_off,) = worker.recorded(started.id)
            assert (put_off.tried, put_off.result) == (1, None)
            await worker.run()
            assert await started.result() == 7
            assert worker.now - start == timedelta(days=20)

    for replays in (False, True):
        run(main(replays))


def test_throttled_outside_of_steps_costs_no_try_either() -> None:
    raised: list[int] = []

    @workflow("raises", policy=Policy(retry_limit=0))
    async def raises(ctx: WorkflowContext) -> int:
        if len(raised) < 5:
            raised.append(ctx.attempt)
            raise Throttled(60)
        return ctx.attempt

    async def main() -> None:
        async with MemoryWorker(App(raises)) as worker:
            start = worker.now
            started = await worker.client.trigger(raises)
            await worker.run()
            assert await started.result() == 1
            assert (raised, worker.now - start) == ([1] * 5, timedelta(minutes=5))
            assert worker._dispatch.errors == 0

    run(main())


# --- values


@pytest.mark.parametrize("after", [5, 0, 2.5, timedelta(seconds=5), MAX_DELAY])
def test_delay_of_throttled_is_a_time_or_seconds(after: Any) -> None:
    expected = after if isinstance(after, timedelta) else timedelta(seconds=after)
    assert Throttled(after).retry_after == expected
    assert str(Throttled(after, "429")) == "429"


@pytest.mark.parametrize(
    "after", [-1, -0.5, True, None, "5", float("nan"), float("inf"), 1e300, 10**12, timedelta.max, -timedelta(1)]
)
def test_delay_of_throttled_fits_a_row(after: Any) -> None:
    with pytest.raises(ValueError, match=r"^Throttled\(retry_after=.*\) must be a number of seconds, or a ") as caught:
        Throttled(after)
    assert f"retry_after={after!r}" in str(caught.value)


class Unchecked(Throttled):
    """A subclass that sets `retry_after` by itself, as it likes."""

    def __init__(self, retry_after: Any) -> None:
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Unchecked(timedelta(seconds=7)), 7.0),
        (Unchecked(timedelta(seconds=-7)), 0.0),
        (Unchecked(timedelta.max), MAX_DELAY.total_seconds()),
        (Unchecked("soon"), 1.0),
        (OSError(), None),
        (Permanent(), None),
    ],
    ids=repr,
)
def test_subclass_of_throttled_cannot_break_the_delay(error: BaseException, seconds: float | None) -> None:
    assert throttled_seconds(error) == seconds


# --- the log


def test_throttled_steps_log_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pgtask")

    async def main() -> None:
        async with MemoryWorker(App(Quiet), concurrency=50) as worker:
            worker.fail(Call, Throttled(0), times=500)
            await worker.client.enqueue_many([Call() for _ in range(50)])
            await worker.run()

    run(main())
    lines = [record for record in caplog.records if "step.throttled" in record.getMessage()]
    assert 1 <= len(lines) < 100
    assert {record.levelno for record in lines} == {logging.INFO}


def test_error_beside_throttled_still_follows_the_policy() -> None:
    assert seconds_before_retry(Policy(retry_limit=1, retry_delay=timedelta(seconds=3)), OSError(), 1) == 3.0
