"""`pgtask.testing` for workflows: a run in memory records the same as in a worker, only at once."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import flows
import pytest
from fix_database import run
from fleet import Fleet, Rows
from marks import MARKS, MemoryMarks

from examples import agent, approval, saga, word_count
from pgtask import (
    App,
    Client,
    DefinitionError,
    Permanent,
    Policy,
    RunFailed,
    Transient,
    WorkflowContext,
    workflow,
)
from pgtask.testing import MemoryClient, MemoryWorker

DAY = timedelta(days=1)
Case = tuple[Any, Any, list[tuple[str, Any]]]
"""A workflow, its input, and signals that are sent at once."""


# --- the same as in a worker

Outcome = tuple[str, str | None, str | None, list[tuple[Any, ...]]]


def told(state: str, output: str | None, error: str | None, checkpoints: Iterable[tuple[Any, ...]]) -> Outcome:
    """The end and the checkpoints of a run, without ids, and in the order of places."""

    def plain(text: Any) -> Any:
        return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text) if isinstance(text, str) else text

    found = [tuple(map(plain, checkpoint)) for checkpoint in checkpoints]
    return state, plain(output), plain(error), sorted(found, key=lambda one: [int(n) for n in one[0].split(".")])


async def start(client: Client, cases: list[Case]) -> list[UUID]:
    found = []
    for flow, given, signals in cases:
        started = await client.trigger(flow, given)
        for name, value in signals:
            await started.signal(name, value)
        found.append(started.id)
    return found


def in_a_worker(dsn: str, name: str, cases: list[Case]) -> list[Outcome]:
    async def trigger() -> list[UUID]:
        async with Client(dsn) as client:
            return await start(client, cases)

    async def look(ids: list[UUID]) -> list[Outcome]:
        async with Client(dsn) as client:
            statuses = [await client.run(id).status() for id in ids]
            found = []
            for status in statuses:
                async with client._postgres.connection() as connection:
                    checkpoints = await connection.fetch(RECORDED, status.id)
                found.append(told(status.state, status.output, status.error, map(tuple, checkpoints)))
            return found

    ids = run(trigger())
    with Fleet(dsn, "--burst", app=name) as fleet:
        fleet.ends()
    return run(look(ids))


RECORDED = "SELECT place, kind, name, result, error, due_at IS NULL, tried FROM pg_task_checkpoints WHERE run = $1"


async def in_memory(app: App, cases: list[Case], **options: Any) -> list[Outcome]:
    async with MemoryWorker(app, **options) as worker:
        ids = await start(worker.client, cases)
        await worker.run()
        found = []
        for id in ids:
            status = await worker.client.run(id).status()
            checkpoints = [
                (row.place, row.kind, row.name, row.result, row.error, row.due_at is None, row.tried)
                for row in worker.recorded(id)
            ]
            found.append(told(status.state, status.output, status.error, checkpoints))
        return found


def assert_same(dsn: str, name: str, app: App, cases: list[Case], db: Any = None) -> None:
    real = in_a_worker(dsn, name, cases)
    assert {outcome[0] for outcome in real} <= {"SUCCESS", "ERROR"}
    for replays in (False, True):
        for got, wanted, case in zip(run(in_memory(app, cases, db=db, replays=replays)), real, cases, strict=True):
            assert got == wanted, case


def test_approval_in_memory_is_the_same_as_in_a_worker(dsn: str) -> None:
    decide = [("approval", approval.Approval(True, "Ada"))], [("approval", approval.Approval(False, "Ada"))]
    cases: list[Case] = [(approval.expense, approval.Expense(80), [])]
    cases += [(approval.expense, approval.Expense(1200), signals) for signals in decide]
    assert_same(dsn, "examples.approval:app", approval.app, cases)


def test_fan_out_in_memory_is_the_same_as_in_a_worker(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("many words, many of them the same words: words\n")
    (tmp_path / "more.md").write_text("words\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    cases: list[Case] = [(word_count.count_directory, str(tmp_path), [])]
    assert_same(dsn, "examples.word_count:app", word_count.app, cases)


def test_agent_in_memory_is_the_same_as_in_a_worker(dsn: str, tmp_path: Path) -> None:
    for number in range(105):
        (tmp_path / "maze" / f"{number:03}").mkdir(parents=True)
        (tmp_path / "maze" / f"{number:03}" / "file").write_bytes(b"x" * number)
    maze = str(tmp_path / "maze")
    cases: list[Case] = [(agent.largest_file, maze, [("answer", word)]) for word in ("go on", "stop")]
    assert_same(dsn, "examples.agent:app", agent.app, cases)


def test_saga_in_memory_is_the_same_as_in_a_worker(dsn: str) -> None:
    """Its steps write to a database, here as there."""
    Rows(dsn)(saga.LEDGER)
    cases: list[Case] = [(saga.trip, number, []) for number in range(4)]
    real = in_a_worker(dsn, "examples.saga:app", cases)
    ledger = "SELECT trip, what FROM trip_ledger ORDER BY trip, at"
    written = Rows(dsn)(ledger)
    Rows(dsn)("DELETE FROM trip_ledger")

    async def again() -> list[Outcome]:
        async with asyncpg.create_pool(dsn, min_size=1, max_size=2) as pool:
            return await in_memory(saga.app, cases, db=pool)

    assert run(again()) == real
    assert Rows(dsn)(ledger) == written


def test_other_runs_in_memory_are_the_same_as_in_a_worker(dsn: str) -> None:
    Rows(dsn)(MARKS)
    cases: list[Case] = [
        (flows.typed, flows.Params(7), []),
        (flows.asking, 0.1, []),
        (flows.asking, 5.0, [("answer", 1), ("answer", 2), ("other", 3)]),
        (flows.either, None, [("right", "r"), ("left", "l")]),
        (flows.repairable, "/nowhere/at/all", []),
        (flows.compensating, None, []),
        (flows.bad_result, "unstorable", []),
        (flows.bad_result, "mistyped", []),
        (flows.transient, 3, []),
        (flows.twice, None, []),
        (flows.stray, None, []),
        (flows.parent, 5, []),
        (flows.disappointed, None, []),
        (flows.swallows, None, [("go", "on")]),
        (flows.changing, None, [("go", None)]),
    ]
    assert_same(dsn, "flows:app", flows.app, cases, MemoryMarks())


# --- time


def test_sleeps_and_timeouts_pass_at_once() -> None:
    async def main() -> None:
        async with MemoryWorker(flows.app) as worker:
            began, start = time.monotonic(), worker.now
            nap = await worker.client.trigger(flows.napping, 30 * 86_400.0)
            asks = await worker.client.trigger(flows.asking, 86_400.0)
            await worker.run()
            before, after = await nap.result()
            assert (before, after - before) == (start, 30 * DAY)
            assert await asks.result() == "no signal answer has come in time"
            assert time.monotonic() - began < 5

    run(main())


def test_run_that_waits_for_another_try_is_not_woken() -> None:
    """By signals, and by the end of a child for which it has waited; nor is it called paused."""
    tried_at: list[datetime] = []
    clock: list[MemoryWorker] = []

    @workflow("hasty", policy=Policy(retry_limit=3, retry_delay=DAY))
    async def hasty(ctx: WorkflowContext) -> int:
        child = await ctx.spawn("child", flows.waiting, 0)
        tried_at.append(clock[0].now)
        if len(tried_at) == 2:
            raise OSError("not now")
        return await child

    async def main() -> None:
        async with MemoryWorker(App(hasty, flows.waiting)) as worker:
            clock.append(worker)
            started = await worker.client.trigger(hasty)
            await worker.run(within=timedelta(hours=1))
            status = await started.status()
            assert (status.state, status.waits_on) == ("PAUSED", "1 children of child")
            await started.signal("go", 0)
            await worker.run(within=timedelta(hours=1))
            failed_at = tried_at[-1]
            (child,) = await worker.client.runs("waiting")
            await worker.client.signal(child.id, "go", 7)
            await started.signal("go", 1)
            await worker.run(within=timedelta(hours=1))
            status = await started.status()
            assert (status.state, status.waits_on, status.tried) == ("QUEUED", None, 1)
            await worker.run()
            assert await started.result() == 7
            assert tried_at[2:] == [failed_at + DAY]

    run(main())


# --- faults


@pytest.mark.parametrize("replays", [False, True])
def test_a_step_fails_and_crashes_where_a_test_wants_it(replays: bool) -> None:
    async def main() -> None:
        marks = MemoryMarks()
        async with MemoryWorker(flows.app, db=marks, replays=replays) as worker:
            worker.crash("before", times=2)
            worker.fail("after", OSError("the disk is away"), times=3)
            start = worker.now
            started = await worker.client.trigger(flows.transient, 0)
            await worker.run()
            assert await started.result() == 1
            assert marks.steps == ["before", "before", "before", "after"]
            assert [row.name for row in worker.recorded(started.id)] == ["before", "shaky", "after"]
            assert worker.now - start > timedelta(seconds=5)  # three retries

    run(main())


def test_a_step_of_a_workflow_times_out_at_once() -> None:
    policy = Policy(timeout=timedelta(hours=1), retry_limit=1, retry_delay=timedelta(0))
    begun: list[str] = []

    async def at_once() -> str:
        begun.append("at once")
        await asyncio.sleep(0)
        return "at once"

    def in_thread() -> str:
        begun.append("in a thread")
        return "in a thread"

    @workflow("hasty")
    async def hasty(ctx: WorkflowContext) -> list[str]:
        return [
            await ctx.step("async", at_once, policy=policy),
            await ctx.step("thread", in_thread, policy=policy),
            await ctx.step("bare", at_once, policy=Policy()),
        ]

    async def main() -> None:
        async with MemoryWorker(App(hasty)) as worker:
            worker.time_out("async")
            worker.time_out("thread")
            started = await worker.client.trigger(hasty)
            await worker.run()
            assert await started.result() == ["at once", "in a thread", "at once"]
            assert [row.tried for row in worker.recorded(started.id)] == [1, 1, 0]
            assert begun == ["at once"] * 2 + ["in a thread"] * 2 + ["at once"]
            worker.time_out("async", times=2)
            started = await worker.client.trigger(hasty)
            await worker.run()
            with pytest.raises(RunFailed, match="async: step async ran longer than its timeout of 3600 s"):
                await started.result()
            worker.time_out("bare")
            await worker.client.trigger(hasty)
            with pytest.raises(DefinitionError, match="step 'bare' cannot time out: its policy has no timeout"):
                await worker.run()

    run(main())


def test_exception_of_a_fault_counts_as_one_of_the_step() -> None:
    async def main() -> None:
        async with MemoryWorker(flows.app, db=MemoryMarks()) as worker:
            worker.fail("before", Permanent("no"))
            started = await worker.client.trigger(flows.transient, 0)
            await worker.run()
            with pytest.raises(RunFailed, match=r"before: pgtask\.Permanent: no"):
                await started.result()

    run(main())


def test_a_crash_under_one_branch_stops_the_others() -> None:
    async def main() -> None:
        marks = MemoryMarks()
        async with MemoryWorker(flows.app, db=marks) as worker:
            worker.crash("mark")
            started = await worker.client.trigger(flows.either)
            await started.signal("left", "l")
            await started.signal("right", "r")
            await worker.run()
            assert await started.result() == ["l", "r", None, "mark"]
            assert marks.steps == ["mark", "mark"]

    run(main())


def test_a_fault_of_a_workflow_needs_one() -> None:
    import apps

    async def main() -> None:
        async with MemoryWorker(apps.app) as worker:
            with pytest.raises(DefinitionError, match="'pay' would be a step of a workflow, and this app has none"):
                worker.fail("pay", OSError)

    run(main())


# --- replays


def test_workflow_that_is_not_deterministic_is_found() -> None:
    times: list[int] = []

    @workflow("fickle", policy=Policy(retry_limit=0))
    async def fickle(ctx: WorkflowContext) -> None:
        times.append(len(times))
        await ctx.step(f"step {len(times)}", flows.double, 1)
        await ctx.step("last", flows.double, 2)

    async def states() -> list[str]:
        found: list[str] = []
        for replays in (False, True):
            times.clear()
            async with MemoryWorker(App(fickle), replays=replays) as worker:
                started = await worker.client.trigger(fickle)
                await worker.run()
                found.append((await started.status()).state)
                error = (await started.status()).error or ""
        assert "asks for step 'step 2' at place 1, where the journal has step 'step 1'" in error
        return found

    assert run(states()) == ["SUCCESS", "ERROR"]


def test_step_that_fails_in_a_requeued_run_does_not_suspend_it() -> None:
    client = MemoryClient()
    start = client.rows.now
    seen_at: list[datetime] = []

    async def fails_late() -> None:
        if not seen_at:
            await asyncio.sleep(0.05)
            raise Transient("not yet", retry_after=DAY)

    async def see() -> None:
        seen_at.append(client.rows.now)

    @workflow("unequal")
    async def unequal(ctx: WorkflowContext) -> None:
        async def quick() -> None:
            await ctx.step("first", flows.double, 1)
            await ctx.step("second", see)

        await ctx.gather(ctx.step("late", fails_late), quick())

    async def main() -> None:
        async with MemoryWorker(App(unequal), client=client, replays=True) as worker:
            started = await client.trigger(unequal)
            await worker.run()
            await started.result()

    run(main())
    assert seen_at == [start]


def test_with_replays_no_step_runs_twice_and_all_is_replayed() -> None:
    async def main() -> None:
        marks = MemoryMarks()
        async with MemoryWorker(flows.app, db=marks, replays=True) as worker:
            started = await worker.client.trigger(flows.transient, 0)
            await worker.run()
            assert await started.result() == 1
            assert marks.steps == ["before", "after"]
            assert len(worker.task(started.id).tries) == 3

    run(main())
