"""What a fleet costs that has nothing to do: CPU, statements, memory.

Invariants: nobody asks the measured database anything meanwhile; what the supervisor costs is part of it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from bench.contender import RunFailed
from bench.flows import fill_sleeping
from bench.ours import running_supervisor
from bench.parts import Setting, fill_by_sql, head, setting_of
from bench.server import Server, open_server

__all__ = ["DEAD_WEIGHT", "IdleReport", "fill_dead_weight", "idle_card", "measure_idle"]

DEAD_WEIGHT = ("future", "parked", "leased", "sleeping")

# A transaction of an idle worker may be minutes old; what it has done is counted when it next says so.
_STATEMENTS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1"


class IdleReport(msgspec.Struct, frozen=True):
    """Of the whole fleet, but for the memory, which is one worker's: all of it, and what it shares with nobody.
    `cpu_percent` and `server_cpu_percent`: of one core."""

    bench: str
    setting: Setting
    procs: int
    seconds: float
    weight: dict[str, int]
    cpu_percent: float
    server_cpu_percent: float | None
    statements_per_second: float
    worker_rss_mb: float
    worker_unique_mb: float


def measure_idle(
    *, procs: int, settle: float, seconds: float, weight: dict[str, int], dsn: str | None, say: Callable[[str], None]
) -> IdleReport:
    with (
        open_server(dsn) as server,
        server.fresh_database() as database,
        tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
    ):
        setting = setting_of(server)
        fill_dead_weight(server, server.database(database), weight)
        with running_supervisor(server.database(database), procs, Path(directory)) as fleet:
            say(f"{procs} workers, left alone for {settle:g} s, then watched for {seconds:g} s")
            time.sleep(settle)
            workers = psutil.Process(fleet.pid).children()
            if len(workers) != procs:
                raise RunFailed(f"{len(workers)} of {procs} workers are there")
            tree = [psutil.Process(fleet.pid), *workers]
            statements, cpu, spent = _ask(server, database), server.cpu_seconds(), _cpu(tree)
            began = time.monotonic()
            time.sleep(seconds)
            took = time.monotonic() - began
            spent, cpu_after = _cpu(tree) - spent, server.cpu_seconds()
            statements = _ask(server, database) - statements
            memory = [worker.memory_full_info() for worker in workers]
    return IdleReport(
        bench="idle",
        setting=setting,
        procs=procs,
        seconds=took,
        weight=weight,
        cpu_percent=100 * spent / took,
        server_cpu_percent=None if cpu is None or cpu_after is None else 100 * (cpu_after - cpu) / took,
        statements_per_second=statements / took,
        worker_rss_mb=max(one.rss for one in memory) / 2**20,
        worker_unique_mb=max(one.uss for one in memory) / 2**20,
    )


def idle_card(report: IdleReport) -> str:
    weight = ", ".join(f"{number:,} {kind}" for kind, number in report.weight.items() if number) or "an empty table"
    server = "" if report.server_cpu_percent is None else f"{report.server_cpu_percent:.2f} % of one core"
    return "\n".join(
        [
            *head(report.setting, f"idle: {report.procs} workers on {weight}, {report.seconds:.0f} s"),
            f"CPU of the supervisor and its workers   {report.cpu_percent:.2f} % of one core",
            f"CPU of Postgres                         {server}",
            f"statements                              {report.statements_per_second:.2f} a second",
            f"memory of the largest worker            {report.worker_rss_mb:.1f} MB, "
            f"{report.worker_unique_mb:.1f} MB of it unique",
        ]
    )


def fill_dead_weight(server: Server, dsn: str, weight: dict[str, int]) -> None:
    """Tasks that nobody may run now: due in the future, parked, under the lease of a worker elsewhere, or runs of a
    workflow that sleep."""
    # First: a burst puts them to sleep, and it would wait for the leases.
    if sleeping := weight.get("sleeping", 0):
        fill_sleeping(dsn, sleeping)
    fill_by_sql(server, dsn, weight.get("future", 0), "wakeup_at", "now() + interval '1 day' + n * interval '1 ms'")
    fill_by_sql(server, dsn, weight.get("parked", 0), "error, tried", "'it went wrong', 5")
    fill_by_sql(
        server,
        dsn,
        weight.get("leased", 0),
        "locked_by, lock_expires_at, claims",
        "'00000000-0000-4000-8000-000000000001', now() + interval '1 day', 1",
    )
    server.query("VACUUM (ANALYZE) pg_task", dsn=dsn)
    server.query("CHECKPOINT", dsn=dsn)


def _ask(server: Server, database: str) -> int:
    return int(server.value(_STATEMENTS, database))


def _cpu(processes: Sequence[psutil.Process]) -> float:
    seconds = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds
