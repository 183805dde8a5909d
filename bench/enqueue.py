"""Batch enqueue: `enqueue_many` beside the same rows copied by psql and by asyncpg, into the same table.

Invariants: all three write the same number of rows with the same columns into a fresh copy of the same table, indexes
and triggers included; they take turns, round by round; what is timed ends with the commit.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import msgspec
import psutil

from bench.contender import RunFailed
from bench.ours import environment
from bench.parts import Setting, head, setting_of
from bench.process import run_measured
from bench.server import Server, open_server
from bench.spread import Spread, spread
from bench.workloads import WORKLOADS
from pgtask import Client
from pgtask._postgres.embedded import binary

__all__ = ["EnqueueReport", "enqueue_card", "measure_enqueue"]

_COLUMNS = ("id", "step", "queue", "priority")
_FEW = 1_000
_TIMEOUT = 600.0


class EnqueueReport(msgspec.Struct, frozen=True):
    """Rows per second; `ratio` is `enqueue_many` over the other, round by round. `memory_mb`: the peak of a process
    that has enqueued that many tasks."""

    bench: str
    setting: Setting
    tasks: int
    rounds: int
    workload: str
    rates: dict[str, Spread]
    ratio: dict[str, Spread]
    memory_mb: dict[int, float]


def measure_enqueue(
    *, tasks: int, rounds: int, workload: str, dsn: str | None, say: Callable[[str], None]
) -> EnqueueReport:
    found: dict[str, list[float]] = {"enqueue_many": [], "psql copy": [], "asyncpg copy": []}
    with open_server(dsn) as server, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        setting = setting_of(server)
        home = Path(directory)
        _write_rows(server, home, tasks, workload)
        ways: dict[str, Callable[[str], float]] = {
            "enqueue_many": lambda dsn: _ours(dsn, tasks, workload, home)[0],
            "psql copy": lambda dsn: _psql(dsn, home),
            "asyncpg copy": lambda dsn: asyncio.run(_asyncpg(dsn, home)),
        }
        names = list(ways)
        for number in range(rounds):
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                with server.fresh_database() as database:
                    server.query("CHECKPOINT")
                    target = server.database(database)
                    rate = tasks / ways[name](target)
                    rows = server.value("SELECT count(*) FROM pg_task", dsn=target)
                if rows != tasks:
                    raise RunFailed(f"{name} wrote {rows} rows of {tasks}")
                found[name].append(rate)
                say(f"round {number + 1} of {rounds}  {name:<13} {rate:,.0f} rows/s")
        memory = {}
        for size in sorted({min(_FEW, tasks), tasks}):
            with server.fresh_database() as database:
                memory[size] = _ours(server.database(database), size, workload, home)[1]
    return EnqueueReport(
        bench="enqueue",
        setting=setting,
        tasks=tasks,
        rounds=rounds,
        workload=workload,
        rates={name: spread(rates) for name, rates in found.items()},
        ratio={
            name: spread([ours / other for ours, other in zip(found["enqueue_many"], rates, strict=True)])
            for name, rates in found.items()
            if name != "enqueue_many"
        },
        memory_mb=memory,
    )


def enqueue_card(report: EnqueueReport) -> str:
    title = f"{report.tasks:,} tasks of {report.workload} into pg_task, {report.rounds} rounds; rows/s, with the commit"
    lines = [*head(report.setting, title), f"{'median (min - max)':<16}{'rows/s':>34}{'enqueue_many / this':>28}"]
    for name, rate in report.rates.items():
        ratio = report.ratio.get(name)
        beside = "" if ratio is None else f"{ratio.median:.2f} ({ratio.min:.2f} - {ratio.max:.2f})"
        shown = f"{rate.median:,.0f} ({rate.min:,.0f} - {rate.max:,.0f})"
        lines.append(f"{name:<16}{shown:>34}{beside:>28}")
    sizes = ", ".join(f"{size:,} tasks {megabytes:.1f} MB" for size, megabytes in report.memory_mb.items())
    return "\n".join([*lines, "", f"peak memory of a process that has enqueued: {sizes}"])


def _write_rows(server: Server, home: Path, tasks: int, workload: str) -> None:
    """The rows as psql and asyncpg will copy them: what `enqueue_many` has written."""
    with server.fresh_database() as database:
        dsn = server.database(database)
        _ours(dsn, tasks, workload, home)

        async def copy() -> None:
            connection = await asyncpg.connect(dsn)
            for form in ("text", "binary"):
                await connection.copy_from_table("pg_task", columns=_COLUMNS, output=str(home / form), format=form)
            await connection.close()

        asyncio.run(copy())


def _ours(dsn: str, tasks: int, workload: str, home: Path) -> tuple[float, float]:
    """Seconds of the call, and the peak memory of the process in MB."""
    command = [sys.executable, "-m", "bench.enqueue", dsn, str(tasks), workload]
    ended = run_measured(command, directory=home, env=environment(home), timeout=_TIMEOUT)
    seconds, megabytes = json.loads(ended.stdout)
    return seconds, megabytes


def _psql(dsn: str, home: Path) -> float:
    """Without the start of psql: its own clock is asked, to the millisecond."""
    columns = ", ".join(_COLUMNS)
    ended = subprocess.run(
        [
            *(str(binary("psql")), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--command=\\timing on"),
            *(f"--command=\\copy pg_task ({columns}) FROM '{home / 'text'}'", dsn),
        ],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    said = ended.stdout.split()
    if ended.returncode != 0 or "Time:" not in said:
        raise RunFailed(f"psql: {ended.stderr.strip()[-300:]}")
    return float(said[said.index("Time:") + 1]) / 1000


async def _asyncpg(dsn: str, home: Path) -> float:
    connection = await asyncpg.connect(dsn)
    began = time.monotonic()
    await connection.copy_to_table("pg_task", source=str(home / "binary"), columns=_COLUMNS, format="binary")
    seconds = time.monotonic() - began
    await connection.close()
    return seconds


async def _enqueue(dsn: str, tasks: int, workload: str) -> float:
    make = WORKLOADS[workload].make
    async with Client(dsn) as client:
        began = time.monotonic()
        await client.enqueue_many(make(number) for number in range(tasks))
        return time.monotonic() - began


def _peak_mb() -> float:
    """Of this program: `ru_maxrss` would remember the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float(psutil.Process().memory_info().rss) / 2**20
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    used = asyncio.run(_enqueue(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    print(json.dumps([used, _peak_mb()]))
