"""oban for Python under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: uvloop and psycopg's binary build, as its own command line uses; its guide to queues advises a limit by the
nature of the jobs: of those tried for short ones (50-1,000), 1,000 was the fastest. Acknowledgements are batched
by its producer, with the default debounce of 5 ms.
"""

from __future__ import annotations

import asyncio
import signal

from fleet import SIZES, Body, Calls, batches, pace, payload
from oban import Oban, worker
from oban.job import Job
from oban.schema import install

LIMIT = 1_000


@worker(queue="work")
class Work:
    """A job, whose body each worker process sets."""

    run: Body

    async def process(self, job: Job) -> None:
        await Work.run(job)


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Create its schema and `tasks` jobs, in batches of about 10 MB at most."""
    pool = await Oban.create_pool(dsn)
    await install(pool)
    oban = Oban(pool=pool)
    size = SIZES.get(workload, 0)
    for numbers in batches(tasks, size, 5_000):
        await oban.enqueue_many([Work.new(payload(number, size)) for number in numbers])
    await pool.close()


def number(job: Job, more: None) -> int:
    return int(job.args["number"])


async def consume(dsn: str, work: Body) -> None:
    """Run one process until SIGTERM."""
    Work.run = work
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    pool = await Oban.create_pool(dsn)
    async with Oban(pool=pool, queues={"work": LIMIT}):
        await stopped.wait()
    await pool.close()


async def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    pool = await Oban.create_pool(dsn)
    oban = Oban(pool=pool)

    async def enqueue(number: int) -> None:
        await oban.enqueue(Work.new({"number": number}))

    calls = await pace(enqueue, count, per_second)
    await pool.close()
    return calls
