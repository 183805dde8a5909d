"""The tasks that are benchmarked, the app that runs them, and what each worker process reports of itself.

Invariant: a step does nothing that its workload is not about; what is measured is the engine.
"""

from __future__ import annotations

import asyncio
import base64
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from pgtask import App, Context, Done, Next, Task

__all__ = ["REPORTS", "WORKLOADS", "Doze", "Measure", "Nothing", "WorkerReport", "Workload", "app", "read_reports"]

WRITE = "INSERT INTO bench_effects (number) VALUES ($1)"
QUERY = "SELECT 1"
REPORTS = "BENCH_REPORTS"
"""The environment variable with the directory that the workers write their reports to."""


class Noop(Task):
    """One step that does nothing."""


class Nothing(Noop):
    number: int

    async def run(self, ctx: Context) -> Done:
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


class DbQuery(Task):
    """One step that asks the database something."""


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
    """One step that takes a while, and notes that it has started, where it stays though the worker is killed."""


class Doze(Slow):
    number: int
    seconds: float

    async def run(self, ctx: Context) -> Done:
        _note(self.number)
        await asyncio.sleep(self.seconds)
        return Done()


def _note(number: int) -> None:
    with Path(os.environ[REPORTS], f"{os.getpid()}.starts").open("a") as notes:
        notes.write(f"{number} {time.time()}\n")


class Probe(Task):
    """One step that notes when it started."""


class Measure(Probe):
    number: int

    async def run(self, ctx: Context) -> Done:
        ctx.resources.append((self.number, time.time()))
        return Done()


class Workload(msgspec.Struct, frozen=True):
    """What is drained: `make(number)` is the first step of a task; `later` are samples of the steps after it; `setup`
    is run in the database before. `tasks`: how many make a run of some seconds. `is_idle`: its steps do nothing but
    move on, so that the floor can be compared with it. `query`: what each step sends to the database."""

    name: str
    make: Callable[[int], Task]
    later: tuple[Task, ...] = ()
    tasks: int = 200_000
    setup: str | None = None
    is_idle: bool = True
    query: str | None = None

    @property
    def steps(self) -> int:
        return 1 + len(self.later)


def _text(size: int) -> str:
    """That many letters which cannot be compressed."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


_NUMBER = 100_000  # as long as those of most tasks, so that samples are as large as what they stand for

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("noop", Nothing),
        Workload("chain5", First, (Second(_NUMBER), Third(_NUMBER), Fourth(_NUMBER), Fifth(_NUMBER)), tasks=60_000),
        Workload("sleep0", Suspend),
        Workload("cpu1ms", Spin, tasks=10_000, is_idle=False),
        Workload(
            "sqlwrite",
            Write,
            tasks=50_000,
            setup="CREATE TABLE bench_effects (number bigint NOT NULL)",
            is_idle=False,
            query=WRITE,
        ),
        Workload("dbquery", Ask, tasks=50_000, is_idle=False, query=QUERY),
        Workload("payload1k", lambda number: Carry(number, _text(1_000)), tasks=100_000),
        Workload("payload100k", lambda number: Carry(number, _text(100_000)), tasks=5_000),
    )
}


class WorkerReport(msgspec.Struct, frozen=True):
    """One worker process between its boot and its leave. `starts` are the numbers of probes and when they started."""

    pid: int
    cpu_seconds: float
    peak_rss_bytes: int
    unique_bytes: int
    starts: list[tuple[int, float]]


@asynccontextmanager
async def _report() -> AsyncIterator[list[tuple[int, float]]]:
    """Entered before the first claim of a worker and left after its last flush."""
    import psutil

    starts: list[tuple[int, float]] = []
    before = time.process_time()
    yield starts
    report = WorkerReport(
        pid=os.getpid(),
        cpu_seconds=time.process_time() - before,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        unique_bytes=psutil.Process().memory_full_info().uss,
        starts=starts,
    )
    _write(report)


def _write(report: WorkerReport) -> None:
    Path(os.environ[REPORTS], f"{report.pid}.json").write_bytes(msgspec.json.encode(report))


def read_reports(directory: Path) -> list[WorkerReport]:
    return [msgspec.json.decode(path.read_bytes(), type=WorkerReport) for path in sorted(directory.glob("*.json"))]


app = App(Noop, Chain5, Sleep0, Cpu1ms, SqlWrite, DbQuery, Payload, Slow, Probe, lifespan=_report)
