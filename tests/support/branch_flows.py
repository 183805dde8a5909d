"""Workflows of several branches, of which one fails or waits. Each try of a step leaves a mark with its time."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any
from uuid import UUID

from flows import mark, wait_for_file

from pgtask import App, Policy, Transient, WorkflowContext, workflow


async def shaky(db: Any, run: UUID, name: str, failures: int, delay: float) -> int:
    """Fails this often, counted over all processes; returns the count of its tries."""
    await mark(db, run, name)
    tries: int = await db.fetchval("SELECT count(*) FROM mark WHERE run = $1 AND step = $2", run, name)
    if tries <= failures:
        raise Transient(f"try {tries}", retry_after=timedelta(seconds=delay))
    return tries


@workflow("side_by_side", policy=Policy(retry_limit=5))
async def side_by_side(ctx: WorkflowContext, failures: int) -> list[int]:
    return await ctx.gather(
        ctx.step("left", shaky, ctx.db, ctx.run_id, "left", failures, 0.02),
        ctx.step("right", shaky, ctx.db, ctx.run_id, "right", failures, 0.05),
    )


@workflow("beside_signal")
async def beside_signal(ctx: WorkflowContext, delay: float) -> list[Any]:
    """A step that fails once, beside the wait for a signal."""
    step = ctx.step("shaky", shaky, ctx.db, ctx.run_id, "shaky", 1, delay)
    return await ctx.gather(step, ctx.wait_for_signal("go", int))


async def die_once(db: Any, run: UUID) -> None:
    """Ends its process when the run has recorded something."""
    if await db.fetchval("SELECT count(*) FROM mark WHERE run = $1 AND step = 'die'", run):
        return
    while not await db.fetchval("SELECT count(*) FROM pg_task_checkpoints WHERE run = $1", run):
        await db.execute("SELECT pg_sleep(0.01)")
    await mark(db, run, "die")
    os.kill(os.getpid(), signal.SIGKILL)


@workflow("beside_crash")
async def beside_crash(ctx: WorkflowContext) -> int:
    """A step that fails once, beside one that kills the worker once."""
    step = ctx.step("shaky", shaky, ctx.db, ctx.run_id, "shaky", 1, 3.0)
    tries, _ = await ctx.gather(step, ctx.step("die", die_once, ctx.db, ctx.run_id))
    return int(tries)


@workflow("beside_long_step")
async def beside_long_step(ctx: WorkflowContext, path: str) -> list[Any]:
    """A branch that waits for a signal and then for a child, beside a step that runs until a file is there."""

    async def told() -> int:
        number = await ctx.wait_for_signal("go", int)
        await ctx.step("told", mark, ctx.db, ctx.run_id, "told")
        found = await (await ctx.spawn("child", quick, number))
        await ctx.step("heard", mark, ctx.db, ctx.run_id, "heard")
        return int(found)

    return await ctx.gather(told(), ctx.step("long", wait_for_file, path))


@workflow("quick")
async def quick(ctx: WorkflowContext, number: int) -> int:
    return number + 1


app = App(side_by_side, beside_signal, beside_crash, beside_long_step, quick)
