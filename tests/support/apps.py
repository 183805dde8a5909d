"""The tasks that the tests run. A step leaves a mark in the table `mark`, so that a second run of it shows."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import msgspec

from pgtask import App, Context, Done, Fail, Next, Policy, Task

ONCE = "CREATE UNIQUE INDEX mark_once ON mark (task, step)"


KEPT: list[bytes] = []


async def mark(ctx: Context, step: str) -> None:
    await ctx.db.execute(
        "INSERT INTO mark (task, step, attempt, pid) VALUES ($1, $2, $3, $4)",
        ctx.task_id,
        step,
        ctx.attempt,
        os.getpid(),
    )


class Chain(Task):
    """Three steps, each of which must run once."""


class First(Chain):
    number: int

    async def run(self, ctx: Context) -> Next[Second]:
        await mark(ctx, "First")
        return Next(Second(self.number))


class Second(Chain):
    number: int

    async def run(self, ctx: Context) -> Next[Third]:
        await mark(ctx, "Second")
        return Next(Third(self.number))


class Third(Chain):
    number: int

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "Third")
        return Done()


class Odd(Task):
    """Steps with one trait each."""


class Noop(Odd):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        return Done()


class Mark(Odd):
    name: str = "Mark"

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, self.name)
        return Done()


class Forever(Odd):
    """Marks its start, then waits until it is cancelled."""

    name: str = "Forever"

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, self.name)
        try:
            await asyncio.Event().wait()
        finally:
            if self.name == "says-goodbye":
                await mark(ctx, "goodbye")
        return Done()


class UntilFile(Odd):
    """Waits, without blocking the loop, until a file exists."""

    path: str

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        while not Path(self.path).exists():
            await asyncio.sleep(0.02)
        await mark(ctx, "end")
        return Done()


class BlocksUntilFile(UntilFile):
    """Blocks the worker's loop until a file exists."""

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        while not Path(self.path).exists():
            time.sleep(0.02)
        await mark(ctx, "end")
        return Done()


class Blocks(Odd):
    """Blocks the worker's loop."""

    seconds: float

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        time.sleep(self.seconds)
        await mark(ctx, "end")
        return Done()


class InThread(Odd):
    number: int = 0

    def run(self, ctx: Context) -> Done:
        return Done()


class Raises(Odd):
    text: str
    policy = Policy(retry_limit=0)

    async def run(self, ctx: Context) -> Done:
        raise RuntimeError(self.text) from ValueError("the cause")


class Retries(Odd):
    """Fails at first, then succeeds."""

    failures: int
    policy = Policy(retry_limit=5, retry_delay=timedelta(milliseconds=50))

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, f"attempt {ctx.attempt}")
        if ctx.attempt <= self.failures:
            raise RuntimeError("not yet")
        return Done()


class Gives(Odd):
    """Ends with Fail."""

    reason: str

    async def run(self, ctx: Context) -> Fail:
        return Fail(self.reason)


class ReturnsNone(Odd):
    async def run(self, ctx: Context) -> Done:
        return None  # type: ignore[return-value]


class Slow(Odd):
    policy = Policy(timeout=timedelta(milliseconds=100))

    async def run(self, ctx: Context) -> Done:
        await asyncio.Event().wait()
        return Done()


class Kills(Odd):
    """Ends its own worker process, unless a file shows that it has done so."""

    path: str

    async def run(self, ctx: Context) -> Done:
        if not Path(self.path).exists():
            Path(self.path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        await mark(ctx, "survived")
        return Done()


class Leaks(Odd):
    """Keeps so many megabytes forever."""

    megabytes: int

    async def run(self, ctx: Context) -> Done:
        KEPT.append(b"x" * (self.megabytes << 20))
        return Done()


class Later(Odd):
    seconds: float

    async def run(self, ctx: Context) -> Next[Mark]:
        return Next(Mark("later"), after=timedelta(seconds=self.seconds))


class Urgent(Odd):
    policy = Policy(priority=5, queue="urgent")

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "Urgent")
        return Done()


class GoesUrgent(Odd):
    async def run(self, ctx: Context) -> Next[Urgent]:
        return Next(Urgent())


class Counts(Odd):
    """A long chain of transitions under one lease after the other."""

    left: int

    async def run(self, ctx: Context) -> Next[Counts] | Done:
        return Next(Counts(self.left - 1)) if self.left else Done()


class Uses(Odd):
    """Uses what the lifespan gave."""

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, ctx.resources["name"])
        return Done()


class PoolSize(Odd):
    """Park with the number of connections that steps share."""

    async def run(self, ctx: Context) -> Fail:
        return Fail(f"{ctx.db.get_max_size()} connections")


class Pair(Odd):
    transparent = True
    values: tuple[int, int]

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, msgspec.json.encode(self.values).decode())
        return Done()


@asynccontextmanager
async def resources() -> AsyncIterator[dict[str, str]]:
    yield {"name": "from the lifespan"}


app = App(Chain, Odd, lifespan=resources)
