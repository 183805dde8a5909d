"""Tasks and runs whose rows a test locks, and others that these locks do not concern."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pgtask import App, Context, Done, RunCancelled, Task, WorkflowContext, workflow


class Lockable(Task):
    """Steps that end at once, on command, or never."""


class Noop(Lockable):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        return Done()


class Held(Lockable):
    """Ends when a file is there, and removes it."""

    path: str

    async def run(self, ctx: Context) -> Done:
        go = Path(self.path)
        while not go.exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)
        go.unlink()  # noqa: ASYNC240
        return Done()


class Forever(Lockable):
    async def run(self, ctx: Context) -> Done:
        await asyncio.Event().wait()
        return Done()


async def double(number: int) -> int:
    return 2 * number


@workflow("quick")
async def quick(ctx: WorkflowContext, number: int) -> int:
    return await ctx.step("double", double, number)


@workflow("member")
async def member(ctx: WorkflowContext, number: int) -> int:
    return await ctx.wait_for_signal("go", int)


@workflow("pair")
async def pair(ctx: WorkflowContext) -> str:
    """Waits for both members."""
    children = await ctx.spawn_many("members", member, range(2))
    try:
        return f"results {await ctx.results(children)}"
    except RunCancelled:
        return "a member was cancelled"


app = App(Lockable, quick, member, pair)
