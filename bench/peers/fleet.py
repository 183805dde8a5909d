"""Fleet of forked processes for the peers in Python: it drains or times what each `peer.py` defines.

    fleet.py .../peer.py fill DSN TASKS WORKLOAD | drain DSN TASKS PROCS WORKLOAD | latency DSN PROCS RATE SECONDS

A `peer.py` defines `fill(dsn, tasks, workload)`, `consume(dsn, work)` (one process, until SIGTERM), `produce(dsn,
count, per_second)` (times of each enqueue), and `number(task, more)` (the number of a task, from the one or two
arguments of its body). `async` functions run on uvloop. Optional parts: `chain(task, more)` runs five steps;
`counter(done, index)` makes the function that counts a task, and says that bodies are plain functions; `start(dsn,
works)` starts the processes, instead of `consume`; `BOOT_SECONDS` is the time until they are ready; `finish(dsn)` ends
what `fill` has started. This module runs in the environment of the peer, which has no package of ours.
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
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

WARM_UP = 10
BOOT_SECONDS = 2
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

Body: TypeAlias = Callable[..., Any]
Calls: TypeAlias = list[tuple[float, float]]

fork = multiprocessing.get_context("fork")


def body(size: int) -> str:
    """Return `size` bytes that do not compress."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


def payload(number: int, size: int) -> dict[str, Any]:
    """Return the payload of a task: its number, and `size` bytes."""
    return {"number": number} | ({"body": body(size)} if size else {})


def batches(tasks: int, size: int, max_tasks: int, max_bytes: int = 10_000_000) -> Iterator[range]:
    """Yield the numbers of all tasks, of which each has `size` bytes, in batches."""
    batch = min(max_tasks, max_bytes // max(size, 1))
    for begin in range(0, tasks, batch):
        yield range(begin, min(begin + batch, tasks))


# --- bodies of a task


def handler(peer: Any, workload: str, done: Any, index: int) -> Body:
    """Return the body of a task. Each process counts in a slot of its own, so it needs no lock."""
    if hasattr(peer, "counter"):
        return plain_handler(workload, peer.counter(done, index))

    async def noop(task: Any, more: Any = None) -> None:
        done[index] += 1

    async def sleep0(task: Any, more: Any = None) -> None:
        await asyncio.sleep(0)
        done[index] += 1

    async def cpu1ms(task: Any, more: Any = None) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[index] += 1

    async def chain5(task: Any, more: Any = None) -> None:
        await peer.chain(task, more)
        done[index] += 1

    return {"chain5": chain5, "sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def plain_handler(workload: str, count: Callable[[], None]) -> Body:
    """Return the body of a task that is a plain function."""

    def noop(task: Any, more: Any = None) -> None:
        count()

    def sleep0(task: Any, more: Any = None) -> None:
        time.sleep(0)
        count()

    def cpu1ms(task: Any, more: Any = None) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        count()

    return {"sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(peer: Any, starts: Any) -> Body:
    """Return the body of a task that notes its start."""

    async def note(task: Any, more: Any = None) -> None:
        starts[peer.number(task, more)] = time.time()

    def plain_note(task: Any, more: Any = None) -> None:
        starts[peer.number(task, more)] = time.time()

    return plain_note if hasattr(peer, "counter") else note


async def nothing() -> None:
    """Do the work of a step."""


# --- producers


async def pace(enqueue: Callable[[int], Awaitable[object]], count: int, per_second: float) -> Calls:
    """Call `enqueue` at fixed times; return the begin and the end of each call."""
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


def pace_threads(enqueue: Callable[[int], object], count: int, per_second: float) -> Calls:
    """Call `enqueue` in threads at fixed times; return the begin and the end of each call."""
    calls = [(0.0, 0.0)] * count

    def timed(number: int) -> None:
        began = time.time()
        enqueue(number)
        calls[number] = (began, time.time())

    first = time.time()
    with ThreadPoolExecutor(16) as threads:
        for number in range(count):
            time.sleep(max(0, first + number / per_second - time.time()))
            threads.submit(timed, number)
    return calls


# --- processes


def run(result: Any) -> Any:
    """Return the result of a function of a peer, which may be `async`."""
    if not inspect.iscoroutine(result):
        return result
    import uvloop

    return uvloop.run(result)


def start(peer: Any, dsn: str, works: list[Any]) -> list[Any]:
    """Start one worker process for each of `works`, or the processes of a peer that starts them itself."""
    if hasattr(peer, "start"):
        return list(peer.start(dsn, works))
    fleet = [fork.Process(target=lambda work: run(peer.consume(dsn, work)), args=(work,)) for work in works]
    for process in fleet:
        process.start()
    return fleet


def stop(fleet: list[Any]) -> None:
    """Let all workers finish their tasks and exit."""
    for process in fleet:
        process.terminate()
    for process in fleet:
        process.join()
    if any(process.exitcode for process in fleet):
        sys.exit(f"workers ended with {[process.exitcode for process in fleet]}")


def finish(peer: Any, dsn: str) -> None:
    """End what the peer has started beside its workers."""
    if hasattr(peer, "finish"):
        peer.finish(dsn)


# --- measurements


def drain(peer: Any, dsn: str, tasks: int, procs: int, workload: str) -> None:
    """Run `procs` workers until `tasks` tasks are done."""
    done = fork.RawArray("q", procs)
    try:
        fleet = start(peer, dsn, [handler(peer, workload, done, index) for index in range(procs)])
        while sum(done) < tasks and all(process.is_alive() for process in fleet):
            time.sleep(0.005)
        stop(fleet)
    finally:
        finish(peer, dsn)


def latency(peer: Any, dsn: str, procs: int, per_second: float, seconds: float) -> None:
    """Enqueue one by one at fixed times, and time the start of each."""
    installed = fork.Process(target=lambda: run(peer.fill(dsn, 0, "noop")))  # threads do not survive a fork
    installed.start()
    installed.join()
    try:
        count = WARM_UP + int(per_second * seconds)
        starts = fork.RawArray("d", count)
        fleet = start(peer, dsn, [probe(peer, starts)] * procs)
        time.sleep(getattr(peer, "BOOT_SECONDS", BOOT_SECONDS))
        calls = run(peer.produce(dsn, count, per_second))
        time.sleep(1)
        stop(fleet)
        report(starts, calls)
    finally:
        finish(peer, dsn)


def report(starts: Any, calls: Calls) -> None:
    """Print one line of JSON, in milliseconds, without the first samples, which are slow because all is cold."""
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
    """Import a `peer.py`, which imports this module as `fleet`."""
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
