"""Steps under limits that write when they ran."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import timedelta
from typing import Any

from pgtask import App, Breaker, Context, Done, Fail, Limit, Next, Policy, Rate, Task, Throttled

TABLE = """
CREATE TABLE ran (number bigint GENERATED ALWAYS AS IDENTITY, step text, key text, began timestamptz, ended timestamptz)
"""

keyed = Limit("keyed", key=lambda step: step.key, concurrency=2)
alone = Limit("alone", key=lambda step: step.key, concurrency=1)
paced = Limit("paced", rate=Rate(40, burst=4))
strict = Limit("strict", key=lambda step: step.key, concurrency=1, order="strict")
fused = Limit("fused", key=lambda step: step.key, breaker=Breaker(failures=3, pause=timedelta(seconds=1)))
turns = Limit("turns", key=lambda step: step.key, share=True)
broken = Limit("broken", key=lambda step: 1 // step.number, concurrency=1)


async def note(ctx: Context, step: Any, *, seconds: float = 0.0) -> None:
    async with ctx.db.acquire() as connection:
        began = await connection.fetchval("SELECT clock_timestamp()")
        await asyncio.sleep(seconds)
        await connection.execute(
            "INSERT INTO ran (step, key, began, ended) VALUES ($1, $2, $3, clock_timestamp())",
            *(type(step).__name__, getattr(step, "key", ""), began),
        )


def spend(seconds: float) -> None:
    time.sleep(seconds)


def is_first() -> bool:
    try:
        with open(os.environ["SHORT_LOG"] + ".first", "x"):
            return True
    except FileExistsError:
        return False


def record(line: str) -> None:
    with open(os.environ["SHORT_LOG"], "a") as log:
        log.write(line)


class Limited(Task):
    """Steps of one kind each."""


class Keyed(Limited):
    policy = Policy(limit=keyed)
    key: str | None
    seconds: float = 0.0

    async def run(self, ctx: Context) -> Done:
        await note(ctx, self, seconds=self.seconds)
        return Done()


class Short(Limited):
    """Suspends only if told, so turns run it. It writes when it ran, by a clock that all processes share."""

    policy = Policy(limit=alone)
    key: str
    seconds: float = 0.0002
    suspends: bool = False
    throttles: bool = False

    async def run(self, ctx: Context) -> Done:
        began = time.monotonic_ns()
        if self.throttles and is_first():
            record(f"{self.key} {began} {began}\n")
            raise Throttled(0.5)
        if self.suspends:
            await asyncio.sleep(self.seconds)
        else:
            spend(self.seconds)
        record(f"{self.key} {began} {time.monotonic_ns()}\n")
        return Done()


class Paced(Limited):
    policy = Policy(limit=paced)
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        await note(ctx, self)
        return Done()


class Free(Limited):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        await note(ctx, self)
        return Done()


class Begin(Limited):
    key: str

    async def run(self, ctx: Context) -> Next[Middle]:
        return Next(Middle(self.key))


class Middle(Limited):
    policy = Policy(limit=keyed)
    key: str

    async def run(self, ctx: Context) -> Next[Free]:
        await note(ctx, self)
        return Next(Free())


class Ordered(Limited):
    policy = Policy(limit=strict, retry_limit=1, retry_delay=timedelta(milliseconds=300))
    key: str
    number: int
    fails: int = 0

    async def run(self, ctx: Context) -> Done | Fail:
        async with ctx.db.acquire() as connection:
            await connection.execute(
                "INSERT INTO ran (step, key, began) VALUES ($1, $2, clock_timestamp())", f"{self.number}", self.key
            )
        if ctx.attempt <= self.fails:
            raise RuntimeError("not yet")
        return Done()


class Fused(Limited):
    policy = Policy(limit=fused, retry_limit=100, retry_delay=timedelta(0))
    key: str

    async def run(self, ctx: Context) -> Done:
        await note(ctx, self)
        async with ctx.db.acquire() as connection:
            if await connection.fetchval("SELECT to_regclass('down') IS NOT NULL"):
                raise RuntimeError("down")
        return Done()


class Told(Limited):
    policy = Policy(limit=keyed)
    key: str

    async def run(self, ctx: Context) -> Done:
        await note(ctx, self)
        async with ctx.db.acquire() as connection:
            if await connection.fetchval("SELECT to_regclass('down') IS NOT NULL"):
                raise Throttled(30.0)
        return Done()


class Killer(Limited):
    policy = Policy(limit=strict)
    key: str

    async def run(self, ctx: Context) -> Done:
        async with ctx.db.acquire() as connection:
            await note(ctx, self)
            if await connection.fetchval("SELECT count(*) FROM ran") == 1:
                os.kill(os.getpid(), 9)
        return Done()


class Turn(Limited):
    policy = Policy(limit=turns)
    key: str
    seconds: float = 0.0

    async def run(self, ctx: Context) -> Done:
        await note(ctx, self, seconds=self.seconds)
        return Done()


class Broken(Limited):
    policy = Policy(limit=broken)
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        return Done()


app = App(Limited)
