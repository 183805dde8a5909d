"""What the Python peers share: a fleet of forked processes that is drained or timed, around what each of them defines.

    fleet.py .../peer.py fill DSN TASKS WORKLOAD | drain DSN TASKS PROCS WORKLOAD | latency DSN PROCS RATE SECONDS

A `peer.py` defines `fill(dsn, tasks, workload)`, `consume(dsn, work)` (one process, until SIGTERM), `handler(workload,
done, index)` and `probe(starts)` (what a task does), and `produce(dsn, count, per_second)` (times of each enqueue).
Those that are `async` run on uvloop. This runs in the environment of the peer, which has nothing of ours.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import inspect
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

WARM_UP = 10
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

fork = multiprocessing.get_context("fork")


def body(size: int) -> str:
    """`size` bytes that do not compress."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


def payload(number: int, size: int) -> dict[str, Any]:
    """The number, and `size` bytes."""
    return {"number": number} | ({"body": body(size)} if size else {})


async def pace(enqueue: Callable[[int], Awaitable[object]], count: int, per_second: float) -> list[tuple[float, float]]:
    """Call `enqueue` at fixed times; when each call began and ended."""
    calls = [(0.0, 0.0)] * count

    async def timed(number: int) -> None:
        began = time.time()
        await enqueue(number)
        calls[number] = (began, time.time())

    first = time.time()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            await asyncio.sleep(max(0, first + number / per_second - time.time()))
            group.create_task(timed(number))
    return calls


def run(result: Any) -> Any:
    """What a function of a peer returns, whether it is `async` or not."""
    if not inspect.iscoroutine(result):
        return result
    import uvloop

    return uvloop.run(result)


def start(peer: Any, dsn: str, works: list[Any]) -> list[Any]:
    """One worker process for each of `works`."""
    fleet = [fork.Process(target=lambda work: run(peer.consume(dsn, work)), args=(work,)) for work in works]
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


def drain(peer: Any, dsn: str, tasks: int, procs: int, workload: str) -> None:
    """Run `procs` workers until `tasks` tasks are done."""
    done = fork.RawArray("q", procs)
    fleet = start(peer, dsn, [peer.handler(workload, done, index) for index in range(procs)])
    while sum(done) < tasks and all(process.is_alive() for process in fleet):
        time.sleep(0.005)
    stop(fleet)


def latency(peer: Any, dsn: str, procs: int, per_second: float, seconds: float) -> None:
    """Enqueue one by one at fixed times and see when each starts."""
    installed = fork.Process(target=lambda: run(peer.fill(dsn, 0, "noop")))  # threads do not survive a fork
    installed.start()
    installed.join()
    count = WARM_UP + int(per_second * seconds)
    starts = fork.RawArray("d", count)
    fleet = start(peer, dsn, [peer.probe(starts)] * procs)
    time.sleep(2)
    calls = run(peer.produce(dsn, count, per_second))
    time.sleep(1)
    stop(fleet)
    report(starts, calls)


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


def load(path: str) -> Any:
    """The `peer.py` as a module, which imports this one as `fleet`."""
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    sys.modules["peer"], sys.modules["fleet"] = peer, sys.modules["__main__"]
    spec.loader.exec_module(peer)
    return peer


def main() -> None:
    match sys.argv[1:]:
        case [path, "fill", dsn, tasks, workload]:
            run(load(path).fill(dsn, int(tasks), workload))
        case [path, "drain", dsn, tasks, procs, workload]:
            drain(load(path), dsn, int(tasks), int(procs), workload)
        case [path, "latency", dsn, procs, per_second, seconds]:
            latency(load(path), dsn, int(procs), float(per_second), float(seconds))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
