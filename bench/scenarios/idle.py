"""Cost of a fleet that has nothing to do: CPU, statements, memory.

Invariants: the bench sends no query to the measured database meanwhile; the cost includes that of the supervisor.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.harness.contender import RunFailed
from bench.harness.fill import DEAD_WEIGHT, fill_dead_weight
from bench.harness.flags import add_number, add_server, natural_number, seconds
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, setting_of
from bench.harness.server import Server, open_server
from bench.harness.supervisor import running_supervisor
from bench.scenario import Report

__all__ = ["IdleScenario"]

# The backend of an idle worker may count a transaction minutes after its end, with the next one.
_STATEMENTS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1"


class IdleReport(Report, frozen=True):
    """Cost of the whole fleet, except that the memory is that of the largest worker: all of it, and the part that it
    shares with no other process. `cpu_percent` and `server_cpu_percent`: of one core."""

    setting: Setting
    procs: int
    seconds: float
    weight: dict[str, int]
    cpu_percent: float
    server_cpu_percent: float | None
    statements_per_second: float
    worker_rss_mb: float
    worker_unique_mb: float


class IdleScenario:
    """The command `idle`."""

    name = "idle"
    help = "cost of a fleet that has nothing to do"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--procs", 8, "worker processes")
        parser.add_argument("--seconds", type=seconds, default=60.0, metavar="S", help="duration (default: 60)")
        parser.add_argument(
            "--settle", type=seconds, default=15.0, metavar="S", help="pause before the measurement (default: 15)"
        )
        for kind in DEAD_WEIGHT:
            parser.add_argument(
                f"--{kind}", type=natural_number, default=0, metavar="N", help=f"{kind} tasks in the table (default: 0)"
            )
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> IdleReport:
        procs: int = arguments.procs
        weight: dict[str, int] = {kind: getattr(arguments, kind) for kind in DEAD_WEIGHT}
        with (
            open_server(arguments.dsn) as server,
            server.fresh_database() as database,
            tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
        ):
            setting = setting_of(server)
            fill_dead_weight(server, server.database(database), weight)
            with running_supervisor(server.database(database), procs, Path(directory)) as supervisor:
                progress(f"{procs} workers: idle for {arguments.settle:g} s, then measured for {arguments.seconds:g} s")
                time.sleep(arguments.settle)
                workers = psutil.Process(supervisor.pid).children()
                if len(workers) != procs:
                    raise RunFailed(f"{len(workers)} of {procs} workers are running")
                fleet = [psutil.Process(supervisor.pid), *workers]
                statements, server_cpu, cpu = _count_statements(server, database), server.cpu_seconds(), _cpu(fleet)
                began = time.monotonic()
                time.sleep(arguments.seconds)
                took = time.monotonic() - began
                cpu, server_cpu_after = _cpu(fleet) - cpu, server.cpu_seconds()
                statements = _count_statements(server, database) - statements
                memory = [worker.memory_full_info() for worker in workers]
        server_cpu_percent = None
        if server_cpu is not None and server_cpu_after is not None:
            server_cpu_percent = 100 * (server_cpu_after - server_cpu) / took
        return IdleReport(
            bench="idle",
            setting=setting,
            procs=procs,
            seconds=took,
            weight=weight,
            cpu_percent=100 * cpu / took,
            server_cpu_percent=server_cpu_percent,
            statements_per_second=statements / took,
            worker_rss_mb=max(one.rss for one in memory) / 2**20,
            worker_unique_mb=max(one.uss for one in memory) / 2**20,
        )

    def card(self, report: IdleReport) -> str:
        weight = ", ".join(f"{number:,} {kind}" for kind, number in report.weight.items() if number) or "an empty table"
        server = "" if report.server_cpu_percent is None else f"{report.server_cpu_percent:.2f} % of one core"
        return "\n".join(
            [
                *card_head(report.setting, f"idle: {report.procs} workers on {weight}, {report.seconds:.0f} s"),
                f"CPU of the supervisor and its workers   {report.cpu_percent:.2f} % of one core",
                f"CPU of Postgres                         {server}",
                f"statements                              {report.statements_per_second:.2f} a second",
                f"memory of the largest worker            {report.worker_rss_mb:.1f} MB, "
                f"{report.worker_unique_mb:.1f} MB of it unique",
            ]
        )


def _count_statements(server: Server, database: str) -> int:
    return int(server.value(_STATEMENTS, database))


def _cpu(processes: Sequence[psutil.Process]) -> float:
    """Return the CPU seconds of those processes that are alive."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
