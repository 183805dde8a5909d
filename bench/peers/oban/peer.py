"""oban for Python under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: uvloop and psycopg's binary build, as its own command line uses; its guide to queues advises a limit by the
nature of the jobs: of those tried for short ones (50-1,000), 1,000 was the fastest. Acknowledgements are batched
by its producer, with the default debounce of 5 ms.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fleet import SIZES, pace, payload
from oban import Oban, worker
from oban.job import Job
from oban.schema import install

LIMIT = 1_000


@worker(queue="work")
class Work:
    """A job; each worker process sets what it does."""

    run: Callable[[Job], Awaitable[None]]

    async def process(self, job: Job) -> None:
        await Work.run(job)


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its schema and `tasks` jobs, in batches of about 10 MB at most."""
    pool = await Oban.create_pool(dsn)
    await install(pool)
    oban = Oban(pool=pool)
    size = SIZES.get(workload, 0)
    batch = min(5_000, 10_000_000 // max(size, 1))
    for begin in range(0, tasks, batch):
        numbers = range(begin, min(begin + batch, tasks))
        await oban.enqueue_many([Work.new(payload(number, size)) for number in numbers])
    await pool.close()


def handler(workload: str, done: Any, index: int) -> Callable[[Job], Awaitable[None]]:
    """What a job does; the count of each process has its own slot, so no lock is needed."""

    async def noop(job: Job) -> None:
        done[index] += 1

    async def sleep0(job: Job) -> None:
        await asyncio.sleep(0)
        done[index] += 1

    async def cpu1ms(job: Job) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[index] += 1

    return {"sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Callable[[Job], Awaitable[None]]:
    """Notes when a job started."""

    async def note(job: Job) -> None:
        starts[int(job.args["number"])] = time.time()

    return note


async def consume(dsn: str, work: Callable[[Job], Awaitable[None]]) -> None:
    """One process, until SIGTERM."""
    Work.run = work
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    pool = await Oban.create_pool(dsn)
    async with Oban(pool=pool, queues={"work": LIMIT}):
        await stopped.wait()
    await pool.close()


async def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    pool = await Oban.create_pool(dsn)
    oban = Oban(pool=pool)

    async def enqueue(number: int) -> None:
        await oban.enqueue(Work.new({"number": number}))

    calls = await pace(enqueue, count, per_second)
    await pool.close()
    return calls
