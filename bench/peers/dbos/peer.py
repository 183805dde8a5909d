"""DBOS under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: a queue with a `worker_concurrency`, which its tutorial on queues advises for more than one process and which
is also the maximum of one claim; a shorter poll and a larger pool than the defaults, for throughput; workflows
are asynchronous, and run on its own event loop. Of the limits tried (100-1,000) 500 was the best.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSClient, DBOSConfig
from fleet import SIZES, Body, Calls, batches, body, nothing, pace_threads

CONCURRENCY = 500
POLL = 0.02
POOL = 50


def launch(dsn: str, work: Body, executor: str) -> None:
    """Launch DBOS in this process; the first launch creates its schema."""
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
    """Create its schema and `tasks` workflows, many in each transaction."""

    async def never(number: int, body: str) -> None:
        pass

    launch(dsn, never, "fill")
    DBOS.destroy()
    client = DBOSClient(system_database_url=dsn)
    engine = sqlalchemy.create_engine(dsn.replace("postgresql:", "postgresql+psycopg:", 1))
    size = SIZES.get(workload, 0)
    for numbers in batches(tasks, 0, 500):
        with engine.begin() as connection:
            for number in numbers:
                options: Any = {"queue_name": "work", "workflow_name": "work", "app_version": "1"}
                client.enqueue_in_transaction(connection, options, number, body(size))


def number(task: int, body: str) -> int:
    return task


async def chain(task: int, body: str) -> None:
    for step in range(5):
        await DBOS.run_step_async({"name": f"step{step}"}, nothing)


def consume(dsn: str, work: Body) -> None:
    """Run one process until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    launch(dsn, work, f"worker-{os.getpid()}")
    signal.sigwait({signal.SIGTERM})
    DBOS.destroy(workflow_completion_timeout_sec=10)


def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    client = DBOSClient(system_database_url=dsn)

    def enqueue(number: int) -> None:
        client.enqueue({"queue_name": "work", "workflow_name": "work", "app_version": "1"}, number, "")

    calls = pace_threads(enqueue, count, per_second)
    client.destroy()
    return calls
