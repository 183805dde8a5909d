"""pgqrs under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: its benchmark of a fixed backlog finds the size of a batch to be what matters (149 messages/s at 1, 6,800 at
50), so a batch is large here: 2,000 was the fastest of those tried (100-5,000). Its limits on rate and length are
lifted. It has no worker that takes batches and never ends, so the loop is ours: dequeue, await the handler of each
message, delete the batch; an empty queue is polled every 20 ms. Runs of workflows go side by side, 500 at a time, as a
batch; its own worker for them runs one after the other.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pgqrs
from fleet import SIZES, Body, Calls, batches, pace, payload
from pgqrs import QueueMessage

BATCH = 2_000
RUNS = 500
POLL = 0.02


async def connect(dsn: str) -> pgqrs.Store:
    """Connect without limits on the rate and on the length of messages."""
    config = pgqrs.Config(dsn)
    config.max_enqueue_per_second = 10_000_000
    config.max_enqueue_burst = 10_000_000
    config.max_string_length = 1_000_000
    config.default_max_batch_size = 10_000
    config.default_lock_time_seconds = 60
    return await pgqrs.connect_with(config)


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Create its schema and `tasks` messages, in batches of about 10 MB at most."""
    store = await connect(dsn)
    await pgqrs.admin(store).install()
    if workload == "chain5":
        await pgqrs.workflow().name("work").store(store).create()  # with its queue
    else:
        await store.queue("work")
    producer = await store.producer("work")
    size = SIZES.get(workload, 0)
    for numbers in batches(tasks, size, 5_000):
        await pgqrs.enqueue_batch(producer, [payload(number, size) for number in numbers])


def number(store: pgqrs.Store, message: QueueMessage) -> int:
    return int(message.payload["number"])


@pgqrs.decorators.workflow(name="work")
async def five_steps(run: pgqrs.Run, body: Any) -> None:
    for step in range(5):
        acquired = await run.acquire_step(f"step{step}")
        await acquired.guard.success(None)


async def chain(store: pgqrs.Store, message: QueueMessage) -> None:
    run = await pgqrs.run().message(message).store(store).execute()
    await five_steps.run(run, message.payload)


async def consume(dsn: str, work: Body) -> None:
    """Run one process until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    store = await connect(dsn)
    consumer = await store.consumer("work")
    is_workflow = work.__name__ == "chain5"
    while not stopped.is_set():
        messages = await consumer.dequeue(batch_size=RUNS if is_workflow else BATCH)
        if is_workflow:
            await asyncio.gather(*(work(store, message) for message in messages))
        else:
            for message in messages:
                await work(store, message)
        if messages:
            end = consumer.archive_many if is_workflow else consumer.delete_many  # a run refers to its message
            await end([message.id for message in messages])
        else:
            await asyncio.sleep(POLL)


async def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    store = await connect(dsn)
    producer = await store.producer("work")

    async def enqueue(number: int) -> None:
        await producer.enqueue({"number": number})

    return await pace(enqueue, count, per_second)
