"""procrastinate under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: asynchronous tasks with a concurrency above 1 as its guide to concurrency advises, a pool that has a
connection for each and two more, finished jobs deleted as its guide to the removal of old jobs has it. A worker
fetches one job at a time whatever is set.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fleet import SIZES, pace, payload
from procrastinate import App, PsycopgConnector

CONCURRENCY = 50

logging.getLogger("procrastinate").setLevel(logging.ERROR)  # not a line for each worker on where the app is made


def make_app(dsn: str, work: Callable[[int], Awaitable[None]] | None = None) -> App:
    """An app with one task, which does `work`."""
    app = App(connector=PsycopgConnector(conninfo=dsn, min_size=1, max_size=CONCURRENCY + 2))

    @app.task(name="work")
    async def run(number: int, body: str = "") -> None:
        if work:
            await work(number)

    return app


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its schema and `tasks` jobs, in batches of about 10 MB at most."""
    app = make_app(dsn)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        size = SIZES.get(workload, 0)
        batch = min(1_000, 10_000_000 // max(size, 1))
        for begin in range(0, tasks, batch):
            numbers = range(begin, min(begin + batch, tasks))
            await app.tasks["work"].batch_defer_async(*(payload(number, size) for number in numbers))


def handler(workload: str, done: Any, index: int) -> Callable[[int], Awaitable[None]]:
    """What a job does; the count of each process has its own slot, so no lock is needed."""

    async def noop(number: int) -> None:
        done[index] += 1

    async def sleep0(number: int) -> None:
        await asyncio.sleep(0)
        done[index] += 1

    async def cpu1ms(number: int) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[index] += 1

    return {"sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Callable[[int], Awaitable[None]]:
    """Notes when a job started."""

    async def note(number: int) -> None:
        starts[number] = time.time()

    return note


async def consume(dsn: str, work: Callable[[int], Awaitable[None]]) -> None:
    """One process, until SIGTERM."""
    app = make_app(dsn, work)
    async with app.open_async():
        await app.run_worker_async(concurrency=CONCURRENCY, delete_jobs="successful")


async def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    app = make_app(dsn)
    await app.open_async()

    async def enqueue(number: int) -> None:
        await app.tasks["work"].defer_async(number=number)

    calls = await pace(enqueue, count, per_second)
    await app.close_async()
    return calls
