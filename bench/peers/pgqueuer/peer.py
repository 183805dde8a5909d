"""pgqueuer under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: asyncpg on uvloop as in its `tools/benchmark.py`; several consumers, each with a connection of its own, as
there too; a larger batch for short jobs and `pgq autovac` after the installation as its performance guide advises. Of
the pairs tried (1-5 consumers, batches of 10-1,000) three consumers were the fastest, from 100 to 1,000 alike.
"""

from __future__ import annotations

import asyncio
import signal

import asyncpg
from fleet import SIZES, Body, Calls, batches, body, pace
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

CONSUMERS = 3
BATCH = 250


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Create its schema and `tasks` jobs, in batches of about 10 MB at most."""
    connection = await asyncpg.connect(dsn)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await queries.optimize_autovacuum()
    size = SIZES.get(workload, 0)
    for numbers in batches(tasks, size, 10_000):
        bodies: list[bytes | None] = [body(size).encode() if size else b"%d" % number for number in numbers]
        await queries.enqueue(["work"] * len(bodies), bodies, [0] * len(bodies))
    await connection.close()


def number(job: Job, more: None) -> int:
    return int(job.payload or b"0")


async def consume(dsn: str, work: Body) -> None:
    """Run the consumers of one process until SIGTERM."""
    queues = [PgQueuer(AsyncpgDriver(await asyncpg.connect(dsn))) for _ in range(CONSUMERS)]

    def stop() -> None:
        for queue in queues:
            queue.shutdown.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    for queue in queues:
        queue.entrypoint("work")(work)
    await asyncio.gather(*(queue.run(batch_size=BATCH) for queue in queues))


async def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    pool = await asyncpg.create_pool(dsn, min_size=4)  # its performance guide: a pool for producers
    queries = Queries(AsyncpgPoolDriver(pool))

    async def enqueue(number: int) -> None:
        await queries.enqueue("work", b"%d" % number)

    return await pace(enqueue, count, per_second)
