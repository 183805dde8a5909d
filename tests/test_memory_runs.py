"""`pgtask.testing` for workflows: a run in memory records what it records in a worker, only at once."""

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
from conftest import run
from fleet import Fleet, Rows

from examples import agent, approval, saga, word_count
from pgtask import (
    App,
    Client,
    DefinitionError,
    EnqueueError,
    Permanent,
    Policy,
    ResultTimeout,
    RunCancelled,
    RunFailed,
    RunNotFound,
    Transient,
    WorkflowContext,
    workflow,
)
from pgtask.testing import MemoryClient, MemoryWorker

DAY = timedelta(days=1)
Case = tuple[Any, Any, list[tuple[str, Any]]]
"""A workflow, its input, and signals that are sent at once."""


class Marks:
    """Stands for `ctx.db`: the steps of `flows` leave marks."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    async def execute(self, query: str, *args: Any) -> None:
        self.steps.append(args[1])


# --- the same as in a worker

Outcome = tuple[str, str | None, str | None, list[tuple[Any, ...]]]


def told(state: str, output: str | None, error: str | None, checkpoints: Iterable[tuple[Any, ...]]) -> Outcome:
    """What became of a run, without its id and the ids of its children, and which branch was faster."""

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
                async with client._connection(None) as connection:
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


def test_an_approval_is_what_it_is_in_a_worker(dsn: str) -> None:
    decide = [("approval", approval.Approval(True, "Ada"))], [("approval", approval.Approval(False, "Ada"))]
    cases: list[Case] = [(approval.expense, approval.Expense(80), [])]
    cases += [(approval.expense, approval.Expense(1200), signals) for signals in decide]
    assert_same(dsn, "examples.approval:app", approval.app, cases)


def test_a_fan_out_is_what_it_is_in_a_worker(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("many words, many of them the same words: words\n")
    (tmp_path / "more.md").write_text("words\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    cases: list[Case] = [(word_count.count_directory, str(tmp_path), [])]
    assert_same(dsn, "examples.word_count:app", word_count.app, cases)


def test_an_agent_is_what_it_is_in_a_worker(dsn: str, tmp_path: Path) -> None:
    for number in range(105):
        (tmp_path / "maze" / f"{number:03}").mkdir(parents=True)
        (tmp_path / "maze" / f"{number:03}" / "file").write_bytes(b"x" * number)
    maze = str(tmp_path / "maze")
    cases: list[Case] = [(agent.largest_file, maze, [("answer", word)]) for word in ("go on", "stop")]
    assert_same(dsn, "examples.agent:app", agent.app, cases)


def test_a_saga_is_what_it_is_in_a_worker(dsn: str) -> None:
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


def test_other_runs_are_what_they_are_in_a_worker(dsn: str) -> None:
    Rows(dsn)(flows.MARKS)
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
    assert_same(dsn, "flows:app", flows.app, cases, Marks())


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


def test_a_run_is_seen_while_it_waits_and_told_what_it_waits_for() -> None:
    async def main() -> None:
        async with MemoryWorker(flows.app) as worker:
            asks = await worker.client.trigger(flows.asking, 86_400.0, key="one", after=DAY)
            assert (await worker.client.trigger(flows.asking, 1.0, key="one")).id == asks.id
            assert (await asks.status()).state == "QUEUED"
            await worker.run(within=DAY)
            status = await asks.status()
            assert (status.state, status.waits_on, status.due_at) == ("PAUSED", "signal answer", worker.now + DAY)
            await asks.signal("answer", 1)
            await worker.run(within=timedelta(hours=1))
            assert [row.result for row in worker.recorded(asks.id)] == ["1", None]
            await worker.client.signal(asks.id, "answer", 2)
            await worker.run()
            assert await asks.result() == [1, 2]
            assert (await asks.status()).state == "SUCCESS"
            with pytest.raises(RunNotFound, match="has ended, or never was"):
                await asks.signal("answer", 3)
            with pytest.raises(RunNotFound, match="there is no run"):
                await worker.client.run(UUID(int=1)).status()

    run(main())


def test_a_run_that_is_to_be_tried_again_is_left_to_its_time() -> None:
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


def test_a_run_that_waits_for_ever_ends_the_test_and_not_itself() -> None:
    async def main() -> None:
        async with MemoryWorker(flows.app) as worker:
            waits = await worker.client.trigger(flows.patient)
            await worker.run()
            assert [one.state for one in await worker.client.runs()] == ["PAUSED"] * 3
            with pytest.raises(ResultTimeout):
                await waits.result(timeout=0.01)
            (inner,) = [one for one in await worker.client.runs("waiting") if one.waits_on == "signal go"]
            result = asyncio.create_task(waits.result())
            await worker.client.signal(inner.id, "go", 7)
            await worker.run()
            assert await result == 7

    run(main())


def test_a_signal_that_comes_after_the_look_for_it_is_not_missed() -> None:
    @workflow("tells_itself")
    async def tells_itself(ctx: WorkflowContext) -> list[Any]:
        send = ctx.step("send", ctx.resources.signal, ctx.run_id, "go", 7)
        return await ctx.gather(ctx.wait_for_signal("go", int), send)

    async def main() -> None:
        client = MemoryClient()
        async with MemoryWorker(App(tells_itself), client=client, resources=client) as worker:
            started = await client.trigger(tells_itself)
            await worker.run()
            assert await started.result(timeout=5) == [7, None]

    run(main())


@workflow("forgetful")
async def forgetful(ctx: WorkflowContext, how: str) -> int:
    if how == "step":
        ctx.step("double", flows.double, 2)  # type: ignore[unused-coroutine]
    if how == "gather":
        ctx.gather(ctx.step("double", flows.double, 2))  # type: ignore[unused-coroutine]
    if how == "kept for later":
        later = [ctx.step(f"double/{number}", flows.double, number) for number in range(250)]
        return int(sum(await ctx.gather(*later)))
    return 0


@pytest.mark.parametrize(("how", "what"), [("step", r"ctx.step\('double'\)"), ("gather", r"ctx.(step|gather)\(.*\)")])
def test_what_is_asked_for_and_not_awaited_is_no_success(how: str, what: str) -> None:
    async def main() -> None:
        async with MemoryWorker(App(forgetful)) as worker:
            started = await worker.client.trigger(forgetful, how)
            await worker.run()
            with pytest.raises(RunFailed, match=f"without having awaited {what}: write await before it"):
                await started.result()
            later = await worker.client.trigger(forgetful, "kept for later")
            await worker.run()
            assert await later.result() == sum(range(250)) * 2

    run(main())


# --- cancel and resume


def test_a_run_is_cancelled_with_its_children_and_resumed() -> None:
    async def main() -> None:
        async with MemoryWorker(flows.app) as worker:
            waits = await worker.client.trigger(flows.patient)
            await worker.run()
            assert await waits.cancel()
            assert not await waits.cancel()
            await worker.run()
            found = await worker.client.runs()
            assert {one.state for one in found} == {"CANCELLED"}
            (child,) = [one for one in found if one.parent == waits.id]
            with pytest.raises(RunCancelled):
                await waits.result()
            assert await waits.resume()
            await worker.run()
            assert (await waits.status()).error == f"child inner ({child.id}) was cancelled"

    run(main())


def test_a_cancelled_run_comes_back_into_its_lane_with_its_key_unless_that_is_taken() -> None:
    async def main() -> None:
        async with MemoryWorker(flows.app) as worker:
            lane: dict[str, Any] = {"queue": "slow", "priority": 7, "key": "only one"}
            first = await worker.client.trigger(flows.patient, **lane)
            assert not await first.resume(), "it is due"
            await first.cancel()
            second = await worker.client.trigger(flows.patient, **lane)
            with pytest.raises(EnqueueError, match=rf"^run {first.id} .* is that of task {second.id}"):
                await first.resume()
            await second.cancel()
            assert await first.resume()
            task = worker.client.rows.tasks[first.id]
            assert (task.state, task.queue, task.priority, task.key) == ("waiting", "slow", 7, "only one")

    run(main())


def test_a_run_that_is_cancelled_under_a_step_records_it_no_more() -> None:
    async def stop(client: MemoryClient, id: UUID) -> bool:
        return await client.run(id).cancel()

    @workflow("stops_itself")
    async def stops_itself(ctx: WorkflowContext) -> None:
        await ctx.step("first", flows.double, 1)
        await ctx.step("stop", stop, ctx.resources, ctx.run_id)
        await ctx.step("never", flows.double, 1)

    async def main() -> None:
        client = MemoryClient()
        async with MemoryWorker(App(stops_itself), client=client, resources=client) as worker:
            started = await client.trigger(stops_itself)
            await worker.run()
            assert (await started.status()).state == "CANCELLED"
            assert [row.name for row in worker.recorded(started.id)] == ["first"]

    run(main())


def test_a_failed_run_goes_on_when_it_is_resumed(tmp_path: Path) -> None:
    async def main() -> None:
        marks, path = Marks(), tmp_path / "input"
        async with MemoryWorker(flows.app, db=marks) as worker:
            started = await worker.client.trigger(flows.repairable, str(path))
            await worker.run()
            with pytest.raises(RunFailed, match="read: FileNotFoundError"):
                await started.result()
            assert worker.task(started.id).state == "parked"
            path.write_text("mended")
            assert await started.resume()
            await worker.run()
            assert (await started.result(), marks.steps) == ("mended", ["before"])
            assert not await started.resume()

    run(main())


# --- faults


@pytest.mark.parametrize("replays", [False, True])
def test_a_step_fails_and_crashes_where_a_test_wants_it(replays: bool) -> None:
    async def main() -> None:
        marks = Marks()
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


def test_what_is_raised_by_a_fault_is_judged_as_what_a_step_raises() -> None:
    async def main() -> None:
        async with MemoryWorker(flows.app, db=Marks()) as worker:
            worker.fail("before", Permanent("no"))
            started = await worker.client.trigger(flows.transient, 0)
            await worker.run()
            with pytest.raises(RunFailed, match=r"before: pgtask\.workflow\.Permanent: no"):
                await started.result()

    run(main())


def test_a_crash_under_one_branch_stops_the_others() -> None:
    async def main() -> None:
        marks = Marks()
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


def test_a_workflow_that_does_not_do_the_same_each_time_is_found_out() -> None:
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


def test_a_run_that_is_given_back_is_not_put_to_sleep_by_a_step_that_fails_then() -> None:
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
        marks = Marks()
        async with MemoryWorker(flows.app, db=marks, replays=True) as worker:
            started = await worker.client.trigger(flows.transient, 0)
            await worker.run()
            assert await started.result() == 1
            assert marks.steps == ["before", "after"]
            assert len(worker.task(started.id).tries) == 3

    run(main())
