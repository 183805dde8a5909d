"""pgtask as a user starts it: the `pgtask-supervisor` of this checkout."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.contenders.table import TableContender
from bench.harness.contender import Arena, Effort, Latency, RunFailed
from bench.harness.process import run_measured
from bench.harness.server import Server
from bench.harness.spread import percentile
from bench.harness.supervisor import clean_environment, running_supervisor, supervisor_command
from bench.workloads.steps import Measure
from bench.workloads.worker_report import WorkerReport, read_reports
from bench.workloads.workload import Workload
from pgtask import Client, __version__

__all__ = ["Pgtask"]

_WARM_UP = 10
_SETTLE = 1.0  # seconds that the fleet stays idle before the first enqueue


class Pgtask(TableContender):
    """The contender that all others are compared with."""

    name = "pgtask"
    about = "pgtask-supervisor --burst"
    can_measure_latency = True

    def prepare(self, workload: Workload) -> str:
        return __version__

    def drain(self, arena: Arena) -> Effort:
        flags = ("--batch", str(arena.batch), "--burst", "--burst-horizon", "0")
        result = run_measured(
            supervisor_command(arena.dsn, arena.procs, *flags, app=arena.workload.app),
            directory=arena.directory,
            env=clean_environment(arena.directory),
            timeout=arena.timeout,
        )
        _check_summary(json.loads(result.stdout), arena)
        reports = _worker_reports(arena.directory, arena.procs)
        return Effort(
            began_at=result.began_at,
            seconds=result.seconds,
            cpu_seconds=sum(report.cpu_seconds for report in reports),
            tree_cpu_seconds=result.cpu_seconds,
            peak_rss_bytes=max(report.peak_rss_bytes for report in reports),
            unique_bytes=max(report.unique_bytes for report in reports),
        )

    def measure_latency(self, server: Server, *, procs: int, per_second: float, seconds: float) -> Latency:
        """Enqueue one task at each tick of the clock, whether the task before has started or not, so that a later
        enqueue does not hide a slow start."""
        samples = max(1, round(per_second * seconds))
        with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
            dsn = server.database(database)
            with running_supervisor(dsn, procs, Path(directory)) as supervisor:
                time.sleep(_SETTLE)
                calls = asyncio.run(_enqueue_paced(dsn, samples, per_second))
                left = _wait_until_empty(server, dsn)
        if left:
            raise RunFailed(f"{left} tasks were left")
        started = {number: at for report in supervisor.reports for number, at in report.starts}
        if len(started) != samples + _WARM_UP:
            raise RunFailed(f"{len(started)} of {samples + _WARM_UP} tasks were started")
        enqueues = [1000 * (returned - called) for called, returned in calls]
        waits = [1000 * (started[number] - called) for number, (called, _) in enumerate(calls)]
        return Latency(
            per_second=per_second,
            samples=samples,
            enqueue_p50=percentile(enqueues, 50),
            enqueue_p99=percentile(enqueues, 99),
            start_p50=percentile(waits, 50),
            start_p99=percentile(waits, 99),
            start_max=max(waits),
        )


def _check_summary(summary: dict[str, Any], arena: Arena) -> None:
    expected = {"tasks": arena.tasks, "steps": arena.tasks * arena.workload.steps, "errors": 0, "parked": 0}
    wrong = {name: summary[name] for name, value in expected.items() if summary[name] != value}
    if wrong:
        raise RunFailed(f"the summary should say {expected}, but says {wrong}")


def _worker_reports(directory: Path, procs: int) -> list[WorkerReport]:
    reports = read_reports(directory)
    if len(reports) != procs:
        raise RunFailed(f"{len(reports)} of {procs} workers came to a regular end")
    return reports


async def _enqueue_paced(dsn: str, samples: int, per_second: float) -> list[tuple[float, float]]:
    """Return the times at which each enqueue was called and returned, in seconds since the epoch."""
    calls = []
    async with Client(dsn) as client:
        for number in range(_WARM_UP):
            await client.enqueue(Measure(-1 - number))
            await asyncio.sleep(1 / per_second)
        began = time.monotonic()
        for number in range(samples):
            await asyncio.sleep(began + number / per_second - time.monotonic())
            called = time.time()
            await client.enqueue(Measure(number))
            calls.append((called, time.time()))
    return calls


def _wait_until_empty(server: Server, dsn: str) -> int:
    """Wait up to 10 seconds for the table to be empty, as it should be at once; return the number of tasks left."""
    deadline = time.monotonic() + 10
    while True:
        left = int(server.value("SELECT count(*) FROM pg_task", dsn=dsn))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
