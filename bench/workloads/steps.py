"""Tasks that are benchmarked.

Invariant: a step does only what its workload measures. The names of the classes are stored in each row, so their
length counts in the bytes of WAL.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

from bench.workloads.worker_report import REPORTS
from pgtask import Batch, BatchContext, Context, Done, Next, Policy, Task

__all__ = [
    "QUERY",
    "TASKS",
    "WRITE",
    "Ask",
    "Carry",
    "Crunch",
    "CrunchInThread",
    "Doze",
    "Fifth",
    "First",
    "Fourth",
    "Measure",
    "Nothing",
    "NothingAtOnce",
    "Pause",
    "PauseInThread",
    "Second",
    "Spin",
    "Suspend",
    "Third",
    "Write",
    "WriteAtOnce",
    "WriteAtOnceWithin",
    "WriteWithin",
]

WRITE = "INSERT INTO bench_effects (number) VALUES ($1)"
WRITE_MANY = "INSERT INTO bench_effects (number) SELECT * FROM unnest($1::bigint[])"
QUERY = "SELECT 1"


class Noop(Task):
    """One step that does nothing."""


class Nothing(Noop):
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class NoopBatch(Task):
    """One step that does nothing, in batches."""


class NothingAtOnce(NoopBatch):
    policy = Policy(batch=Batch(500))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[NothingAtOnce], ctx: BatchContext) -> Done:
        return Done()


class Chain5(Task):
    """Five steps that do nothing, one after the other."""


class First(Chain5):
    number: int

    async def run(self, ctx: Context) -> Next[Second]:
        return Next(Second(self.number))


class Second(Chain5):
    number: int

    async def run(self, ctx: Context) -> Next[Third]:
        return Next(Third(self.number))


class Third(Chain5):
    number: int

    async def run(self, ctx: Context) -> Next[Fourth]:
        return Next(Fourth(self.number))


class Fourth(Chain5):
    number: int

    async def run(self, ctx: Context) -> Next[Fifth]:
        return Next(Fifth(self.number))


class Fifth(Chain5):
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class Sleep0(Task):
    """One step that suspends once, for a single turn of the loop."""


class Suspend(Sleep0):
    number: int

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(0)
        return Done()


class Cpu1ms(Task):
    """One step that keeps a core busy for a millisecond."""


class Spin(Cpu1ms):
    number: int

    async def run(self, ctx: Context) -> Done:
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        return Done()


class SqlWrite(Task):
    """One step that writes a row, in a transaction of its own."""


class Write(SqlWrite):
    number: int

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute(WRITE, self.number)
        return Done()


class SqlWriteBatch(Task):
    """One step that writes a row, many with one statement."""


class WriteAtOnce(SqlWriteBatch):
    policy = Policy(batch=Batch(500))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[WriteAtOnce], ctx: BatchContext) -> Done:
        await ctx.db.execute(WRITE_MANY, [step.number for step in steps])
        return Done()


class Transact(Task):
    """One step that writes a row, in the transaction of its outcome."""


class WriteWithin(Transact):
    number: int

    async def run(self, ctx: Context) -> Done:
        async with ctx.transaction() as conn:
            await conn.execute(WRITE, self.number)
        return Done()


class TransactBatch(Task):
    """One step that writes a row, many with one statement in the transaction of their outcomes."""


class WriteAtOnceWithin(TransactBatch):
    policy = Policy(batch=Batch(500))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[WriteAtOnceWithin], ctx: BatchContext) -> Done:
        async with ctx.transaction() as conn:
            await conn.execute(WRITE_MANY, [step.number for step in steps])
        return Done()


class DbQuery(Task):
    """One step that sends a query to the database."""


class Ask(DbQuery):
    number: int

    async def run(self, ctx: Context) -> Done:
        await ctx.db.fetchval(QUERY)
        return Done()


class Payload(Task):
    """One step that does nothing with the text it carries."""


class Carry(Payload):
    number: int
    text: str

    async def run(self, ctx: Context) -> Done:
        return Done()


class Slow(Task):
    """One step that takes a while. It notes its start in a file, which outlives the worker."""


class Doze(Slow):
    number: int
    seconds: float

    async def run(self, ctx: Context) -> Done:
        _note_start(self.number)
        await asyncio.sleep(self.seconds)
        return Done()


def _note_start(number: int) -> None:
    with Path(os.environ[REPORTS], f"{os.getpid()}.starts").open("a") as notes:
        notes.write(f"{number} {time.time()}\n")


class Shared(Task):
    """Steps that take a given number of seconds, each kind in its own way."""


class Crunch(Shared):
    number: int
    seconds: float

    async def run(self, ctx: Context) -> Done:
        _compute(self.seconds)
        return Done()


class CrunchInThread(Shared):
    number: int
    seconds: float

    def run(self, ctx: Context) -> Done:
        _compute(self.seconds)
        return Done()


class Pause(Shared):
    number: int
    seconds: float

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(self.seconds)
        return Done()


class PauseInThread(Shared):
    number: int
    seconds: float

    def run(self, ctx: Context) -> Done:
        time.sleep(self.seconds)
        return Done()


def _compute(seconds: float) -> None:
    """Use this many seconds of CPU."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(100))


class Probe(Task):
    """One step that notes its start in the report of its worker."""


class Measure(Probe):
    number: int

    async def run(self, ctx: Context) -> Done:
        ctx.resources.append((self.number, time.time()))
        return Done()


TASKS = (
    *(Noop, NoopBatch, Chain5, Sleep0, Cpu1ms, SqlWrite, SqlWriteBatch, Transact, TransactBatch),
    *(DbQuery, Payload, Slow, Shared, Probe),
)
