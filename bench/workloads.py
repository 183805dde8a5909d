"""The tasks that are benchmarked, the app that runs them, and what each worker process reports of itself.

Invariant: a step does nothing that its workload is not about; what is measured is the engine.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from pgtask import App, Context, Done, Next, Task

__all__ = ["REPORTS", "WORKLOADS", "Measure", "WorkerReport", "Workload", "app", "read_reports"]

REPORTS = "BENCH_REPORTS"
"""The environment variable with the directory that the workers write their reports to."""


class Noop(Task):
    """One step that does nothing."""


class Nothing(Noop):
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class Chain3(Task):
    """Three steps that do nothing, one after the other."""


class First(Chain3):
    number: int

    async def run(self, ctx: Context) -> Next[Second]:
        return Next(Second(self.number))


class Second(Chain3):
    number: int

    async def run(self, ctx: Context) -> Next[Third]:
        return Next(Third(self.number))


class Third(Chain3):
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


class Probe(Task):
    """One step that notes when it started."""


class Measure(Probe):
    number: int

    async def run(self, ctx: Context) -> Done:
        ctx.resources.append((self.number, time.time()))
        return Done()


class Workload(msgspec.Struct, frozen=True):
    """What is drained: `make(number)` is the first step of a task; `later` are samples of the steps after it."""

    name: str
    make: Callable[[int], Task]
    later: tuple[Task, ...] = ()

    @property
    def steps(self) -> int:
        return 1 + len(self.later)


_NUMBER = 100_000  # as long as those of most tasks, so that samples are as large as what they stand for

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("noop", Nothing),
        Workload("chain3", First, (Second(_NUMBER), Third(_NUMBER))),
        Workload("sleep0", Suspend),
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


app = App(Noop, Chain3, Sleep0, Probe, lifespan=_report)
