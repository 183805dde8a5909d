"""Absurd under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: a concurrency above 1, the knob on its page about the Python SDK; a partitioned queue, as its page
on storage advises for much traffic. A worker waits for all tasks of a claim before the next one, and has
one connection, so each process runs several. Of the pairs tried (1-16 workers, concurrency 10-200) 8 x 50 was the best.
"""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import absurdctl
import psycopg
from absurd_sdk import AsyncAbsurd, AsyncTaskContext
from fleet import SIZES, Body, Calls, batches, nothing, pace, payload

WORKERS = 8
CONCURRENCY = 50


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Create its schema, by its own tool, and the tasks, by its own function: its client spawns one at a time."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(absurdctl.BUNDLED_SCHEMA_SQL)
        client = AsyncAbsurd(connection, queue_name="work")
        await client.create_queue("work", storage_mode="partitioned")
        size = SIZES.get(workload, 0)
        for numbers in batches(tasks, size, 1_000):
            bodies = [json.dumps(payload(number, size)) for number in numbers]
            await connection.execute(
                "SELECT absurd.spawn_task('work', 'work', params::jsonb) FROM unnest(%s::text[]) AS params", (bodies,)
            )


def number(params: Any, ctx: AsyncTaskContext) -> int:
    return int(params["number"])


async def chain(params: Any, ctx: AsyncTaskContext) -> None:
    for step in range(5):
        await ctx.step(f"step{step}", nothing)


async def consume(dsn: str, work: Body) -> None:
    """Run the workers of one process until SIGTERM."""
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


async def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    clients = [AsyncAbsurd(dsn, queue_name="work") for _ in range(WORKERS)]  # a connection each
    for client in clients:
        await client.list_queues()

    async def enqueue(number: int) -> None:
        await clients[number % WORKERS].spawn("work", {"number": number}, queue="work")

    calls = await pace(enqueue, count, per_second)
    for client in clients:
        await client.close()
    return calls
