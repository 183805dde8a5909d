"""Lateness of schedules, while the same fleet drains tasks that come at a steady rate.

Invariant: the clock of the database, which decides when a schedule is due, is that of the steps, on the same host.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path

from bench.harness.contender import RunFailed
from bench.harness.flags import add_number, add_server, natural_number, seconds
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, setting_of
from bench.harness.server import open_server
from bench.harness.spread import percentile
from bench.harness.supervisor import running_supervisor
from bench.scenario import Report
from bench.workloads.scheduled import SCHEDULES
from bench.workloads.steps import Nothing
from pgtask import Client
from pgtask._cpus import default_procs

__all__ = ["SchedulesScenario"]

_BATCHES = 5  # a second


class SchedulesReport(Report, frozen=True):
    """Milliseconds from the time of an occurrence to the start of its step, and the rate at which tasks came beside."""

    setting: Setting
    procs: int
    schedules: int
    together: bool
    occurrences: int
    fed_per_second: float
    p50: float
    p99: float
    max: float


class SchedulesScenario:
    """The command `schedules`."""

    name = "schedules"
    help = "how late the tasks of many schedules start while others are drained"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--procs", default_procs(), "worker processes")
        add_number(parser, "--schedules", 10_000, "schedules, each once a minute")
        parser.add_argument(
            "--together", action="store_true", help="all in the same second, not spread over the minute"
        )
        parser.add_argument(
            "--per-second", type=natural_number, default=20_000, metavar="N", help="tasks beside (default: 20,000)"
        )
        parser.add_argument("--seconds", type=seconds, default=60.0, metavar="S", help="duration (default: 60)")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> SchedulesReport:
        number: int = arguments.schedules
        os.environ[SCHEDULES] = str(-number if arguments.together else number)
        with (
            open_server(arguments.dsn) as server,
            server.fresh_database() as database,
            tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
        ):
            setting, dsn = setting_of(server), server.database(database)
            app = "bench.workloads.scheduled:app"
            with running_supervisor(dsn, arguments.procs, Path(directory), app=app) as supervisor:
                deadline = time.monotonic() + 30
                while server.value("SELECT count(*) FROM pg_task_schedules", dsn=dsn) < number:
                    if time.monotonic() > deadline:
                        raise RunFailed("the schedules were not declared")
                    time.sleep(0.1)
                progress(f"{number:,} schedules, {arguments.seconds:g} s")
                began, fed = time.time(), asyncio.run(_feed(dsn, arguments.per_second, arguments.seconds))
                ended = time.time()
            starts = [start for report in supervisor.reports for start in report.starts]
        late = [1000 * (start - due) for due, start in starts if began <= due < ended - 1]
        if not late:
            raise RunFailed("no schedule fell due: measure for a minute at least")
        return SchedulesReport(
            bench="schedules",
            setting=setting,
            procs=arguments.procs,
            schedules=number,
            together=arguments.together,
            occurrences=len(late),
            fed_per_second=fed / (ended - began),
            p50=percentile(late, 50),
            p99=percentile(late, 99),
            max=max(late),
        )

    def card(self, report: SchedulesReport) -> str:
        how = "all in one second" if report.together else "spread over the minute"
        title = f"schedules: {report.schedules:,}, {how}, {report.procs} processes"
        return "\n".join(
            [
                *card_head(report.setting, title),
                f"tasks beside                       {report.fed_per_second:,.0f} a second",
                f"occurrences                        {report.occurrences:,}",
                f"from its time to its first step    p50 {report.p50:.0f} ms, p99 {report.p99:.0f} ms, "
                f"max {report.max:.0f} ms",
            ]
        )


async def _feed(dsn: str, per_second: int, duration: float) -> int:
    """Enqueue tasks at a steady rate; return how many."""
    batch = [Nothing(number) for number in range(per_second // _BATCHES)]
    fed, began, turn = 0, time.monotonic(), 0
    async with Client(dsn) as client:
        while time.monotonic() - began < duration:
            turn += 1
            if batch:
                await client.enqueue_many(batch)
                fed += len(batch)
            await asyncio.sleep(max(0.0, began + turn / _BATCHES - time.monotonic()))
    return fed
