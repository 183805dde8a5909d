"""How long the tasks of a killed worker wait: from its death by SIGKILL, under load, to their start elsewhere.

Invariants: the worker that dies is one that has tasks under way; each start is noted by the step itself, in a file that
outlives its process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from bench.contender import RunFailed
from bench.ours import running_supervisor
from bench.parts import Setting, head, setting_of
from bench.server import Server, open_server
from bench.spread import Spread, percentile, spread
from bench.workloads import Doze
from pgtask import Client

__all__ = ["RecoverReport", "measure_recover", "recover_card"]

_POLL = 0.01
_TIMEOUT = 30.0


class RecoverReport(msgspec.Struct, frozen=True):
    """Of each kill: how many steps died with the worker, and the milliseconds until half of them, and all of them, had
    started again."""

    bench: str
    setting: Setting
    procs: int
    tasks: int
    step_seconds: float
    rounds: int
    lease_timeout: float
    died: list[int]
    half_ms: Spread
    all_ms: Spread


def measure_recover(
    *,
    procs: int,
    tasks: int,
    step_seconds: float,
    lease_timeout: float,
    rounds: int,
    dsn: str | None,
    say: Callable[[str], None],
) -> RecoverReport:
    """Raises `RunFailed`."""
    died, half, whole = [], [], []
    with open_server(dsn) as server:
        setting = setting_of(server)
        for number in range(1, rounds + 1):
            waits = _kill_one(server, procs, tasks, step_seconds, lease_timeout)
            died.append(len(waits))
            half.append(percentile(waits, 50))
            whole.append(max(waits))
            say(f"round {number} of {rounds}  {len(waits)} steps died, all started again after {whole[-1]:.0f} ms")
    return RecoverReport(
        bench="recover",
        setting=setting,
        procs=procs,
        tasks=tasks,
        step_seconds=step_seconds,
        rounds=rounds,
        lease_timeout=lease_timeout,
        died=died,
        half_ms=spread(half),
        all_ms=spread(whole),
    )


def recover_card(report: RecoverReport) -> str:
    title = (
        f"recovery: {report.tasks} tasks of {report.step_seconds:g} s, {report.procs} processes, kill -9 of one, "
        f"leases of {report.lease_timeout:g} s, {report.rounds} rounds"
    )
    half, whole = report.half_ms, report.all_ms
    return "\n".join(
        [
            *head(report.setting, title),
            f"steps that died with the worker       {', '.join(map(str, report.died))}",
            f"half of them started again after      {half.median:.0f} ms ({half.min:.0f} - {half.max:.0f})",
            f"all of them started again after       {whole.median:.0f} ms ({whole.min:.0f} - {whole.max:.0f})",
        ]
    )


def _kill_one(server: Server, procs: int, tasks: int, step_seconds: float, lease_timeout: float) -> list[float]:
    """Milliseconds that each step which died with the worker waited."""
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as name:
        dsn, directory = server.database(database), Path(name)
        with running_supervisor(dsn, procs, directory, *_lease(lease_timeout)) as fleet:
            asyncio.run(_enqueue(dsn, tasks, step_seconds))
            _wait_for(lambda: sum(map(len, _starts(directory).values())) >= tasks, "not all tasks have started")
            held = {pid: starts for pid, starts in _starts(directory).items() if psutil.pid_exists(pid)}
            victim = max(held, key=lambda pid: len(held[pid]))
            if victim not in {child.pid for child in psutil.Process(fleet.pid).children()}:
                raise RunFailed(f"{victim} is no worker of {fleet.pid}")
            os.kill(victim, signal.SIGKILL)
            killed_at = time.time()
            under_way = [number for number, at in held[victim].items() if killed_at - at < step_seconds]
            if not under_way:
                raise RunFailed("the worker had no step under way when it was killed: let the steps last longer")

            def again() -> dict[int, float]:
                return {
                    number: at
                    for pid, starts in _starts(directory).items()
                    for number, at in starts.items()
                    if pid != victim and at > killed_at
                }

            _wait_for(lambda: set(under_way) <= again().keys(), "not all steps have started again", lease_timeout)
            found = again()
    return [1000 * (found[number] - killed_at) for number in under_way]


def _starts(directory: Path) -> dict[int, dict[int, float]]:
    """By process and by number of the task: when it was last started."""
    found: dict[int, dict[int, float]] = {}
    for path in directory.glob("*.starts"):
        lines = (line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
        found[int(path.stem)] = {int(number): float(at) for number, at in lines}
    return found


def _lease(timeout: float) -> tuple[str, ...]:
    return "--lease-timeout", f"{timeout:g}", "--heartbeat-interval", f"{timeout / 3:g}"


def _wait_for(there: Callable[[], bool], otherwise: str, more: float = 0.0) -> None:
    deadline = time.monotonic() + _TIMEOUT + more
    while not there():
        if time.monotonic() > deadline:
            raise RunFailed(f"{otherwise} after {_TIMEOUT + more:g} s")
        time.sleep(_POLL)


async def _enqueue(dsn: str, tasks: int, step_seconds: float) -> None:
    async with Client(dsn) as client:
        await client.enqueue_many(Doze(number, step_seconds) for number in range(tasks))
