"""procrastinate under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: asynchronous tasks with a concurrency above 1 as its guide to concurrency advises, a pool that has a
connection for each and two more, finished jobs deleted as its guide to the removal of old jobs has it. A worker
fetches one job at a time, and no setting changes that.
"""

from __future__ import annotations

import logging

from fleet import SIZES, Body, Calls, batches, pace, payload
from procrastinate import App, PsycopgConnector

CONCURRENCY = 50

logging.getLogger("procrastinate").setLevel(logging.ERROR)  # or each worker prints a line about the place of its app


def make_app(dsn: str, work: Body | None = None) -> App:
    """Make an app with one task, which calls `work`."""
    app = App(connector=PsycopgConnector(conninfo=dsn, min_size=1, max_size=CONCURRENCY + 2))

    @app.task(name="work")
    async def run(number: int, body: str = "") -> None:
        if work:
            await work(number)

    return app


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Create its schema and `tasks` jobs, in batches of about 10 MB at most."""
    app = make_app(dsn)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        size = SIZES.get(workload, 0)
        for numbers in batches(tasks, size, 1_000):
            await app.tasks["work"].batch_defer_async(*(payload(number, size) for number in numbers))


def number(task: int, more: None) -> int:
    return task


async def consume(dsn: str, work: Body) -> None:
    """Run one process until SIGTERM."""
    app = make_app(dsn, work)
    async with app.open_async():
        await app.run_worker_async(concurrency=CONCURRENCY, delete_jobs="successful")


async def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    app = make_app(dsn)
    await app.open_async()

    async def enqueue(number: int) -> None:
        await app.tasks["work"].defer_async(number=number)

    calls = await pace(enqueue, count, per_second)
    await app.close_async()
    return calls
