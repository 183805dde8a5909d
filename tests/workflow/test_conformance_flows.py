"""Workflows over the journal in Postgres and over the one in memory: each run goes the same way, and ends the same."""

from __future__ import annotations

import asyncio
import gc
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import flows
import pytest
from fix_database import run
from fix_stores import Stores

from pgtask import App, Client, Policy, RunCancelled, RunFailed, WorkflowContext, workflow
from pgtask.errors import ResultTimeout, RunNotFound

AT_ONCE = Policy(retry_limit=1, retry_delay=timedelta(0))


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
def test_call_that_was_not_awaited_fails_the_run(stores: Stores, how: str, what: str) -> None:
    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(forgetful, how)
            await world.drive(App(forgetful))
            with pytest.raises(RunFailed, match=f"without having awaited {what}: write await before it"):
                await started.result(timeout=20)

    run(main())


def test_calls_that_are_awaited_later_are_not_forgotten(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(forgetful, "kept for later")
            await world.drive(App(forgetful))
            assert await started.result(timeout=20) == sum(range(250)) * 2

    run(main())


def test_context_of_a_run_is_freed_with_its_end(stores: Stores) -> None:
    contexts: list[weakref.ref[WorkflowContext]] = []

    @workflow("branched")
    async def branched(ctx: WorkflowContext) -> int:
        contexts.append(weakref.ref(ctx))
        await ctx.gather(ctx.step("one", flows.double, 1), ctx.step("two", flows.double, 2))
        return await ctx.step("three", flows.double, 3)

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(branched)
            await world.drive(App(branched))
            assert await started.result(timeout=20) == 6
        assert contexts
        assert [context() for context in contexts] == [None] * len(contexts)

    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def test_replay_that_asks_for_another_step_fails_the_run(stores: Stores) -> None:
    times: list[int] = []

    @workflow("fickle", policy=AT_ONCE)
    async def fickle(ctx: WorkflowContext) -> None:
        times.append(len(times))
        await ctx.step(f"step {len(times)}", flows.double, 1)
        raise OSError("not now")

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(fickle)
            await world.drive(App(fickle))
            status = await started.status()
            assert status.state == "ERROR"
            error = "asks for step 'step 2' at place 1, where the journal has step 'step 1'"
            assert error in (status.error or "")

    run(main())


def test_replay_runs_no_recorded_step_again(stores: Stores) -> None:
    ran: list[str] = []

    async def note(what: str) -> str:
        ran.append(what)
        return what

    @workflow("stumbling", policy=AT_ONCE)
    async def stumbling(ctx: WorkflowContext) -> list[Any]:
        found = [await ctx.step("first", note, "first"), await ctx.random()]
        if len(ran) == 1:
            ran.append("stumble")
            raise OSError("not now")
        return [*found, await ctx.step("last", note, "last")]

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(stumbling)
            await world.drive(App(stumbling))
            first, chance, last = await started.result(timeout=20)
            assert (first, last, ran) == ("first", "last", ["first", "stumble", "last"])
            recorded = await world.recorded(started.id)
            assert [one.name for one in recorded] == ["first", "random", "last"]
            assert recorded[1].result == str(chance)

    run(main())


# --- signals


def test_signal_after_the_look_for_it_is_not_missed(stores: Stores) -> None:
    @workflow("tells_itself")
    async def tells_itself(ctx: WorkflowContext) -> list[Any]:
        send = ctx.step("send", ctx.resources.signal, ctx.run_id, "go", 7)
        return await ctx.gather(ctx.wait_for_signal("go", int), send)

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(tells_itself)
            await world.drive(App(tells_itself), resources=world.client)
            assert await started.result(timeout=20) == [7, None]

    run(main())


def test_waiting_run_is_shown_and_takes_its_signals(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            asks = await world.client.trigger(flows.asking, 86_400.0)
            await world.drive(flows.app)
            status = await asks.status()
            assert (status.state, status.waits_on) == ("PAUSED", "signal answer")
            assert status.due_at is not None
            assert abs(status.due_at - await world.now() - timedelta(days=1)) < timedelta(minutes=1)
            await asks.signal("answer", 1)
            await world.drive(flows.app)
            assert [row.result for row in await world.recorded(asks.id)] == ["1", None]
            await world.client.signal(asks.id, "answer", 2)
            await world.drive(flows.app)
            assert await asks.result(timeout=20) == [1, 2]
            assert (await asks.status()).state == "SUCCESS"
            with pytest.raises(RunNotFound, match="has ended, or never was"):
                await asks.signal("answer", 3)

    run(main())


# --- children


def test_run_waits_for_its_child_until_the_signal_comes(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            waits = await world.client.trigger(flows.patient)
            await world.drive(flows.app)
            assert [one.state for one in await world.client.runs()] == ["PAUSED"] * 3
            with pytest.raises(ResultTimeout):
                await waits.result(timeout=0.01)
            (inner,) = [one for one in await world.client.runs("waiting") if one.waits_on == "signal go"]
            result = asyncio.create_task(waits.result(timeout=20))
            await world.client.signal(inner.id, "go", 7)
            await world.drive(flows.app)
            assert await result == 7

    run(main())


def test_run_is_cancelled_with_its_children_and_resumed(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            waits = await world.client.trigger(flows.patient)
            await world.drive(flows.app)
            assert await waits.cancel()
            assert not await waits.cancel()
            await world.drive(flows.app)
            found = await world.client.runs()
            assert {one.state for one in found} == {"CANCELLED"}
            (child,) = [one for one in found if one.parent == waits.id]
            with pytest.raises(RunCancelled):
                await waits.result(timeout=20)
            assert await waits.resume()
            await world.drive(flows.app)
            assert (await waits.status()).error == f"child inner ({child.id}) was cancelled"

    run(main())


def test_failed_child_is_an_error_that_its_parent_may_catch(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(flows.disappointed)
            await world.drive(flows.app)
            assert (await started.result(timeout=20)).startswith("8 pgtask.Permanent: a negative number (at ")
            states = sorted(one.state for one in await world.client.runs("child"))
            assert states == ["ERROR", "SUCCESS"]

    run(main())


# --- cancel and resume


def test_run_cancelled_under_a_step_does_not_record_it(stores: Stores) -> None:
    async def stop(client: Client, id: UUID) -> bool:
        return await client.run(id).cancel()

    @workflow("stops_itself")
    async def stops_itself(ctx: WorkflowContext) -> None:
        await ctx.step("first", flows.double, 1)
        await ctx.step("stop", stop, ctx.resources, ctx.run_id)
        await ctx.step("never", flows.double, 1)

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(stops_itself)
            await world.drive(App(stops_itself), resources=world.client)
            assert (await started.status()).state == "CANCELLED"
            assert [row.name for row in await world.recorded(started.id)] == ["first"]

    run(main())


def test_failed_run_goes_on_when_it_is_resumed(stores: Stores, tmp_path: Path) -> None:
    ran: list[str] = []

    async def note(what: str) -> None:
        ran.append(what)

    @workflow("repairable", policy=Policy(retry_limit=0))
    async def repairable(ctx: WorkflowContext, path: str) -> str:
        await ctx.step("before", note, "before")
        return await ctx.step("read", Path(path).read_text)

    async def main() -> None:
        async with stores() as world:
            path = tmp_path / "input"
            started = await world.client.trigger(repairable, str(path))
            await world.drive(App(repairable))
            with pytest.raises(RunFailed, match="read: FileNotFoundError"):
                await started.result(timeout=20)
            task = await world.task(started.id)
            assert task is not None
            assert "read: FileNotFoundError" in task["error"]
            path.write_text("fixed")
            assert await started.resume()
            await world.drive(App(repairable))
            assert (await started.result(timeout=20), ran) == ("fixed", ["before"])
            assert not await started.resume()

    run(main())
