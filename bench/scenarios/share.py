"""Sharing of a few steps by idle workers: the time for all of them, beside the ideal.

Invariants: the workers are ready and idle when the tasks arrive, with the default `--concurrency`; a step that computes
uses CPU for its whole duration, so the machine must be quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import msgspec

from bench.harness.contender import RunFailed
from bench.harness.flags import add_number, add_server, positive_numbers, seconds
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, format_spread, setting_of
from bench.harness.server import Server, open_server
from bench.harness.spread import Spread, spread
from bench.harness.supervisor import running_supervisor
from bench.scenario import Report
from bench.workloads.steps import Crunch, CrunchInThread, Pause, PauseInThread
from pgtask import Client, Task

__all__ = ["ShareScenario"]

_KINDS: dict[str, Callable[[int, float], Task]] = {
    "computes": Crunch,
    "computes, in a thread": CrunchInThread,
    "awaits": Pause,
    "sleeps, in a thread": PauseInThread,
}
_COMPUTES = ("computes", "computes, in a thread")
_SETTLE = 1.5  # seconds for the workers to become idle, and to forget the rate of the run before
_LEFT = "SELECT count(*) FROM pg_task CROSS JOIN pg_sleep(0.002)"


class SharedRun(msgspec.Struct, frozen=True):
    """Runs of one kind of step. `of_ideal`: the minimum possible time over the measured one."""

    kind: str
    procs: int
    ideal_seconds: float
    seconds: Spread
    of_ideal: Spread


class ShareReport(Report, frozen=True):
    """Times by kind of step and number of processes."""

    setting: Setting
    steps: int
    step_seconds: float
    rounds: int
    shared: list[SharedRun]


class ShareScenario:
    """The command `share`."""

    name = "share"
    help = "a few steps that compute, sleep or await, shared by idle workers"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--counts", type=positive_numbers, default=[2, 4], metavar="N,N", help="worker processes (default: 2,4)"
        )
        add_number(parser, "--steps", 40, "steps in a run")
        add_number(parser, "--rounds", 3, "runs of each kind of step")
        parser.add_argument(
            "--step-seconds", type=seconds, default=0.25, metavar="S", help="duration of a step (default: 0.25)"
        )
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> ShareReport:
        steps, step_seconds = arguments.steps, arguments.step_seconds
        shared = []
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            for procs in arguments.counts:
                took = _run_rounds(server, procs, steps, step_seconds, arguments.rounds)
                for kind, times in took.items():
                    ideal = _ideal_seconds(kind, procs, steps, step_seconds)
                    of_ideal = spread([ideal / one for one in times])
                    shared.append(SharedRun(kind, procs, ideal, spread(times), of_ideal))
                    progress(f"{procs} processes  {kind:<24} {of_ideal.median:.2f} of the ideal")
        return ShareReport("share", setting, steps, step_seconds, arguments.rounds, shared)

    def card(self, report: ShareReport) -> str:
        title = f"sharing: {report.steps} steps of {report.step_seconds:g} s, idle workers, {report.rounds} rounds"
        lines = [
            *card_head(report.setting, title),
            f"{'a step':<24}{'processes':>10}{'ideal':>10}{'seconds: median (min - max)':>32}{'of the ideal':>24}",
        ]
        lines += [
            f"{one.kind:<24}{one.procs:>10}{one.ideal_seconds:>8.2f} s"
            f"{format_spread(one.seconds, '.2f'):>32}{format_spread(one.of_ideal, '.2f'):>24}"
            for one in report.shared
        ]
        return "\n".join(lines)


def _ideal_seconds(kind: str, procs: int, steps: int, step_seconds: float) -> float:
    """Return the minimum time: steps that wait do so side by side, and steps that compute share the cores."""
    if kind not in _COMPUTES:
        return step_seconds
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else procs
    return steps * step_seconds / min(procs, cores)


def _run_rounds(server: Server, procs: int, steps: int, step_seconds: float, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of the steps of each kind, in the order of the rounds."""
    took: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as name:
        dsn = server.database(database)
        with running_supervisor(dsn, procs, Path(name)):
            for _ in range(rounds):
                for kind, make in _KINDS.items():
                    time.sleep(_SETTLE)
                    timeout = 30 + 2 * steps * step_seconds
                    took[kind].append(
                        asyncio.run(_run_steps(dsn, [make(n, step_seconds) for n in range(steps)], timeout))
                    )
    return took


async def _run_steps(dsn: str, steps: list[Task], timeout: float) -> float:
    """Return the seconds from the enqueue to the end of the last task."""
    connection = await asyncpg.connect(dsn)
    try:
        async with Client(dsn) as client, asyncio.timeout(timeout):
            began = time.perf_counter()
            await client.enqueue_many(steps)
            while await connection.fetchval(_LEFT):
                pass
            return time.perf_counter() - began
    except TimeoutError:
        raise RunFailed(f"{len(steps)} steps did not end within {timeout:g} s") from None
    finally:
        await connection.close()
