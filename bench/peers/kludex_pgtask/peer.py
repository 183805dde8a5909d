"""Kludex's pgtask under the bench: fill its queue, drain it with N processes, measure its latency.

Not this project: the package `pgtask` of the index, in an environment of its own. Settings: its own comparison has 25
tasks at once in a process, and its page on scaling names that number as what to raise for more throughput; of those
tried (25-1,000) 400 was the best.
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

import uvloop

from pgtask import Client, EnqueueRequest, Task, TaskRegistry, Worker

CONCURRENCY = 400
POOL = 20
WARM_UP = 10
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

Handler = Callable[[Task, Any], Awaitable[None]]

fork = multiprocessing.get_context("fork")


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


def payload(number: int, size: int) -> dict[str, Any]:
    """The number, and `size` bytes that do not compress."""
    body = {"body": base64.b64encode(os.urandom(size * 3 // 4)).decode()} if size else {}
    return {"number": number} | body


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
    installed = fork.Process(target=lambda: uvloop.run(fill(dsn, 0, "noop")))  # its threads do not survive a fork
    installed.start()
    installed.join()
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
    client = await Client.connect(dsn)
    calls = [(0.0, 0.0)] * count

    async def enqueue(number: int) -> None:
        began = time.time()
        await client.enqueue(request({"number": number}))
        calls[number] = (began, time.time())

    first = time.time()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            await asyncio.sleep(max(0, first + number / per_second - time.time()))
            group.create_task(enqueue(number))
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
