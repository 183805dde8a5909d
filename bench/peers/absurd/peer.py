"""Absurd under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: a concurrency above 1, which is the knob that its page on the Python SDK has; a partitioned queue as its page
on storage advises for much traffic. A worker waits for all tasks of a claim before the next one, and has
one connection, so each process runs several. Of the pairs tried (1-16 workers, concurrency 10-200) 8 x 50 was the best.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import absurdctl
import psycopg
from absurd_sdk import AsyncAbsurd, AsyncTaskContext
from fleet import SIZES, pace, payload

WORKERS = 8
CONCURRENCY = 50

Handler = Callable[[Any, AsyncTaskContext], Awaitable[None]]


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its schema, as its own tool has it, and `tasks` tasks, by its own function: its client spawns one at a time."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(absurdctl.BUNDLED_SCHEMA_SQL)
        client = AsyncAbsurd(connection, queue_name="work")
        await client.create_queue("work", storage_mode="partitioned")
        size = SIZES.get(workload, 0)
        batch = min(1_000, 10_000_000 // max(size, 1))
        for begin in range(0, tasks, batch):
            numbers = range(begin, min(begin + batch, tasks))
            bodies = [json.dumps(payload(number, size)) for number in numbers]
            await connection.execute(
                "SELECT absurd.spawn_task('work', 'work', params::jsonb) FROM unnest(%s::text[]) AS params", (bodies,)
            )


def handler(workload: str, done: Any, index: int) -> Handler:
    """What a task does; the count of each process has its own slot, so no lock is needed."""

    async def noop(params: Any, ctx: AsyncTaskContext) -> None:
        done[index] += 1

    async def sleep0(params: Any, ctx: AsyncTaskContext) -> None:
        await asyncio.sleep(0)
        done[index] += 1

    async def cpu1ms(params: Any, ctx: AsyncTaskContext) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[index] += 1

    async def nothing() -> None:
        pass

    async def chain5(params: Any, ctx: AsyncTaskContext) -> None:
        for step in range(5):
            await ctx.step(f"step{step}", nothing)
        done[index] += 1

    return {"chain5": chain5, "sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Handler:
    """Notes when a task started."""

    async def note(params: Any, ctx: AsyncTaskContext) -> None:
        starts[int(params["number"])] = time.time()

    return note


async def consume(dsn: str, work: Handler) -> None:
    """The workers of one process, until SIGTERM."""
    clients = [AsyncAbsurd(dsn, queue_name="work") for _ in range(WORKERS)]

    def stop() -> None:
        for client in clients:
            client.stop_worker()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    for client in clients:
        client.register_task("work")(work)
    await asyncio.gather(*(client.start_worker(concurrency=CONCURRENCY) for client in clients))
    for client in clients:
        await client.close()


async def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    clients = [AsyncAbsurd(dsn, queue_name="work") for _ in range(WORKERS)]  # a connection each
    for client in clients:
        await client.list_queues()

    async def enqueue(number: int) -> None:
        await clients[number % WORKERS].spawn("work", {"number": number}, queue="work")

    calls = await pace(enqueue, count, per_second)
    for client in clients:
        await client.close()
    return calls
