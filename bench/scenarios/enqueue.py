"""Batch enqueue: `enqueue_many` beside the same rows copied by psql and by asyncpg, into the same table.

Invariants: all three methods write the same number of rows with the same columns into a fresh copy of the same table,
indexes and triggers included; they take turns, round by round; the time includes the commit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import psutil

from bench.harness.contender import RunFailed
from bench.harness.flags import add_number, add_server, add_workload
from bench.harness.process import run_measured
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, format_spread, setting_of
from bench.harness.rounds import rotated
from bench.harness.server import Server, open_server
from bench.harness.spread import Spread, spread
from bench.harness.supervisor import clean_environment
from bench.scenario import Report
from bench.workloads.workload import WORKLOADS
from pgtask import Client
from pgtask._postgres.embedded import binary

__all__ = ["EnqueueScenario"]

_COLUMNS = ("id", "step", "queue", "priority")
_SMALL_BATCH = 1_000
_TIMEOUT = 600.0


class EnqueueReport(Report, frozen=True):
    """Rows per second by method. `ratio`: the rate of `enqueue_many` over the other, for each round. `memory_mb`: the
    peak memory of a process, by the number of tasks that it has enqueued."""

    setting: Setting
    tasks: int
    rounds: int
    workload: str
    rates: dict[str, Spread]
    ratio: dict[str, Spread]
    memory_mb: dict[int, float]


class EnqueueScenario:
    """The command `enqueue`."""

    name = "enqueue"
    help = "batch enqueue, beside COPY by psql and by asyncpg"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--tasks", 1_000_000, "tasks in a batch")
        add_number(parser, "--rounds", 5, "rounds per method")
        add_workload(parser, "payload of the tasks")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> EnqueueReport:
        tasks, workload = arguments.tasks, arguments.workload
        with open_server(arguments.dsn) as server, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
            setting = setting_of(server)
            home = Path(directory)
            _write_rows(server, home, tasks, workload)
            methods: dict[str, Callable[[str], float]] = {
                "enqueue_many": lambda dsn: _enqueue_in_process(dsn, tasks, workload, home)[0],
                "psql copy": lambda dsn: _copy_by_psql(dsn, home),
                "asyncpg copy": lambda dsn: asyncio.run(_copy_by_asyncpg(dsn, home)),
            }
            rates = _run_rounds(server, methods, tasks, arguments.rounds, progress)
            memory = {}
            for size in sorted({min(_SMALL_BATCH, tasks), tasks}):
                with server.fresh_database() as database:
                    memory[size] = _enqueue_in_process(server.database(database), size, workload, home)[1]
        return EnqueueReport(
            bench="enqueue",
            setting=setting,
            tasks=tasks,
            rounds=arguments.rounds,
            workload=workload,
            rates={name: spread(numbers) for name, numbers in rates.items()},
            ratio={
                name: spread([ours / other for ours, other in zip(rates["enqueue_many"], numbers, strict=True)])
                for name, numbers in rates.items()
                if name != "enqueue_many"
            },
            memory_mb=memory,
        )

    def card(self, report: EnqueueReport) -> str:
        title = (
            f"{report.tasks:,} tasks of {report.workload} into pg_task, {report.rounds} rounds; rows/s, with the commit"
        )
        lines = [
            *card_head(report.setting, title),
            f"{'median (min - max)':<16}{'rows/s':>34}{'enqueue_many / this':>28}",
        ]
        for name, rate in report.rates.items():
            ratio = "" if name not in report.ratio else format_spread(report.ratio[name], ".2f")
            lines.append(f"{name:<16}{format_spread(rate, ',.0f'):>34}{ratio:>28}")
        sizes = ", ".join(f"{size:,} tasks {megabytes:.1f} MB" for size, megabytes in report.memory_mb.items())
        return "\n".join([*lines, "", f"peak memory of a process that has enqueued: {sizes}"])


def _run_rounds(
    server: Server, methods: dict[str, Callable[[str], float]], tasks: int, rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Return the rows per second of each method, in the order of the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(1, rounds + 1):
        for name in rotated(list(methods), number):
            with server.fresh_database() as database:
                server.query("CHECKPOINT")
                target = server.database(database)
                rate = tasks / methods[name](target)
                rows = server.value("SELECT count(*) FROM pg_task", dsn=target)
            if rows != tasks:
                raise RunFailed(f"{name} wrote {rows} rows of {tasks}")
            rates[name].append(rate)
            progress(f"round {number} of {rounds}  {name:<13} {rate:,.0f} rows/s")
    return rates


def _write_rows(server: Server, home: Path, tasks: int, workload: str) -> None:
    """Write the rows of `enqueue_many` to files, for psql and asyncpg to copy."""
    with server.fresh_database() as database:
        dsn = server.database(database)
        _enqueue_in_process(dsn, tasks, workload, home)

        async def copy() -> None:
            connection = await asyncpg.connect(dsn)
            for form in ("text", "binary"):
                await connection.copy_from_table("pg_task", columns=_COLUMNS, output=str(home / form), format=form)
            await connection.close()

        asyncio.run(copy())


def _enqueue_in_process(dsn: str, tasks: int, workload: str, home: Path) -> tuple[float, float]:
    """Run this module as a program. Return the seconds of the call, and the peak memory of the process in MB."""
    command = [sys.executable, "-m", "bench.scenarios.enqueue", dsn, str(tasks), workload]
    result = run_measured(command, directory=home, env=clean_environment(home), timeout=_TIMEOUT)
    seconds, megabytes = json.loads(result.stdout)
    return seconds, megabytes


def _copy_by_psql(dsn: str, home: Path) -> float:
    """Return seconds by psql's own clock, to the millisecond, without its start."""
    columns = ", ".join(_COLUMNS)
    result = subprocess.run(
        [
            *(str(binary("psql")), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--command=\\timing on"),
            *(f"--command=\\copy pg_task ({columns}) FROM '{home / 'text'}'", dsn),
        ],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    words = result.stdout.split()
    if result.returncode != 0 or "Time:" not in words:
        raise RunFailed(f"psql: {result.stderr.strip()[-300:]}")
    return float(words[words.index("Time:") + 1]) / 1000


async def _copy_by_asyncpg(dsn: str, home: Path) -> float:
    connection = await asyncpg.connect(dsn)
    began = time.monotonic()
    await connection.copy_to_table("pg_task", source=str(home / "binary"), columns=_COLUMNS, format="binary")
    seconds = time.monotonic() - began
    await connection.close()
    return seconds


# --- the program


async def _enqueue(dsn: str, tasks: int, workload: str) -> float:
    make = WORKLOADS[workload].make
    async with Client(dsn) as client:
        began = time.monotonic()
        await client.enqueue_many(make(number) for number in range(tasks))
        return time.monotonic() - began


def _peak_mb() -> float:
    """Return the peak memory of this program. `ru_maxrss` would include that of its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float(psutil.Process().memory_info().rss) / 2**20
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    used = asyncio.run(_enqueue(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    print(json.dumps([used, _peak_mb()]))
