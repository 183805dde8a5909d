"""Kludex's pgtask under the bench: fill its queue, drain it with N processes, measure its latency.

Not this project: the package `pgtask` of the index, in an environment of its own. Settings: its own comparison has 25
tasks at once in a process, and its page on scaling names that number as what to raise for more throughput; of those
tried (25-1,000) 400 was the best.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fleet import SIZES, pace, payload

from pgtask import Client, EnqueueRequest, Task, TaskRegistry, Worker

CONCURRENCY = 400
POOL = 20

Handler = Callable[[Task, Any], Awaitable[None]]


def request(body: dict[str, Any]) -> EnqueueRequest[None]:
    return EnqueueRequest("work", body, queue_name="work")


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its schema and `tasks` tasks, in batches of about 5 MB at most."""
    client = await Client.connect(dsn)
    await client.migrate()
    size = SIZES.get(workload, 0)
    batch = min(1_000, 5_000_000 // max(size, 1))
    for begin in range(0, tasks, batch):
        numbers = range(begin, min(begin + batch, tasks))
        await client.enqueue_many([request(payload(number, size)) for number in numbers])


def handler(workload: str, done: Any, index: int) -> Handler:
    """What a task does; the count of each process has its own slot, so no lock is needed."""

    async def noop(task: Task, body: Any) -> None:
        done[index] += 1

    async def sleep0(task: Task, body: Any) -> None:
        await asyncio.sleep(0)
        done[index] += 1

    async def cpu1ms(task: Task, body: Any) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[index] += 1

    async def nothing() -> None:
        pass

    async def chain5(task: Task, body: Any) -> None:
        for step in range(5):
            await task.step(f"step{step}", nothing)
        done[index] += 1

    return {"chain5": chain5, "sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Handler:
    """Notes when a task started."""

    async def note(task: Task, body: Any) -> None:
        starts[int(body["number"])] = time.time()

    return note


async def consume(dsn: str, work: Handler) -> None:
    """One process, until SIGTERM."""
    registry = TaskRegistry(queue_name="work")
    registry.task("work")(work)
    worker = Worker(dsn, registry, concurrency=CONCURRENCY, max_query_connections=POOL)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.shutdown)
    await worker.run()


async def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    client = await Client.connect(dsn)

    async def enqueue(number: int) -> None:
        await client.enqueue(request({"number": number}))

    return await pace(enqueue, count, per_second)
