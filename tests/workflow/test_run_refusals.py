"""A run whose calls contradict its journal is stopped there, also if its code catches every exception."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import flows
import pytest
from fix_acts import act, did
from fix_database import run

from pgtask import App, RunStopped, WorkflowContext, workflow
from pgtask.testing import MemoryClient, MemoryWorker


async def by_gather(ctx: WorkflowContext, other: str) -> Any:
    return await ctx.gather(ctx.step("a", act, "a"), ctx.step(other, act, other), return_exceptions=True)


async def by_try(ctx: WorkflowContext, other: str) -> Any:
    try:
        return await ctx.step(other, act, other)
    except Exception:
        return None


async def by_spawn(ctx: WorkflowContext, other: str) -> Any:
    try:
        return len(await ctx.spawn_many("children", flows.child, range(3 if other == "old" else 4)))
    except Exception:
        return None


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (by_gather, "asks for step 'new' at place 1.1.1, where the journal has step 'old'"),
        (by_try, "asks for step 'new' at place 1, where the journal has step 'old'"),
        (by_spawn, "spawn 'children' asks for 4 of child, and the journal has 3 of child"),
    ],
)
def test_nothing_is_done_behind_a_contradiction(ask: Any, text: str) -> None:
    other = "old"

    @workflow("changed")
    async def changed(ctx: WorkflowContext) -> None:
        await ask(ctx, other)
        await ctx.wait_for_signal("go")
        await ctx.step("refund", act, "refund")

    async def main() -> None:
        nonlocal other
        client = MemoryClient()
        async with MemoryWorker(App(changed, flows.child), client=client) as worker:
            started = await client.trigger(changed)
            await worker.run()
            other = "new"
            did.clear()
            await started.signal("go")
            await worker.run()
            status = await started.status()
            assert (status.state, did) == ("ERROR", [])
            assert text in (status.error or "")

    run(main())


def test_wrong_arguments_stop_the_run_too() -> None:
    @workflow("sleepless")
    async def sleepless(ctx: WorkflowContext) -> None:
        try:
            await ctx.sleep("nap", 5)  # type: ignore[arg-type]
        except Exception:
            await ctx.step("after", act, "after")

    @workflow("grouped")
    async def grouped(ctx: WorkflowContext) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.step("lost", act, "lost"))

    async def main() -> None:
        async with MemoryWorker(App(sleepless, grouped)) as worker:
            started = await worker.client.trigger(sleepless)
            in_group = await worker.client.trigger(grouped)
            await worker.run()
            assert (await started.status()).error == "sleep 'nap' takes a timedelta, not 5"
            assert (await in_group.status()).error == (
                "step 'lost' is awaited in a task of its own, in which its place is not known; use ctx.gather(...)"
            )
            assert did == []

    run(main())


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda ctx: ctx.step("inner", act, "inner"), "step 'inner'"),
        (lambda ctx: ctx.sleep("inner", timedelta(1)), "sleep 'inner'"),
        (lambda ctx: ctx.now(), "value 'now'"),
        (lambda ctx: ctx.gather(), "ctx.gather()"),
    ],
)
def test_a_step_may_not_use_the_context(ask: Any, what: str) -> None:
    async def outer(ctx: WorkflowContext) -> None:
        try:
            await ask(ctx)
        except Exception:
            did.append("swallowed")

    @workflow("nested")
    async def nested(ctx: WorkflowContext) -> None:
        await ctx.gather(ctx.step("beside", act, "beside"), ctx.step("outer", outer, ctx))
        await ctx.step("after", act, "after")

    async def main() -> None:
        async with MemoryWorker(App(nested)) as worker:
            started = await worker.client.trigger(nested)
            await worker.run()
            assert did == ["beside"]
            assert [row.name for row in worker.recorded(started.id)] == ["beside"]
            error = (await started.status()).error or ""
            assert error.startswith(f"{what} is asked for inside step 'outer'; a step may not use ctx: ")

    run(main())


def test_call_after_a_failed_step_is_not_inside_it() -> None:
    @workflow("going_on")
    async def going_on(ctx: WorkflowContext) -> list[Any]:
        try:
            await ctx.step("bad", flows.refuse)
        except Exception:
            return [await ctx.step("good", act, "good"), await ctx.gather(ctx.step("better", act, "better"))]
        return []

    async def main() -> None:
        async with MemoryWorker(App(going_on), replays=True) as worker:
            started = await worker.client.trigger(going_on)
            await worker.run()
            assert await started.result() == ["good", ["better"]]

    run(main())


def test_the_run_is_stopped_where_it_asks() -> None:
    caught: list[BaseException] = []

    @workflow("seeing")
    async def seeing(ctx: WorkflowContext) -> None:
        await ctx.step("same", act, "same")
        for name in ("same", "other"):
            try:
                await ctx.step(name, act, name)
            except BaseException as stopped:
                caught.append(stopped)

    async def main() -> None:
        async with MemoryWorker(App(seeing)) as worker:
            started = await worker.client.trigger(seeing)
            await worker.run()
            assert [type(one) for one in caught] == [RunStopped, RunStopped]
            assert "step 'same' is asked for twice" in str(caught[0])
            assert ((await started.status()).error or "").startswith("step 'same' is asked for twice in one run")
            assert did == ["same"]

    run(main())
