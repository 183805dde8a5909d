"""A task and a workflow whose steps are throttled: the other side says when to come back."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from flows import mark

from pgtask import App, Context, Done, Policy, Task, Throttled, WorkflowContext, workflow

THREE_HOURS = timedelta(hours=3)


class Provider(Task):
    policy = Policy(retry_limit=1, retry_delay=timedelta(0))


class Ask(Provider):
    """Throttled at each call."""

    seconds: float

    async def run(self, ctx: Context) -> Done:
        raise Throttled(self.seconds)


class AskInThread(Provider):
    seconds: float

    def run(self, ctx: Context) -> Done:
        raise Throttled(timedelta(seconds=self.seconds), "429 Too Many Requests")


class AskThrice(Provider):
    """Throttled at its first three calls, then done."""

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("INSERT INTO mark (run, step) VALUES ($1, 'ask')", ctx.task_id)
        calls: int = await ctx.db.fetchval("SELECT count(*) FROM mark WHERE run = $1", ctx.task_id)
        if calls <= 3:
            raise Throttled(0.02)
        return Done()


async def ask(db: Any, run: UUID, calls: int, seconds: float) -> int:
    """Throttled at its first `calls` calls, counted over all processes."""
    await mark(db, run, "ask")
    asked: int = await db.fetchval("SELECT count(*) FROM mark WHERE run = $1 AND step = 'ask'", run)
    if asked <= calls:
        raise Throttled(seconds)
    return asked


@workflow("asking", policy=Policy(retry_limit=1, retry_delay=timedelta(0)))
async def asking(ctx: WorkflowContext, calls: int) -> int:
    return await ctx.step("ask", ask, ctx.db, ctx.run_id, calls, 0.02)


@workflow("asking_later", policy=Policy(retry_limit=0))
async def asking_later(ctx: WorkflowContext) -> int:
    return await ctx.step("ask", ask, ctx.db, ctx.run_id, 1, THREE_HOURS.total_seconds())


app = App(Provider, asking, asking_later)
