"""A `pgtask-supervisor` of this checkout, in a process of its own.

Invariant: its settings come from its command line alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.harness.contender import RunFailed
from bench.harness.paths import ROOT
from bench.harness.process import kill_tree
from bench.workloads.worker_report import REPORTS, WorkerReport, read_reports

__all__ = ["SupervisorProcess", "clean_environment", "running_supervisor", "supervisor_command"]

APP = "bench.workloads.app:app"
_READY_TIMEOUT = 30.0


class SupervisorProcess:
    """A running supervisor. `reports` holds those of its workers once it has stopped."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.reports: list[WorkerReport] = []


@contextmanager
def running_supervisor(
    dsn: str, procs: int, directory: Path, *flags: str, app: str = APP
) -> Iterator[SupervisorProcess]:
    """Start a supervisor, wait until its workers are ready, and stop it at the end."""
    log = directory / "supervisor.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            supervisor_command(dsn, procs, *flags, app=app),
            cwd=directory,
            env=clean_environment(directory),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    supervisor = SupervisorProcess(process.pid)
    try:
        _wait_until_ready(process, log, procs)
        yield supervisor
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_READY_TIMEOUT)
        kill_tree(process)
    supervisor.reports += read_reports(directory)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, procs: int) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT
    while log.read_text().count('"worker.ready"') < procs:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunFailed(f"the supervisor did not get ready: {log.read_text()[-500:]}")
        time.sleep(0.02)


def supervisor_command(dsn: str, procs: int, *flags: str, app: str = APP) -> list[str]:
    settings = ("--dsn", dsn, "--procs", str(procs), "--log", "json", *flags)
    return [sys.executable, "-m", "pgtask._cli.supervisor", app, *settings]


def clean_environment(directory: Path) -> dict[str, str]:
    """Copy our environment without any setting of pgtask, with this checkout first on the path of modules.

    Workers write their reports to `directory`.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGTASK_")}
    inherited.pop("DATABASE_URL", None)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return inherited | {"PYTHONPATH": path, REPORTS: str(directory)}
