"""Report that each worker process writes about itself when it leaves: its CPU time, its memory, its probes."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

__all__ = ["REPORTS", "WorkerReport", "read_reports", "report_worker"]

REPORTS = "BENCH_REPORTS"
"""The environment variable that names the directory of the reports."""


class WorkerReport(msgspec.Struct, frozen=True):
    """One worker process, from the end of its boot to its exit. `starts`: the number and the start of each probe."""

    pid: int
    cpu_seconds: float
    peak_rss_bytes: int
    unique_bytes: int
    starts: list[tuple[int, float]]


@asynccontextmanager
async def report_worker() -> AsyncIterator[list[tuple[int, float]]]:
    """Measure a worker from before its first claim until after its last flush."""
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
    _write_report(report)


def _write_report(report: WorkerReport) -> None:
    Path(os.environ[REPORTS], f"{report.pid}.json").write_bytes(msgspec.json.encode(report))


def read_reports(directory: Path) -> list[WorkerReport]:
    return [msgspec.json.decode(path.read_bytes(), type=WorkerReport) for path in sorted(directory.glob("*.json"))]
