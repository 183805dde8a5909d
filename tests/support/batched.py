"""Steps that run in batches. Each call leaves a row in the table `call`, so that a test sees what ran together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from pgtask import App, Batch, BatchContext, Context, Done, Enqueue, Fail, Next, Policy, Task

CALLS = """
CREATE TABLE call (
    at timestamptz DEFAULT clock_timestamp(), pid integer, step text, numbers integer[], attempts integer[], kind text
);
"""
LOADED = "CREATE TABLE loaded (number integer PRIMARY KEY DEFERRABLE)"
STRAYS: list[asyncio.Task[None]] = []
AN_HOUR = timedelta(hours=1)


async def note(ctx: BatchContext, steps: Sequence[Any], kind: str = "") -> None:
    await ctx.db.execute(
        "INSERT INTO call (pid, step, numbers, attempts, kind) VALUES ($1, $2, $3, $4, $5)",
        os.getpid(),
        type(steps[0]).__name__,
        [step.number for step in steps],
        list(ctx.attempts),
        kind,
    )


class Batched(Task):
    """Steps with one trait each."""


class Plain(Batched):
    policy = Policy(batch=Batch(16))
    number: int
    bad: bool = False

    @classmethod
    async def run_batch(cls, steps: Sequence[Plain], ctx: BatchContext) -> Done:
        await note(ctx, steps)
        if bad := [step.number for step in steps if step.bad]:
            raise ValueError(f"bad are {bad}")
        return Done()


class SlowInThread(Batched):
    """Notes its beginning and its end in a file; some of its steps take longer than the timeout."""

    policy = Policy(batch=Batch(16), timeout=timedelta(seconds=0.3))
    number: int
    path: str
    waits: bool = False

    @classmethod
    def run_batch(cls, steps: Sequence[SlowInThread], ctx: BatchContext) -> Done:
        numbers = ",".join(str(step.number) for step in steps)
        with open(steps[0].path, "a") as file:
            file.write(f"begin {numbers}\n")
        if any(step.waits for step in steps):
            time.sleep(0.6)
        with open(steps[0].path, "a") as file:
            file.write(f"end {numbers}\n")
        return Done()


class Retried(Batched):
    policy = Policy(batch=Batch(16), retry_limit=1, retry_delay=timedelta(0))
    number: int
    fails: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Retried], ctx: BatchContext) -> list[Done | Exception]:
        await note(ctx, steps)
        return [
            ValueError(step.number) if attempt <= step.fails else Done()
            for step, attempt in zip(steps, ctx.attempts, strict=True)
        ]


class Each(Batched):
    """Returns an outcome for each."""

    policy = Policy(batch=Batch(100))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Each], ctx: BatchContext) -> list[Next[Last] | Fail | Done | Exception]:
        await note(ctx, steps)
        outcomes: list[Next[Last] | Fail | Done | Exception] = [
            Next(Last(0)),
            Fail("no"),
            Done(),
            KeyError("one"),
        ]
        return [Next(Last(step.number)) if step.number % 4 == 0 else outcomes[step.number % 4] for step in steps]


class Last(Batched):
    policy = Policy(batch=Batch(100))
    number: int

    @classmethod
    def run_batch(cls, steps: Sequence[Last], ctx: BatchContext) -> Done:
        Path(os.environ.get("BATCHED_LAST", os.devnull)).write_text(str(len(steps)))
        return Done()


class Wrong(Batched):
    """Returns what no batch may return."""

    policy = Policy(batch=Batch(100))
    number: int
    how: str

    @classmethod
    async def run_batch(cls, steps: Sequence[Wrong], ctx: BatchContext) -> list[Done]:
        results: dict[str, Any] = {
            "short": [Done()] * (len(steps) - 1),
            "long": [Done()] * (len(steps) + 1),
            "none": None,
            "generator": (Done() for _ in steps),
            "number": 7,
            "elements": [3] * len(steps),
        }
        result: list[Done] = results[steps[0].how]
        return result


class Slow(Batched):
    policy = Policy(batch=Batch(16), timeout=timedelta(seconds=0.3))
    number: int
    hangs: bool = False

    @classmethod
    async def run_batch(cls, steps: Sequence[Slow], ctx: BatchContext) -> Done:
        if any(step.hangs for step in steps):
            await asyncio.sleep(3600)
        await note(ctx, steps)
        return Done()


class ByModel(Batched):
    policy = Policy(batch=Batch(10, by="model"))
    number: int
    model: str

    @classmethod
    async def run_batch(cls, steps: Sequence[ByModel], ctx: BatchContext) -> Done:
        await note(ctx, steps, ",".join(sorted({step.model for step in steps})))
        return Done()


class Lingering(Batched):
    policy = Policy(batch=Batch(8, linger=AN_HOUR))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Lingering], ctx: BatchContext) -> Done:
        await note(ctx, steps)
        return Done()


class Brief(Batched):
    policy = Policy(batch=Batch(1000, linger=timedelta(milliseconds=20)))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Brief], ctx: BatchContext) -> Done:
        await note(ctx, steps)
        return Done()


class Gated(Batched):
    """Waits for a file."""

    policy = Policy(batch=Batch(10))
    number: int
    go: str

    @classmethod
    async def run_batch(cls, steps: Sequence[Gated], ctx: BatchContext) -> Done:
        await note(ctx, steps)
        while not Path(steps[0].go).exists():
            await asyncio.sleep(0.01)
        await note(ctx, steps, "end")
        return Done()


class Poisoned(Batched):
    """Some of its steps kill the process."""

    policy = Policy(batch=Batch(50))
    number: int
    kills: bool = False

    @classmethod
    async def run_batch(cls, steps: Sequence[Poisoned], ctx: BatchContext) -> Done:
        await note(ctx, steps)
        if any(step.kills for step in steps):
            ctypes.string_at(0)
        await note(ctx, steps, "end")
        return Done()


class Loaded(Batched):
    """Writes a row for each step, which must not be there twice, in the transaction of the outcomes."""

    policy = Policy(batch=Batch(16))
    number: int
    how: str = ""

    @classmethod
    async def run_batch(
        cls, steps: Sequence[Loaded], ctx: BatchContext
    ) -> list[Done | Next[Single] | Fail | Exception]:
        await note(ctx, steps)
        hows = {step.how for step in steps}
        async with ctx.transaction() as conn:
            await conn.execute("INSERT INTO loaded SELECT * FROM unnest($1::integer[])", [one.number for one in steps])
            if "gate" in hows:
                await ctx.db.execute("INSERT INTO call (step) VALUES ('inside')")
                while not Path(os.environ["BATCHED_GATE"]).exists():
                    await asyncio.sleep(0.01)
        if "raise" in hows:
            raise ValueError("after the block")
        with contextlib.suppress(ZeroDivisionError):
            async with ctx.transaction() as conn:
                await conn.execute("INSERT INTO loaded VALUES ($1)", -steps[0].number)
                _ = 1 / 0
        kinds: dict[str, Any] = {"next": Next(Single(1)), "fail": Fail("no"), "error": KeyError("one"), "wrong": 5}
        return [kinds.get(step.how, Done()) for step in steps]


class Cutter(Batched):
    """One of its steps ends the session of its call."""

    policy = Policy(batch=Batch(16))
    number: int
    cuts: bool = False

    @classmethod
    async def run_batch(cls, steps: Sequence[Cutter], ctx: BatchContext) -> Done:
        await note(ctx, steps)
        if any(step.cuts for step in steps):
            await ctx.db.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return Done()


class Keyed(Batched):
    """Enqueues with keys, in a transaction."""

    policy = Policy(batch=Batch(16))
    number: int
    key: str | None = None

    @classmethod
    async def run_batch(cls, steps: Sequence[Keyed], ctx: BatchContext) -> list[Done]:
        async with ctx.transaction() as conn:
            await conn.execute("INSERT INTO loaded SELECT * FROM unnest($1::integer[])", [one.number for one in steps])
        return [Done(enqueue=[Enqueue(Single(step.number), key=step.key)]) for step in steps]


class Stray(Batched):
    """Leaves a task behind that writes when the call has ended."""

    policy = Policy(batch=Batch(4))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Stray], ctx: BatchContext) -> Done:
        async def write_late() -> None:
            while not Path(os.environ["BATCHED_GATE"]).exists():
                await asyncio.sleep(0.01)
            try:
                async with ctx.transaction() as conn:
                    await conn.execute("INSERT INTO loaded VALUES (1)")
            except Exception as error:
                await ctx.db.execute("INSERT INTO call (step, kind) VALUES ('Stray', $1)", str(error))

        STRAYS.append(asyncio.create_task(write_late()))
        return Done()


class LoadedInThread(Batched):
    policy = Policy(batch=Batch(16))
    number: int

    @classmethod
    def run_batch(cls, steps: Sequence[LoadedInThread], ctx: BatchContext) -> Done:
        ctx.transaction()
        return Done()


class Single(Batched):
    """Runs alone."""

    number: int

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("INSERT INTO call (step, numbers) VALUES ('Single', $1)", [self.number])
        return Done()


class Held(Batched):
    """Runs alone, and waits for a file."""

    number: int
    go: str

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("INSERT INTO call (step, numbers) VALUES ('Held', $1)", [self.number])
        while not Path(self.go).exists():
            await asyncio.sleep(0.01)
        return Done()


class Kept(Batched):
    archive = True
    policy = Policy(batch=Batch(10))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Kept], ctx: BatchContext) -> Done:
        return Done()


app = App(Batched)
