"""DBOS under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: a queue with a `worker_concurrency`, which its tutorial on queues advises for more than one process and which
is also the most that it claims at once; a shorter poll and a larger pool than the defaults, for throughput; workflows
are asynchronous, and run on its own event loop. Of the limits tried (100-1,000) 500 was the best.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import signal
import sys
import time
from asyncio import sleep
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSClient, DBOSConfig

CONCURRENCY = 500
POLL = 0.02
POOL = 50
WARM_UP = 10
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

Handler = Callable[[int, str], Awaitable[None]]

fork = multiprocessing.get_context("fork")


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
                client.enqueue_in_transaction(connection, options, number, payload(size))


def payload(size: int) -> str:
    """`size` bytes that do not compress."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


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


def start(dsn: str, works: list[Handler]) -> list[Any]:
    """One worker process for each of `works`."""
    fleet = [fork.Process(target=consume, args=(dsn, work)) for work in works]
    for process in fleet:
        process.start()
    return fleet


def stop(fleet: list[Any]) -> None:
    """Let all workers finish what they hold, and leave."""
    for process in fleet:
        process.terminate()
    for process in fleet:
        process.join()
    if any(process.exitcode for process in fleet):
        sys.exit(f"workers ended with {[process.exitcode for process in fleet]}")


def drain(dsn: str, tasks: int, procs: int, workload: str) -> None:
    """Run `procs` workers until `tasks` workflows are done."""
    done = fork.RawArray("q", procs)
    fleet = start(dsn, [handler(workload, done, index) for index in range(procs)])
    while sum(done) < tasks and all(process.is_alive() for process in fleet):
        time.sleep(0.005)
    stop(fleet)


def latency(dsn: str, procs: int, per_second: float, seconds: float) -> None:
    """Enqueue one by one at fixed times and see when each starts."""
    installed = fork.Process(target=fill, args=(dsn, 0, "noop"))  # its threads do not survive a fork
    installed.start()
    installed.join()
    count = WARM_UP + int(per_second * seconds)
    starts = fork.RawArray("d", count)
    fleet = start(dsn, [probe(starts)] * procs)
    time.sleep(2)
    calls = produce(dsn, count, per_second)
    time.sleep(1)
    stop(fleet)
    report(starts, calls)


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


def report(starts: Any, calls: list[tuple[float, float]]) -> None:
    """One line of JSON, in milliseconds, without the first few, which find everything cold."""
    pairs = list(zip(starts, calls, strict=True))[WARM_UP:]
    waits = sorted((begun - began) * 1e3 for begun, (began, _) in pairs if begun)
    takes = sorted((ended - began) * 1e3 for _, (began, ended) in pairs)
    numbers = {
        "start_p50": waits[len(waits) // 2],
        "start_p99": waits[len(waits) * 99 // 100],
        "enqueue_p50": takes[len(takes) // 2],
        "enqueue_p99": takes[len(takes) * 99 // 100],
        "samples": len(waits),
    }
    print(json.dumps(numbers))


def main() -> None:
    match sys.argv[1:]:
        case ["fill", dsn, tasks, workload]:
            fill(dsn, int(tasks), workload)
        case ["drain", dsn, tasks, procs, workload]:
            drain(dsn, int(tasks), int(procs), workload)
        case ["latency", dsn, procs, per_second, seconds]:
            latency(dsn, int(procs), float(per_second), float(seconds))
        case _:
            sys.exit(
                f"{__doc__}\nfill DSN TASKS WORKLOAD | drain DSN TASKS PROCS WORKLOAD | latency DSN PROCS RATE SECONDS"
            )


if __name__ == "__main__":
    main()
