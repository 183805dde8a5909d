"""Kludex's pgtask under the bench: fill its queue, drain it with N processes, measure its latency.

Not this project: the package `pgtask` of the index, in an environment of its own. Settings: its own comparison has 25
tasks at once in a process, and its page on scaling advises to raise that number for more throughput; of those
tried (25-1,000) 400 was the best.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from fleet import SIZES, Body, Calls, batches, nothing, pace, payload

from pgtask import Client, EnqueueRequest, Task, TaskRegistry, Worker

CONCURRENCY = 400
POOL = 20


def request(body: dict[str, Any]) -> EnqueueRequest[None]:
    return EnqueueRequest("work", body, queue_name="work")


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Create its schema and `tasks` tasks, in batches of about 5 MB at most."""
    client = await Client.connect(dsn)
    await client.migrate()
    size = SIZES.get(workload, 0)
    for numbers in batches(tasks, size, 1_000, 5_000_000):
        await client.enqueue_many([request(payload(number, size)) for number in numbers])


def number(task: Task, body: Any) -> int:
    return int(body["number"])


async def chain(task: Task, body: Any) -> None:
    for step in range(5):
        await task.step(f"step{step}", nothing)


async def consume(dsn: str, work: Body) -> None:
    """Run one process until SIGTERM."""
    registry = TaskRegistry(queue_name="work")
    registry.task("work")(work)
    worker = Worker(dsn, registry, concurrency=CONCURRENCY, max_query_connections=POOL)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.shutdown)
    await worker.run()


async def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    client = await Client.connect(dsn)

    async def enqueue(number: int) -> None:
        await client.enqueue(request({"number": number}))

    return await pace(enqueue, count, per_second)
