"""oban for Python under the bench: fill its queue, drain it with N processes, measure its latency.

Settings: uvloop and psycopg's binary build, as its own command line uses; its guide to queues advises a limit by the
nature of the jobs: of those tried for short ones (50-1,000), 1,000 was the fastest. Acknowledgements are batched
by its producer, with the default debounce of 5 ms.
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
from oban import Oban, worker
from oban.job import Job
from oban.schema import install

LIMIT = 1_000
WARM_UP = 10
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

fork = multiprocessing.get_context("fork")


@worker(queue="work")
class Work:
    """A job; each worker process sets what it does."""

    run: Callable[[Job], Awaitable[None]]

    async def process(self, job: Job) -> None:
        await Work.run(job)


async def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its schema and `tasks` jobs, in batches of about 10 MB at most."""
    pool = await Oban.create_pool(dsn)
    await install(pool)
    oban = Oban(pool=pool)
    size = SIZES.get(workload, 0)
    batch = min(5_000, 10_000_000 // max(size, 1))
    for begin in range(0, tasks, batch):
        numbers = range(begin, min(begin + batch, tasks))
        await oban.enqueue_many([Work.new(payload(number, size)) for number in numbers])
    await pool.close()


def payload(number: int, size: int) -> dict[str, Any]:
    """The number, and `size` bytes that do not compress."""
    body = {"body": base64.b64encode(os.urandom(size * 3 // 4)).decode()} if size else {}
    return {"number": number} | body


def handler(workload: str, done: Any, index: int) -> Callable[[Job], Awaitable[None]]:
    """What a job does; the count of each process has its own slot, so no lock is needed."""

    async def noop(job: Job) -> None:
        done[index] += 1

    async def sleep0(job: Job) -> None:
        await asyncio.sleep(0)
        done[index] += 1

    async def cpu1ms(job: Job) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[index] += 1

    return {"sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Callable[[Job], Awaitable[None]]:
    """Notes when a job started."""

    async def note(job: Job) -> None:
        starts[int(job.args["number"])] = time.time()

    return note


async def consume(dsn: str, work: Callable[[Job], Awaitable[None]]) -> None:
    """One process, until SIGTERM."""
    Work.run = work
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    pool = await Oban.create_pool(dsn)
    async with Oban(pool=pool, queues={"work": LIMIT}):
        await stopped.wait()
    await pool.close()


def start(dsn: str, works: list[Callable[[Job], Awaitable[None]]]) -> list[Any]:
    """One worker process for each of `works`."""

    def run(work: Callable[[Job], Awaitable[None]]) -> None:
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
    """Run `procs` workers until `tasks` jobs are done."""
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
    pool = await Oban.create_pool(dsn)
    oban = Oban(pool=pool)
    calls = [(0.0, 0.0)] * count

    async def enqueue(number: int) -> None:
        began = time.time()
        await oban.enqueue(Work.new({"number": number}))
        calls[number] = (began, time.time())

    first = time.time()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            await asyncio.sleep(max(0, first + number / per_second - time.time()))
            group.create_task(enqueue(number))
    await pool.close()
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
