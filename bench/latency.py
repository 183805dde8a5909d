"""How long a task waits on an idle fleet: from the call of `enqueue` to the start of its step.

Invariant: the load is bounded and open, one task at each tick of the clock whether the one before has started or not,
so that a slow start is not hidden by a later enqueue.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.contender import Contender, RunFailed, Skipped
from bench.machine import commit, machine, versions
from bench.ours import Ours, running_supervisor
from bench.peer import Peer
from bench.server import BenchError, Server, open_server
from bench.spread import percentile
from bench.workloads import WORKLOADS, Measure
from pgtask import Client

__all__ = ["Latency", "LatencyReport", "can_measure", "latency_card", "latency_report", "measure_latency"]

_WARM_UP = 10
_SETTLE = 1.0  # seconds that the fleet is left alone before


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds. `enqueue`: the call itself, its commit included; `start`: from the call to the start of the step,
    by the clock of this host."""

    per_second: float
    samples: int
    enqueue_p50: float
    enqueue_p99: float
    start_p50: float
    start_p99: float
    start_max: float | None = None


class LatencyReport(msgspec.Struct, frozen=True):
    """Each contender at each rate, one after the other."""

    bench: str
    at: str
    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    server: str
    settings: dict[str, str]
    procs: int
    seconds: float
    latency: dict[str, list[Latency]]
    failures: list[str]


def can_measure(contender: Contender) -> bool:
    return isinstance(contender, Ours) or (isinstance(contender, Peer) and contender.can_measure_latency)


def measure_latency(server: Server, contender: Contender, *, procs: int, per_second: float, seconds: float) -> Latency:
    """Raises `RunFailed`."""
    if isinstance(contender, Peer):
        with server.fresh_database(empty=True) as database:
            figures = contender.latency(
                server.database(database), procs=procs, per_second=per_second, seconds=math.ceil(seconds)
            )
        return Latency(per_second=per_second, **msgspec.structs.asdict(figures))
    return _measure_ours(server, procs=procs, per_second=per_second, seconds=seconds)


def latency_report(
    contenders: list[Contender],
    *,
    rates: list[float],
    procs: int,
    seconds: float,
    dsn: str | None,
    say: Callable[[str], None],
) -> LatencyReport:
    found: dict[str, list[Latency]] = {}
    failures: list[str] = []
    about = machine()
    with open_server(dsn) as server:
        for contender in contenders:
            try:
                if not can_measure(contender):
                    raise Skipped("it measures no latency")
                contender.prepare(WORKLOADS["noop"])
            except Skipped as why:
                say(f"skipped {contender.name}: {why}")
                continue
            for rate in rates:
                say(f"{contender.name} at {rate:g}/s for {seconds:g} s")
                try:
                    one = measure_latency(server, contender, procs=procs, per_second=rate, seconds=seconds)
                    found.setdefault(contender.name, []).append(one)
                except (RunFailed, BenchError) as error:
                    failures.append(f"{contender.name} at {rate:g}/s: {error}")
        return LatencyReport(
            bench="latency",
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit(),
            machine=about,
            versions=versions(),
            server=server.version,
            settings=server.settings,
            procs=procs,
            seconds=seconds,
            latency=found,
            failures=failures,
        )


def latency_card(report: LatencyReport) -> str:
    lines = [
        f"latency of an idle fleet of {report.procs} processes, {report.seconds:g} s at each rate, ms; "
        "enqueue is the call with its commit, start is from that call to the first line of the step",
        f"{'':<14}{'a second':>10}{'samples':>9}{'enqueue p50':>13}{'p99':>9}{'start p50':>11}{'p99':>9}{'max':>9}",
    ]
    for name, rates in report.latency.items():
        for one in rates:
            most = "" if one.start_max is None else f"{one.start_max:.2f}"
            lines.append(
                f"{name:<14}{one.per_second:>10g}{one.samples:>9}{one.enqueue_p50:>13.2f}{one.enqueue_p99:>9.2f}"
                f"{one.start_p50:>11.2f}{one.start_p99:>9.2f}{most:>9}"
            )
    return "\n".join(lines + [f"FAILED    {failure}" for failure in report.failures])


def _measure_ours(server: Server, *, procs: int, per_second: float, seconds: float) -> Latency:
    count = max(1, round(per_second * seconds))
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)
        with running_supervisor(dsn, procs, Path(directory)) as fleet:
            time.sleep(_SETTLE)
            calls = asyncio.run(_enqueue(dsn, count, per_second))
            left = _wait_until_empty(server, dsn)
    if left:
        raise RunFailed(f"{left} tasks were left")
    started = {number: at for report in fleet.reports for number, at in report.starts}
    if len(started) != count + _WARM_UP:
        raise RunFailed(f"{len(started)} of {count + _WARM_UP} tasks were started")
    enqueues = [1000 * (returned - called) for called, returned in calls]
    waits = [1000 * (started[number] - called) for number, (called, _) in enumerate(calls)]
    return Latency(
        per_second=per_second,
        samples=count,
        enqueue_p50=percentile(enqueues, 50),
        enqueue_p99=percentile(enqueues, 99),
        start_p50=percentile(waits, 50),
        start_p99=percentile(waits, 99),
        start_max=max(waits),
    )


async def _enqueue(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each enqueue was called and when it returned, in seconds since the epoch."""
    calls = []
    async with Client(dsn) as client:
        for number in range(_WARM_UP):
            await client.enqueue(Measure(-1 - number))
            await asyncio.sleep(1 / per_second)
        began = time.monotonic()
        for number in range(count):
            await asyncio.sleep(began + number / per_second - time.monotonic())
            called = time.time()
            await client.enqueue(Measure(number))
            calls.append((called, time.time()))
    return calls


def _wait_until_empty(server: Server, dsn: str) -> int:
    """How many tasks are left after a while; they should be gone at once."""
    deadline = time.monotonic() + 10
    while True:
        left = int(server.value("SELECT count(*) FROM pg_task", dsn=dsn))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
