"""Dramatiq under the bench, on a Redis of its own: fill its queue, drain it with N processes, measure its latency.

Settings: 8 threads in each process, the default of its command line and what its guide has; a longer prefetch, which
its guide to advanced topics names for short messages; an idle queue is looked at every 0.1 s instead of every second.
The Redis writes nothing to disk, which is what most run Dramatiq with: what it has accepted is lost with it. It is
started by `fill` and ended by `drain`; the DSN only names it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

os.environ.update(dramatiq_queue_prefetch="1000", dramatiq_worker_timeout="100")  # read when it is imported

import dramatiq
from dramatiq.brokers.redis import RedisBroker

THREADS = 8
WARM_UP = 10
SIZES = {"payload1k": 1_000, "payload100k": 100_000}

Handler = Callable[[int, str], None]

fork = multiprocessing.get_context("fork")


def directory(dsn: str) -> Path:
    """Where the Redis of this database lives."""
    return Path(tempfile.gettempdir(), f"bench-dramatiq-{hashlib.sha256(dsn.encode()).hexdigest()[:12]}")


def connect(dsn: str) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(directory(dsn) / "socket"))


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


def declare(dsn: str, work: Handler) -> dramatiq.Actor[..., Any]:
    """The broker of this process, and its one actor."""
    dramatiq.set_broker(RedisBroker(client=connect(dsn)))
    return dramatiq.actor(work, actor_name="work", queue_name="work")


def fill(dsn: str, tasks: int, workload: str) -> None:
    """Its Redis and `tasks` messages; it enqueues one at a time."""
    begin_redis(dsn)
    actor = declare(dsn, lambda number, body: None)
    size = SIZES.get(workload, 0)
    for number in range(tasks):
        actor.send(number, payload(size))


def payload(size: int) -> str:
    """`size` bytes that do not compress."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


def handler(workload: str, done: Any, index: int) -> Handler:
    """What a message does; the count of each process has its own slot, shared by its threads."""
    lock = threading.Lock()

    def count() -> None:
        with lock:
            done[index] += 1

    def noop(number: int, body: str) -> None:
        count()

    def sleep0(number: int, body: str) -> None:
        time.sleep(0)
        count()

    def cpu1ms(number: int, body: str) -> None:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        count()

    return {"sleep0": sleep0, "cpu1ms": cpu1ms}.get(workload, noop)


def probe(starts: Any) -> Handler:
    """Notes when a message started."""

    def note(number: int, body: str) -> None:
        starts[number] = time.time()

    return note


def consume(dsn: str, work: Handler) -> None:
    """One process, until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    actor = declare(dsn, work)
    worker = dramatiq.Worker(actor.broker, worker_threads=THREADS)
    worker.start()
    signal.sigwait({signal.SIGTERM})
    worker.stop()


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
    """Run `procs` workers until `tasks` messages are done."""
    done = fork.RawArray("q", procs)
    try:
        fleet = start(dsn, [handler(workload, done, index) for index in range(procs)])
        while sum(done) < tasks and all(process.is_alive() for process in fleet):
            time.sleep(0.005)
        stop(fleet)
    finally:
        end_redis(dsn)


def latency(dsn: str, procs: int, per_second: float, seconds: float) -> None:
    """Enqueue one by one at fixed times and see when each starts."""
    fill(dsn, 0, "noop")
    try:
        count = WARM_UP + int(per_second * seconds)
        starts = fork.RawArray("d", count)
        fleet = start(dsn, [probe(starts)] * procs)
        time.sleep(2)
        calls = produce(dsn, count, per_second)
        time.sleep(1)
        stop(fleet)
        report(starts, calls)
    finally:
        end_redis(dsn)


def produce(dsn: str, count: int, per_second: float) -> list[tuple[float, float]]:
    """When each call of enqueue began and ended."""
    actor = declare(dsn, lambda number, body: None)
    calls = [(0.0, 0.0)] * count

    def enqueue(number: int) -> None:
        began = time.time()
        actor.send(number, "")
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
