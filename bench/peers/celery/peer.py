"""Celery under the bench, on a Redis of its own: fill its queue, drain it with N processes, measure its latency.

Settings: prefork with as many children as processes are asked for, results ignored, and a prefetch of 128 a child, the
larger of the two that its guide to optimizing names for many short tasks; no gossip, mingle and heartbeat of workers.
The Redis writes nothing to disk, and tasks are acknowledged before they run, as is the default: what is in flight is
lost with a worker, all with the Redis. It is started by `fill` and ended by `drain`; the DSN only names it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from billiard import current_process
from celery import Celery

WARM_UP = 10
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

Handler = Callable[[int, str], None]

fork = multiprocessing.get_context("fork")


def directory(dsn: str) -> Path:
    """Where the Redis of this database lives."""
    return Path(tempfile.gettempdir(), f"bench-celery-{hashlib.sha256(dsn.encode()).hexdigest()[:12]}")


def begin_redis(dsn: str) -> None:
    """Start one; what a run that failed has left is ended first."""
    end_redis(dsn)
    where = directory(dsn)
    where.mkdir()
    memory_only = ["--save", "", "--appendonly", "no"]
    unix_socket = ["--port", "0", "--unixsocket", str(where / "socket"), "--dir", str(where)]
    subprocess.run(
        ["redis-server", *unix_socket, *memory_only, "--daemonize", "yes"], check=True, stdout=subprocess.DEVNULL
    )
    while not connected(dsn):
        time.sleep(0.01)


def end_redis(dsn: str) -> None:
    connected(dsn, b"SHUTDOWN NOSAVE\r\n")
    shutil.rmtree(directory(dsn), ignore_errors=True)


def connected(dsn: str, order: bytes = b"PING\r\n") -> bool:
    """Whether it answers; after the order to shut down the answer is the end of the connection."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(directory(dsn) / "socket"))
        connection.sendall(order)
        connection.recv(16)
        return True
    return False


def make_app(dsn: str, work: Handler) -> Celery:
    """An app with one task."""
    app = Celery("bench", broker=f"redis+socket://{directory(dsn) / 'socket'}")
    app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=128, worker_hijack_root_logger=False)
    app.task(name="work", shared=False)(work)
    return app


def nothing(number: int, body: str) -> None:
    """What a producer declares in place of the task."""


def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its Redis and `tasks` tasks; it enqueues one at a time."""
    begin_redis(dsn)
    app = make_app(dsn, nothing)
    size = SIZES.get(workload, 0)
    for number in range(tasks):
        app.tasks["work"].delay(number, payload(size))


def payload(size: int) -> str:
    """`size` bytes that do not compress."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


def handler(workload: str, done: Any) -> Handler:
    """What a task does; the count of each child has its own slot, so no lock is needed."""

    def noop(number: int, body: str) -> None:
        done[current_process().index] += 1

    def sleep0(number: int, body: str) -> None:
        time.sleep(0)
        done[current_process().index] += 1

    def cpu1ms(number: int, body: str) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        done[current_process().index] += 1

    return {"sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Handler:
    """Notes when a task started."""

    def note(number: int, body: str) -> None:
        starts[number] = time.time()

    return note


def start(dsn: str, procs: int, work: Handler) -> Any:
    """A worker with `procs` children."""
    options = [f"--concurrency={procs}", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    arguments = ["--quiet", "worker", "--pool=prefork", "--loglevel=ERROR", *options]
    parent = fork.Process(target=lambda: make_app(dsn, work).worker_main(arguments))
    parent.start()
    return parent


def stop(parent: Any) -> None:
    """Let it finish what it holds, and leave."""
    parent.terminate()
    parent.join()
    if parent.exitcode:
        sys.exit(f"the worker ended with {parent.exitcode}")


def drain(dsn: str, tasks: int, procs: int, workload: str) -> None:
    """Run `procs` children until `tasks` tasks are done."""
    done = fork.RawArray("q", procs)
    try:
        parent = start(dsn, procs, handler(workload, done))
        while sum(done) < tasks and parent.is_alive():
            time.sleep(0.005)
        stop(parent)
    finally:
        end_redis(dsn)


def latency(dsn: str, procs: int, per_second: float, seconds: float) -> None:
    """Enqueue one by one at fixed times and see when each starts."""
    fill(dsn, 0, "noop")
    try:
        count = WARM_UP + int(per_second * seconds)
        starts = fork.RawArray("d", count)
        parent = start(dsn, procs, probe(starts))
        time.sleep(4)
        calls = produce(dsn, count, per_second)
        time.sleep(1)
        stop(parent)
        report(starts, calls)
    finally:
        end_redis(dsn)


def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    app = make_app(dsn, nothing)
    calls = [(0.0, 0.0)] * count

    def enqueue(number: int) -> None:
        began = time.time()
        app.tasks["work"].delay(number, "")
        calls[number] = (began, time.time())

    first = time.time()
    with ThreadPoolExecutor(16) as threads:
        for number in range(count):
            time.sleep(max(0, first + number / per_second - time.time()))
            threads.submit(enqueue, number)
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
