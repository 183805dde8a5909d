"""An app whose outcomes a test knows beforehand: `counted:app`. Each of its steps has one trait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from pgtask import App, Batch, BatchContext, Context, Done, Fail, Next, Policy, Task, WorkflowContext, workflow


class Counted(Task):
    policy = Policy(retry_limit=2, retry_delay=timedelta(0))


class Plain(Counted):
    """Fails so often, then is done."""

    fails: int = 0

    async def run(self, ctx: Context) -> Done:
        if ctx.attempt <= self.fails:
            raise ValueError("not yet")
        return Done()


class Refused(Counted):
    async def run(self, ctx: Context) -> Fail:
        return Fail("never")


class First(Counted):
    seconds: float = 0.0

    async def run(self, ctx: Context) -> Next[Second]:
        return Next(Second(), after=timedelta(seconds=self.seconds))


class Second(Counted):
    async def run(self, ctx: Context) -> Done:
        return Done()


class Awaits(Counted):
    seconds: float = 0.0

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(self.seconds)
        return Done()


class Threaded(Counted):
    def run(self, ctx: Context) -> Done:
        return Done()


class Together(Counted):
    policy = Policy(batch=Batch(64), retry_limit=1, retry_delay=timedelta(0))
    bad: bool = False

    @classmethod
    async def run_batch(cls, steps: Sequence[Together], ctx: BatchContext) -> Done:
        if any(step.bad for step in steps):
            raise ValueError("a bad one is among them")
        return Done()


class Writes(Counted):
    """Writes a row with its outcome: the ledger of a test that kills workers."""

    async def run(self, ctx: Context) -> Done:
        async with ctx.transaction() as connection:
            await connection.execute("INSERT INTO ledger (task) VALUES ($1)", ctx.task_id)
        return Done()


@workflow("counted_flow")
async def counted_flow(ctx: WorkflowContext, fails: bool) -> None:
    if fails:
        raise ValueError("it always does")


LEDGER = "CREATE TABLE ledger (task uuid)"

app = App(Counted, counted_flow)
