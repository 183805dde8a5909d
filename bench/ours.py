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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.contender import Arena, Effort, RunFailed
from bench.workloads import REPORTS, WorkerReport, read_reports

__all__ = ["Ours", "running_supervisor"]

_ROOT = Path(__file__).parent.parent
_READY_TIMEOUT = 30.0


class Ours:
    name = "pgtask"
    about = "pgtask-supervisor --burst"

    def drain(self, arena: Arena) -> Effort:
        command = _command(arena.dsn, arena.procs, "--batch", str(arena.batch), "--burst", "--burst-horizon", "0")
        began_at = time.time()
        began = time.monotonic()
        try:
            ended = subprocess.run(
                command,
                cwd=arena.directory,
                env=_environment(arena.directory),
                capture_output=True,
                text=True,
                timeout=arena.timeout,
            )
        except subprocess.TimeoutExpired as expired:
            said = expired.stderr or b""  # bytes, although we asked for text
            text = said if isinstance(said, str) else said.decode(errors="replace")
            raise RunFailed(f"not finished after {arena.timeout:g} s: {text.strip()[-500:]}") from None
        seconds = time.monotonic() - began
        if ended.returncode != 0:
            raise RunFailed(f"exit code {ended.returncode}: {ended.stderr.strip()[-500:]}")
        _check(json.loads(ended.stdout), arena)
        reports = _reports(arena.directory, arena.procs)
        return Effort(
            began_at=began_at,
            seconds=seconds,
            cpu_seconds=sum(report.cpu_seconds for report in reports),
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


@contextmanager
def running_supervisor(dsn: str, procs: int, directory: Path) -> Iterator[list[WorkerReport]]:
    """A supervisor whose workers are ready; the list is filled with their reports when it has been stopped."""
    reports: list[WorkerReport] = []
    log = directory / "supervisor.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            _command(dsn, procs), cwd=directory, env=_environment(directory), stdout=stream, stderr=stream
        )
    try:
        _wait_until_ready(process, log, procs)
        yield reports
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_READY_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    reports += _reports(directory, procs)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, procs: int) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT
    while log.read_text().count('"worker.ready"') < procs:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunFailed(f"the supervisor did not get ready: {log.read_text()[-500:]}")
        time.sleep(0.02)


def _command(dsn: str, procs: int, *flags: str) -> list[str]:
    settings = ("--dsn", dsn, "--procs", str(procs), "--log", "json", *flags)
    return [sys.executable, "-m", "pgtask._cli.supervisor", "bench.workloads:app", *settings]


def _environment(directory: Path) -> dict[str, str]:
    """Ours without anybody's settings; this checkout comes first on the path."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGTASK_")}
    inherited.pop("DATABASE_URL", None)
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return inherited | {"PYTHONPATH": path, REPORTS: str(directory)}
