"""How long a task waits on an idle fleet: from the call of `enqueue` to the start of its step.

Invariant: the load is bounded and open, one task at each tick of the clock whether the one before has started or not,
so that a slow start is not hidden by a later enqueue.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import msgspec

from bench.contender import RunFailed
from bench.ours import running_supervisor
from bench.server import Server
from bench.spread import percentile
from bench.workloads import Measure
from pgtask import Client

__all__ = ["Latency", "measure_latency"]

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
    start_max: float


def measure_latency(server: Server, *, procs: int, per_second: float, seconds: float) -> Latency:
    """Raises `RunFailed`."""
    count = max(1, round(per_second * seconds))
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)
        with running_supervisor(dsn, procs, Path(directory)) as reports:
            time.sleep(_SETTLE)
            calls = asyncio.run(_enqueue(dsn, count, per_second))
            left = _wait_until_empty(server, dsn)
    if left:
        raise RunFailed(f"{left} tasks were left")
    started = {number: at for report in reports for number, at in report.starts}
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
