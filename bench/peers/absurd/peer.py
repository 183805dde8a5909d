"""Absurd under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: a concurrency above 1, which is the knob that its page on the Python SDK has; a partitioned queue as its page
on storage advises for much traffic. A worker waits for all tasks of a claim before the next one, and has
one connection, so each process runs several. Of the pairs tried (1-16 workers, concurrency 10-200) 8 x 50 was the best.
"""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import absurdctl
import psycopg
import uvloop
from absurd_sdk import AsyncAbsurd, AsyncTaskContext

WORKERS = 8
CONCURRENCY = 50
WARM_UP = 10
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

Handler = Callable[[Any, AsyncTaskContext], Awaitable[None]]

fork = multiprocessing.get_context("fork")


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


def payload(number: int, size: int) -> dict[str, Any]:
    """The number, and `size` bytes that do not compress."""
    body = {"body": base64.b64encode(os.urandom(size * 3 // 4)).decode()} if size else {}
    return {"number": number} | body


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


def start(dsn: str, works: list[Handler]) -> list[Any]:
    """One worker process for each of `works`."""

    def run(work: Handler) -> None:
        uvloop.run(consume(dsn, work))

    fleet = [fork.Process(target=run, args=(work,)) for work in works]
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
    """Run `procs` workers until `tasks` tasks are done."""
    done = fork.RawArray("q", procs)
    fleet = start(dsn, [handler(workload, done, index) for index in range(procs)])
    while sum(done) < tasks and all(process.is_alive() for process in fleet):
        time.sleep(0.005)
    stop(fleet)


def latency(dsn: str, procs: int, per_second: float, seconds: float) -> None:
    """Enqueue one by one at fixed times and see when each starts."""
    uvloop.run(fill(dsn, 0, "noop"))
    count = WARM_UP + int(per_second * seconds)
    starts = fork.RawArray("d", count)
    fleet = start(dsn, [probe(starts)] * procs)
    time.sleep(2)
    calls = uvloop.run(produce(dsn, count, per_second))
    time.sleep(1)
    stop(fleet)
    report(starts, calls)


async def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    clients = [AsyncAbsurd(dsn, queue_name="work") for _ in range(WORKERS)]  # a connection each
    for client in clients:
        await client.list_queues()
    calls = [(0.0, 0.0)] * count

    async def enqueue(number: int) -> None:
        began = time.time()
        await clients[number % WORKERS].spawn("work", {"number": number}, queue="work")
        calls[number] = (began, time.time())

    first = time.time()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            await asyncio.sleep(max(0, first + number / per_second - time.time()))
            group.create_task(enqueue(number))
    for client in clients:
        await client.close()
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
            uvloop.run(fill(dsn, int(tasks), workload))
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
