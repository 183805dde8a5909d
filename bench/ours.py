"""pgtask as a user starts it: the `pgtask-supervisor` of this checkout, in a process of its own.

Invariant: it gets its settings from its command line alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.contender import Arena, Effort, OnOurTable, RunFailed
from bench.process import kill_tree, run_measured
from bench.workloads import REPORTS, WorkerReport, Workload, read_reports
from pgtask import __version__

__all__ = ["Fleet", "Ours", "command_of", "environment", "running_supervisor"]

_ROOT = Path(__file__).parent.parent
_READY_TIMEOUT = 30.0


class Ours(OnOurTable):
    name = "pgtask"
    about = "pgtask-supervisor --burst"

    def prepare(self, workload: Workload) -> str:
        return __version__

    def drain(self, arena: Arena) -> Effort:
        ended = run_measured(
            command_of(arena.dsn, arena.procs, "--batch", str(arena.batch), "--burst", "--burst-horizon", "0"),
            directory=arena.directory,
            env=environment(arena.directory),
            timeout=arena.timeout,
        )
        _check(json.loads(ended.stdout), arena)
        reports = _reports(arena.directory, arena.procs)
        return Effort(
            began_at=ended.began_at,
            seconds=ended.seconds,
            cpu_seconds=sum(report.cpu_seconds for report in reports),
            tree_cpu_seconds=ended.cpu_seconds,
            peak_rss_bytes=max(report.peak_rss_bytes for report in reports),
            unique_bytes=max(report.unique_bytes for report in reports),
        )


def _check(summary: dict[str, Any], arena: Arena) -> None:
    expected = {"tasks": arena.tasks, "steps": arena.tasks * arena.workload.steps, "errors": 0, "parked": 0}
    wrong = {name: summary[name] for name, value in expected.items() if summary[name] != value}
    if wrong:
        raise RunFailed(f"the summary should say {expected}, but says {wrong}")


def _reports(directory: Path, procs: int) -> list[WorkerReport]:
    reports = read_reports(directory)
    if len(reports) != procs:
        raise RunFailed(f"{len(reports)} of {procs} workers came to a regular end")
    return reports


class Fleet:
    """A supervisor that runs. `reports` is filled with those of its workers when it has been stopped."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.reports: list[WorkerReport] = []


@contextmanager
def running_supervisor(dsn: str, procs: int, directory: Path, *flags: str) -> Iterator[Fleet]:
    """A supervisor whose workers are ready; it is told to stop at the end."""
    log = directory / "supervisor.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command_of(dsn, procs, *flags),
            cwd=directory,
            env=environment(directory),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    fleet = Fleet(process.pid)
    try:
        _wait_until_ready(process, log, procs)
        yield fleet
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_READY_TIMEOUT)
        kill_tree(process)
    fleet.reports += read_reports(directory)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, procs: int) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT
    while log.read_text().count('"worker.ready"') < procs:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunFailed(f"the supervisor did not get ready: {log.read_text()[-500:]}")
        time.sleep(0.02)


def command_of(dsn: str, procs: int, *flags: str) -> list[str]:
    settings = ("--dsn", dsn, "--procs", str(procs), "--log", "json", *flags)
    return [sys.executable, "-m", "pgtask._cli.supervisor", "bench.workloads:app", *settings]


def environment(directory: Path) -> dict[str, str]:
    """Ours without anybody's settings; this checkout comes first on the path."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGTASK_")}
    inherited.pop("DATABASE_URL", None)
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return inherited | {"PYTHONPATH": path, REPORTS: str(directory)}
