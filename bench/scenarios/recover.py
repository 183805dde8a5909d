"""Wait of the tasks of a killed worker: from its death by SIGKILL, under load, to their start in another worker.

Invariants: the killed worker has tasks under way; each step notes its start in a file that outlives its process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from bench.harness.contender import RunFailed
from bench.harness.flags import add_number, add_server, seconds
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, setting_of
from bench.harness.server import Server, open_server
from bench.harness.spread import Spread, percentile, spread
from bench.harness.supervisor import running_supervisor
from bench.scenario import Report
from bench.workloads.steps import Doze
from pgtask import Client
from pgtask.config import Config

__all__ = ["RecoverScenario"]

_POLL_INTERVAL = 0.01
_TIMEOUT = 30.0


class RecoverReport(Report, frozen=True):
    """Waits after the kills. `died`: the number of steps that died with each worker. `half_ms` and `all_ms`: until half
    of them, or all of them, had started again."""

    setting: Setting
    procs: int
    tasks: int
    step_seconds: float
    rounds: int
    lease_timeout: float
    died: list[int]
    half_ms: Spread
    all_ms: Spread


class RecoverScenario:
    """The command `recover`."""

    name = "recover"
    help = "kill -9 of a worker: time until its tasks start again"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--procs", 2, "worker processes")
        add_number(parser, "--tasks", 100, "tasks under way when the worker is killed")
        add_number(parser, "--rounds", 5, "workers to kill, one after the other")
        parser.add_argument(
            "--step-seconds", type=seconds, default=3.0, metavar="S", help="duration of a step (default: 3)"
        )
        lease = Config().lease_timeout
        parser.add_argument(
            "--lease-timeout",
            type=seconds,
            default=lease,
            metavar="S",
            help=f"lease timeout of the workers (default: {lease:g})",
        )
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> RecoverReport:
        died, half, whole = [], [], []
        terms = (arguments.procs, arguments.tasks, arguments.step_seconds, arguments.lease_timeout)
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            for number in range(1, arguments.rounds + 1):
                waits = _kill_one(server, *terms)
                died.append(len(waits))
                half.append(percentile(waits, 50))
                whole.append(max(waits))
                progress(
                    f"round {number} of {arguments.rounds}  {len(waits)} steps died, "
                    f"all started again after {whole[-1]:.0f} ms"
                )
        return RecoverReport(
            bench="recover",
            setting=setting,
            procs=arguments.procs,
            tasks=arguments.tasks,
            step_seconds=arguments.step_seconds,
            rounds=arguments.rounds,
            lease_timeout=arguments.lease_timeout,
            died=died,
            half_ms=spread(half),
            all_ms=spread(whole),
        )

    def card(self, report: RecoverReport) -> str:
        title = (
            f"recovery: {report.tasks} tasks of {report.step_seconds:g} s, {report.procs} processes, kill -9 of one, "
            f"leases of {report.lease_timeout:g} s, {report.rounds} rounds"
        )
        half, whole = report.half_ms, report.all_ms
        return "\n".join(
            [
                *card_head(report.setting, title),
                f"steps that died with the worker       {', '.join(map(str, report.died))}",
                f"half of them started again after      {half.median:.0f} ms ({half.min:.0f} - {half.max:.0f})",
                f"all of them started again after       {whole.median:.0f} ms ({whole.min:.0f} - {whole.max:.0f})",
            ]
        )


def _kill_one(server: Server, procs: int, tasks: int, step_seconds: float, lease_timeout: float) -> list[float]:
    """Kill the worker with the largest number of steps; return the milliseconds until each of them started again."""
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as name:
        dsn, directory = server.database(database), Path(name)
        with running_supervisor(dsn, procs, directory, *_lease_flags(lease_timeout)) as supervisor:
            asyncio.run(_enqueue(dsn, tasks, step_seconds))
            _wait_for(lambda: sum(map(len, _read_starts(directory).values())) >= tasks, "not all tasks have started")
            held = {pid: starts for pid, starts in _read_starts(directory).items() if psutil.pid_exists(pid)}
            victim = max(held, key=lambda pid: len(held[pid]))
            if victim not in {child.pid for child in psutil.Process(supervisor.pid).children()}:
                raise RunFailed(f"{victim} is no worker of {supervisor.pid}")
            os.kill(victim, signal.SIGKILL)
            killed_at = time.time()
            under_way = [number for number, at in held[victim].items() if killed_at - at < step_seconds]
            if not under_way:
                raise RunFailed("the worker had no step under way when it was killed: let the steps last longer")

            def find_restarts() -> dict[int, float]:
                return {
                    number: at
                    for pid, starts in _read_starts(directory).items()
                    for number, at in starts.items()
                    if pid != victim and at > killed_at
                }

            _wait_for(
                lambda: set(under_way) <= find_restarts().keys(), "not all steps have started again", lease_timeout
            )
            found = find_restarts()
    return [1000 * (found[number] - killed_at) for number in under_way]


def _read_starts(directory: Path) -> dict[int, dict[int, float]]:
    """Return the last start of each task, by process and by number of the task."""
    found: dict[int, dict[int, float]] = {}
    for path in directory.glob("*.starts"):
        lines = (line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
        found[int(path.stem)] = {int(number): float(at) for number, at in lines}
    return found


def _lease_flags(timeout: float) -> tuple[str, ...]:
    return "--lease-timeout", f"{timeout:g}", "--heartbeat-interval", f"{timeout / 3:g}"


def _wait_for(condition: Callable[[], bool], failure: str, extra: float = 0.0) -> None:
    """Wait until the condition holds. Raises `RunFailed` after the timeout and `extra` seconds."""
    deadline = time.monotonic() + _TIMEOUT + extra
    while not condition():
        if time.monotonic() > deadline:
            raise RunFailed(f"{failure} after {_TIMEOUT + extra:g} s")
        time.sleep(_POLL_INTERVAL)


async def _enqueue(dsn: str, tasks: int, step_seconds: float) -> None:
    async with Client(dsn) as client:
        await client.enqueue_many(Doze(number, step_seconds) for number in range(tasks))
