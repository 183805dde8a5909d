"""DBOS under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: a queue with a `worker_concurrency`, which its tutorial on queues advises for more than one process and which
is also the most that it claims at once; a shorter poll and a larger pool than the defaults, for throughput; workflows
are asynchronous, and run on its own event loop. Of the limits tried (100-1,000) 500 was the best.
"""

from __future__ import annotations

import os
import signal
import time
from asyncio import sleep
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSClient, DBOSConfig
from fleet import SIZES, body

CONCURRENCY = 500
POLL = 0.02
POOL = 50

Handler = Callable[[int, str], Awaitable[None]]


def launch(dsn: str, work: Handler, executor: str) -> None:
    """Start it in this process; the first time it makes its schema."""
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": dsn,
        "sys_db_pool_size": POOL,
        "application_version": "1",
        "executor_id": executor,
        "log_level": "ERROR",
    }
    DBOS(config=config)
    DBOS.workflow(name="work")(work)
    DBOS.launch()
    DBOS.register_queue("work", worker_concurrency=CONCURRENCY, polling_interval_sec=POLL)


def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its schema and `tasks` workflows, of which many are enqueued in a transaction."""

    async def never(number: int, body: str) -> None:
        pass

    launch(dsn, never, "fill")
    DBOS.destroy()
    client = DBOSClient(system_database_url=dsn)
    engine = sqlalchemy.create_engine(dsn.replace("postgresql:", "postgresql+psycopg:", 1))
    size = SIZES.get(workload, 0)
    for begin in range(0, tasks, 500):
        with engine.begin() as connection:
            for number in range(begin, min(begin + 500, tasks)):
                options: Any = {"queue_name": "work", "workflow_name": "work", "app_version": "1"}
                client.enqueue_in_transaction(connection, options, number, body(size))


def handler(workload: str, done: Any, index: int) -> Handler:
    """What a workflow does; the count of each process has its own slot, so no lock is needed."""

    async def noop(number: int, body: str) -> None:
        done[index] += 1

    async def sleep0(number: int, body: str) -> None:
        await sleep(0)
        done[index] += 1

    async def cpu1ms(number: int, body: str) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[index] += 1

    async def nothing() -> None:
        pass

    async def chain5(number: int, body: str) -> None:
        for step in range(5):
            await DBOS.run_step_async({"name": f"step{step}"}, nothing)
        done[index] += 1

    return {"chain5": chain5, "sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Handler:
    """Notes when a workflow started."""

    async def note(number: int, body: str) -> None:
        starts[number] = time.time()

    return note


def consume(dsn: str, work: Handler) -> None:
    """One process, until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    launch(dsn, work, f"worker-{os.getpid()}")
    signal.sigwait({signal.SIGTERM})
    DBOS.destroy(workflow_completion_timeout_sec=10)


def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    client = DBOSClient(system_database_url=dsn)
    calls = [(0.0, 0.0)] * count

    def enqueue(number: int) -> None:
        began = time.time()
        client.enqueue({"queue_name": "work", "workflow_name": "work", "app_version": "1"}, number, "")
        calls[number] = (began, time.time())

    first = time.time()
    with ThreadPoolExecutor(16) as threads:
        for number in range(count):
            time.sleep(max(0, first + number / per_second - time.time()))
            threads.submit(enqueue, number)
    client.destroy()
    return calls
