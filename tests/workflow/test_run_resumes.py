"""Failed runs that are resumed: the checkpoints that they meet again, and the steps that they run again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import flows
import pytest
import resume_flows
from fix_database import run
from fleet import Fleet, Rows
from marks import MARKS, MemoryMarks
from run_kit import SOON

from pgtask import App, Client, RunFailed, StepFailed, WorkflowContext, workflow
from pgtask.testing import MemoryWorker


class AnyWorker:
    """A worker in memory, or one of processes, and its client."""

    def __init__(self, client: Client, settle: Callable[[], Awaitable[None]], marks: Callable[[], list[str]]) -> None:
        self.client = client
        self.marks = marks
        self._settle = settle

    async def end(self, run: Any) -> Any:
        """The result of the run, or the text of its error."""
        await self._settle()
        try:
            return await run.result(timeout=SOON)
        except RunFailed as failed:
            return failed.error

    async def end_again(self, run: Any) -> Any:
        assert await run.resume()
        return await self.end(run)


OpenWorker = Callable[[], AbstractAsyncContextManager[AnyWorker]]


@pytest.fixture(params=["in memory", "in a worker"])
def open_worker(request: pytest.FixtureRequest) -> OpenWorker:
    @asynccontextmanager
    async def in_memory() -> AsyncIterator[AnyWorker]:
        marks = MemoryMarks()
        async with MemoryWorker(resume_flows.app, db=marks) as worker:
            yield AnyWorker(worker.client, worker.run, lambda: marks.steps)

    @asynccontextmanager
    async def in_a_worker() -> AsyncIterator[AnyWorker]:
        dsn = request.getfixturevalue("dsn")
        rows = Rows(dsn)
        await asyncio.to_thread(rows, MARKS)
        with Fleet(dsn, app="resume_flows:app") as fleet:
            await asyncio.to_thread(fleet.until, "worker.ready")
            async with Client(dsn) as client:
                yield AnyWorker(client, settled, lambda: [row[0] for row in rows("SELECT step FROM mark ORDER BY at")])

    async def settled() -> None:
        """`result` waits for the worker."""

    if request.param == "in memory":
        return in_memory
    request.getfixturevalue("dsn")  # here, since it runs a loop of its own
    return in_a_worker


async def marks(worker: AnyWorker) -> list[str]:
    return await asyncio.to_thread(worker.marks)


# --- failures that were acted upon


@pytest.mark.parametrize(
    ("flow", "steps"),
    [
        (resume_flows.undoing, ["book", "pay", "undo book"]),
        (resume_flows.all_undone, ["a", "b", "undo both"]),
        (resume_flows.parent_undoing, ["child", "undo child"]),
    ],
)
def test_compensated_failure_is_met_again(open_worker: OpenWorker, tmp_path: Path, flow: Any, steps: list[str]) -> None:
    file = tmp_path / "fixed"

    async def main() -> None:
        async with open_worker() as asked:
            started = await asked.client.trigger(flow, str(file))
            error = await asked.end(started)
            assert "is down" in error
            file.touch()
            assert await asked.end_again(started) == error
            assert sorted(await marks(asked)) == sorted(steps)

    run(main())


def test_compensated_failure_of_one_branch_is_met_again(open_worker: OpenWorker, tmp_path: Path) -> None:
    file = tmp_path / "fixed"

    async def main() -> None:
        async with open_worker() as asked:
            started = await asked.client.trigger(resume_flows.one_undone, str(file))
            assert "a is down" in await asked.end(started)
            file.touch()
            assert "b is down" in await asked.end_again(started)
            assert sorted(await marks(asked)) == ["a", "a", "b", "undo b"]

    run(main())


# --- failures that were not


@pytest.mark.parametrize(
    ("flow", "steps"),
    [
        (resume_flows.noting, ["pay"]),
        (resume_flows.many, ["a", "b", "c"]),
        (resume_flows.many_by_hand, ["a", "b"]),
    ],
)
def test_steps_that_failed_side_by_side_run_again(
    open_worker: OpenWorker, tmp_path: Path, flow: Any, steps: list[str]
) -> None:
    file = tmp_path / "fixed"

    async def main() -> None:
        async with open_worker() as asked:
            started = await asked.client.trigger(flow, str(file))
            assert f"{steps[0]}: pgtask.Permanent: {steps[0]} is down" in await asked.end(started)
            file.touch()
            assert "is down" not in str(await asked.end_again(started))
            assert sorted(await marks(asked)) == sorted(steps * 2)

    run(main())


def test_a_parent_goes_on_when_its_child_has(open_worker: OpenWorker, tmp_path: Path) -> None:
    file = tmp_path / "fixed"

    async def main() -> None:
        async with open_worker() as asked:
            started = await asked.client.trigger(resume_flows.parent_of, str(file))
            error = await asked.end(started)
            assert "child is down" in error
            assert await asked.end_again(started) == error, "its child is as it was"
            (child,) = await asked.client.runs(resume_flows.child_of)
            file.touch()
            assert await asked.end_again(asked.client.run(child.id)) == "child"
            assert await asked.end_again(started) == "child"

    run(main())


def test_a_wrong_signal_is_gone_and_the_right_one_is_waited_for(open_worker: OpenWorker) -> None:
    async def main() -> None:
        async with open_worker() as asked:
            started = await asked.client.trigger(resume_flows.hearing)
            await started.signal("go", "not a number")
            assert await asked.end(started) == "signal go cannot be read: Expected `int`, got `str`"
            await started.signal("go", 5)
            assert await asked.end_again(started) == 5

    run(main())


def test_wait_that_has_timed_out_begins_again(open_worker: OpenWorker) -> None:
    async def main() -> None:
        async with open_worker() as asked:
            started = await asked.client.trigger(resume_flows.hearing_soon, 0.2)
            assert await asked.end(started) == "no signal go has come in time"
            assert await asked.end_again(started) == "no signal go has come in time"
            await started.signal("go", 5)
            assert await asked.end_again(started) == 5

    run(main())


def test_failed_ones_of_many_children_are_collected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgtask._workflow.context.MAX_CHILDREN", 2)

    @workflow("odd")
    async def odd(ctx: WorkflowContext, number: int) -> int:
        return await ctx.step("double", flows.double, number)

    @workflow("all_of_them")
    async def all_of_them(ctx: WorkflowContext) -> list[int]:
        found: list[int] = await ctx.results(await ctx.spawn_many("odd", odd, range(6)))
        return found

    async def main() -> None:
        async with MemoryWorker(App(odd, all_of_them)) as worker:
            worker.fail("double", StepFailed("double", "down"), times=3)  # of six, in two of three parts
            started = await worker.client.trigger(all_of_them)
            await worker.run()
            failed = await worker.client.runs(odd, state="ERROR")
            assert len(failed) == 3
            names = [row.name for row in worker.recorded(started.id) if row.kind == "children"]
            assert names == ["odd+4"]
            for one in failed:
                assert await worker.client.run(one.id).resume()
            await worker.run()
            assert await started.resume()
            await worker.run()
            assert await started.result() == [0, 2, 4, 6, 8, 10]

    run(main())


def test_caught_failure_is_not_forgotten_with_another_error() -> None:
    @workflow("does_without")
    async def does_without(ctx: WorkflowContext) -> object:
        try:
            return await ctx.step("extra", flows.refuse)
        except StepFailed:
            return object()

    async def main() -> None:
        async with MemoryWorker(App(does_without)) as worker:
            started = await worker.client.trigger(does_without)
            await worker.run()
            assert "returned what cannot be recorded" in ((await started.status()).error or "")
            assert [row.name for row in worker.recorded(started.id)] == ["extra"]

    run(main())


def test_timed_out_branch_and_failed_branch_begin_again() -> None:
    @workflow("both_ways")
    async def both_ways(ctx: WorkflowContext) -> list[Any]:
        wait = ctx.wait_for_signal("go", int, timeout=timedelta(days=1))
        return await ctx.gather(wait, ctx.step("extra", flows.double, 2), ctx.step("shaky", flows.double, 4))

    async def main() -> None:
        async with MemoryWorker(App(both_ways)) as worker:
            worker.fail("shaky", StepFailed("shaky", "down"))
            started = await worker.client.trigger(both_ways)
            await worker.run()
            with pytest.raises(RunFailed, match="no signal go has come in time"):
                await started.result()
            assert [row.name for row in worker.recorded(started.id)] == ["extra"]
            await started.signal("go", 1)
            assert await started.resume()
            await worker.run()
            assert await started.result() == [1, 4, 8]

    run(main())


def test_a_parent_goes_on_when_its_cancelled_child_is_resumed() -> None:
    @workflow("parent_hearing")
    async def parent_hearing(ctx: WorkflowContext) -> int:
        child = await ctx.spawn("child", resume_flows.hearing)
        return await child

    async def main() -> None:
        async with MemoryWorker(App(parent_hearing, resume_flows.hearing)) as worker:
            started = await worker.client.trigger(parent_hearing)
            await worker.run()
            (status,) = await worker.client.runs(resume_flows.hearing)
            child = worker.client.run(status.id)
            await child.cancel()
            await worker.run()
            with pytest.raises(RunFailed, match="was cancelled"):
                await started.result()
            assert await child.resume()
            assert await started.resume()
            await child.signal("go", 5)
            await worker.run()
            assert await started.result() == 5

    run(main())
