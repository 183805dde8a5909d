"""Steps of runs that are tried again: their times and counts; and branches that wait beside others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import branch_flows
import flows
import pytest
from fix_commands import Command
from fix_database import run
from fleet import Rows
from run_kit import SOON, ask, working
from run_race import CLAIMED, open_race, play_out

from pgtask import App, Client, Policy, Transient, WorkflowContext, workflow
from pgtask._workflow.entries import LoadHistory, RecordCheckpoint
from pgtask._workflow.values import Checkpoint
from pgtask.testing import MemoryWorker

Question = Callable[[Client], Awaitable[Any]]
PAUSED = """
    SELECT waits_on LIKE '%try 2 of step shaky%' AND locked_by IS NULL FROM pg_task JOIN pg_task_runs USING (id)
"""

PAUSED_AGAIN = """
    SELECT locked_by IS NULL AND wakeup_at = paused_until AND wakeup_at > now()
    FROM pg_task JOIN pg_task_runs USING (id)
"""


@pytest.fixture
def asking(dsn: str, rows: Rows) -> Iterator[Callable[[Question], Any]]:
    """Ask a client something while a fleet is ready."""
    with working(dsn, app="branch_flows:app"):
        yield lambda question: ask(dsn, question)


def tries(rows: Rows, id: UUID, step: str) -> list[datetime]:
    return [row[0] for row in rows("SELECT at FROM mark WHERE run = $1 AND step = $2 ORDER BY at", id, step)]


# --- when


def test_a_signal_does_not_hasten_the_retry_of_a_step(asking: Any, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(branch_flows.beside_signal, 1.5)
        await asyncio.to_thread(rows.until, PAUSED)
        await started.signal("go", 7)
        assert await started.result(timeout=SOON) == [2, 7]
        return started.id

    first, second = tries(rows, asking(question), "shaky")
    assert second - first > timedelta(seconds=1.5)


def test_a_crash_does_not_hasten_the_retry_of_a_step(asking: Any, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(branch_flows.beside_crash)
        assert await started.result(timeout=SOON) == 2
        return started.id

    first, second = tries(rows, asking(question), "shaky")
    assert second - first > timedelta(seconds=3)
    assert rows.value("SELECT count(DISTINCT pid) FROM mark") == 2


def test_signal_does_not_hasten_a_retry_in_memory_either() -> None:
    tried_at: list[datetime] = []

    async def main() -> None:
        async with MemoryWorker(App(told_twice), resources=tried_at) as worker:
            start = worker.now
            started = await worker.client.trigger(told_twice)
            await worker.run(within=timedelta(hours=1))
            await started.signal("go", 1)
            await worker.run(within=timedelta(hours=1))
            (put_off, _) = worker.recorded(started.id)
            assert (put_off.tried, put_off.result, put_off.due_at) == (1, None, start + timedelta(days=1))
            assert (await started.status()).waits_on == "try 2 of step shaky"
            await worker.run()
            assert await started.result() == [2, 1]
            assert worker.now == start + timedelta(days=1)
            assert len(tried_at) == 2

    run(main())


def test_resume_tries_a_step_now_in_memory_too() -> None:
    async def main() -> None:
        async with MemoryWorker(App(told_twice), resources=[]) as worker:
            start = worker.now
            started = await worker.client.trigger(told_twice)
            await started.signal("go", 1)
            await worker.run(within=timedelta(hours=1))
            assert await started.resume()
            await worker.run(within=timedelta(hours=1))
            assert await started.result() == [2, 1]
            assert worker.now < start + timedelta(hours=3)

    run(main())


async def at_the_second_try(tries: list[int]) -> int:
    tries.append(1)
    if len(tries) == 1:
        raise Transient("not yet", retry_after=timedelta(days=1))
    return len(tries)


@workflow("told_twice")
async def told_twice(ctx: WorkflowContext) -> list[Any]:
    return await ctx.gather(ctx.step("shaky", at_the_second_try, ctx.resources), ctx.wait_for_signal("go", int))


def test_resume_tries_a_step_now_that_was_put_off(asking: Any, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(branch_flows.beside_signal, 10_800.0)
        await asyncio.to_thread(rows.until, PAUSED)
        await started.signal("go", 7)
        await asyncio.to_thread(rows.until, "SELECT count(*) = 1 FROM pg_task_checkpoints WHERE kind = 'signal'")
        await asyncio.to_thread(rows.until, PAUSED_AGAIN)
        assert await started.resume()
        return await started.result(timeout=SOON)

    assert asking(question) == [2, 7]
    assert rows.value("SELECT tried FROM pg_task_checkpoints WHERE kind = 'step'") == 0, "it has all its retries"


# --- how often


def test_two_steps_side_by_side_have_their_own_tries(asking: Any, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(branch_flows.side_by_side, 5)
        return await started.result(timeout=SOON)

    assert asking(question) == [6, 6]
    found = rows("SELECT name, tried, error, due_at FROM pg_task_checkpoints ORDER BY name")
    assert [tuple(row) for row in found] == [("left", 5, None, None), ("right", 5, None, None)]


def test_the_sixth_failure_of_either_is_one_too_many(asking: Any, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(branch_flows.side_by_side, 6)
        await asyncio.to_thread(rows.until, "SELECT count(*) = 1 FROM pg_task WHERE error LIKE 'left: %try 6%'")
        return started.id

    id = asking(question)
    assert (len(tries(rows, id, "left")), len(tries(rows, id, "right"))) == (6, 6)
    # Both failures are forgotten, so that the steps are run again when the run is revived.
    assert rows.value("SELECT count(*) FROM pg_task_checkpoints") == 0


def test_failures_outside_of_steps_are_counted_by_themselves() -> None:
    calls: list[int] = []

    @workflow("careless", policy=Policy(retry_limit=1))
    async def careless(ctx: WorkflowContext) -> int:
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("outside of steps")
        return await ctx.step("shaky", flows.double, 4, policy=Policy(retry_limit=4))

    async def main() -> None:
        async with MemoryWorker(App(careless)) as worker:
            worker.fail("shaky", OSError, times=4)
            started = await worker.client.trigger(careless)
            await worker.run()
            assert await started.result() == 8
            assert [row.tried for row in worker.recorded(started.id)] == [4]

    run(main())


# --- what is recorded


def test_two_entries_for_one_step_in_a_batch_are_both_written(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            await play_out(race, [CLAIMED])
            (lease,), journal = race.leases[race.runs[0]], race.journals[0]
            put_off = Checkpoint(1, "1", "step", "a", None, "no", datetime(2030, 1, 1, tzinfo=UTC), 1)
            for tried in (1, 2):
                both = [journal.submit(RecordCheckpoint(lease, put_off._replace(tried=tried), None)) for _ in range(2)]
                await asyncio.wait_for(asyncio.gather(*both), 5)
            (found,) = (await journal.submit(LoadHistory(lease.id))).checkpoints
            assert found.tried == 2

    run(main())


def test_the_page_of_a_run_says_when_a_step_is_tried_again(
    asking: Any, rows: Rows, command: Command, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)

    async def question(client: Client) -> Any:
        started = await client.trigger(branch_flows.beside_signal, 10_800.0)
        await asyncio.to_thread(rows.until, PAUSED)
        return started.id

    id = str(asking(question))
    page = command("run", id).out
    (waits_on,) = (line for line in page.splitlines() if line.startswith("waits on"))
    assert sorted(waits_on[12:].split(", ")) == ["signal go", "try 2 of step shaky"]
    line = page.splitlines()[-1]
    assert "try 2 at 20" in line
    assert "(in 3h), after pgtask.Transient: try 1" in line
    (row,) = command("run", id, "--json").objects
    (step,) = row["checkpoints"]
    assert (row["state"], step["tried"], step["result"]) == ("PAUSED", 1, None)
    assert step["error"].startswith("pgtask.Transient: try 1")


# --- branches


def test_branch_gets_its_signal_while_another_works(asking: Any, rows: Rows, tmp_path: Path) -> None:
    file = tmp_path / "go"

    async def question(client: Client) -> Any:
        started = await client.trigger(branch_flows.beside_long_step, str(file))
        await asyncio.to_thread(rows.until, "SELECT count(*) = 1 FROM pg_task WHERE locked_by IS NOT NULL")
        await started.signal("go", 7)
        for step in ("told", "heard"):
            await asyncio.to_thread(rows.until, "SELECT count(*) = 1 FROM mark WHERE step = $1", step, timeout=10)
        file.touch()
        return await started.result(timeout=SOON)

    assert asking(question) == [8, None]
