"""Workflows whose steps and functions end in unusual ways, for workers of processes."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

from pgtask import App, Policy, Transient, WorkflowContext, workflow

HOW = [
    "async SystemExit: no licence",
    "thread SystemExit: no licence",
    "thread StopIteration",
    "thread StopAsyncIteration",
    "thread KeyboardInterrupt",
    "thread GeneratorExit",
    "async GeneratorExit",
    "thread CancelledError",
    "async CancelledError",
    "to_thread StopIteration",
]
ERRORS = {
    error.__name__: error
    for error in (
        *(SystemExit, StopIteration, StopAsyncIteration, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError),
    )
}


async def leave(how: str) -> None:
    name, _, text = how.partition(": ")
    raise ERRORS[name](*filter(None, [text]))


def leave_thread(how: str) -> None:
    name, _, text = how.partition(": ")
    raise ERRORS[name](*filter(None, [text]))


async def leave_to_thread(how: str) -> None:
    await asyncio.to_thread(leave_thread, how)


async def nothing() -> None: ...


@workflow("leaving", policy=Policy(retry_limit=0))
async def leaving(ctx: WorkflowContext, how: str) -> Any:
    where, _, what = how.partition(" ")
    function = {"async": leave, "to_thread": leave_to_thread, "thread": leave_thread}[where]
    return await ctx.gather(ctx.step("leave 0", nothing), ctx.step("leave 1", function, what))


async def exits() -> None:
    sys.exit("no licence at all")


@workflow("careless")
async def careless(ctx: WorkflowContext) -> None:
    """Starts a task that ends the process."""
    task = asyncio.create_task(exits())
    await asyncio.sleep(30)
    await task


async def slow() -> None:
    await asyncio.sleep(60)


@workflow("hasty")
async def hasty(ctx: WorkflowContext) -> str:
    await ctx.step("before", nothing)
    try:
        async with asyncio.timeout(0.1):
            await ctx.step("charge", slow)
    except TimeoutError:
        await ctx.step("refund", nothing)
    return "no"


@workflow("hasty_wait")
async def hasty_wait(ctx: WorkflowContext) -> str:
    await ctx.step("before", nothing)
    try:
        async with asyncio.timeout(60):
            await ctx.wait_for_signal("go")
    except TimeoutError:
        await ctx.step("refund", nothing)
    return "no"


async def records(ctx: WorkflowContext) -> None:
    for number in range(100_000):
        await ctx.step(f"step {number}", nothing)


@workflow("recording_beside")
async def recording_beside(ctx: WorkflowContext) -> None:
    await ctx.gather(records(ctx), ctx.step("slow", slow))


@workflow("long_step")
async def long_step(ctx: WorkflowContext) -> None:
    await ctx.step("before", nothing)
    await ctx.step("slow", slow)


@workflow("reader")
async def reader(ctx: WorkflowContext) -> int:
    """Takes five signals, and ends while more of them come."""
    for _ in range(5):
        await ctx.wait_for_signal("item", int)
    return 5


_revived = [0]


async def permanent_at_first() -> None:
    _revived[0] += 1
    if _revived[0] <= 4:
        raise Transient("not yet", retry_after=timedelta(milliseconds=1))


@workflow("revivable", policy=Policy(retry_limit=1, retry_delay=timedelta(milliseconds=1)))
async def revivable(ctx: WorkflowContext) -> int:
    if _revived[0] == 4:
        _revived[0] = 5
        raise ValueError("once, outside of steps")
    await ctx.step("shaky", permanent_at_first, policy=Policy(retry_limit=3))
    return 1


_tried = [0]


async def at_the_second_try() -> int:
    _tried[0] += 1
    if _tried[0] == 1:
        raise Transient("not yet", retry_after=timedelta(days=1))
    return _tried[0]


@workflow("put_off")
async def put_off(ctx: WorkflowContext) -> int:
    found = await ctx.step("shaky", at_the_second_try)
    await ctx.wait_for_signal("go")
    return found


app = App(leaving, careless, hasty, hasty_wait, recording_beside, long_step, reader, revivable, put_off)
