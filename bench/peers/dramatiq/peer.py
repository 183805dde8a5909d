"""Dramatiq under the bench, on a Redis of its own: fill its queue, drain it with N processes, measure its latency.

Settings: 8 threads in each process, the default of its command line and what its guide has; a longer prefetch, which
its guide to advanced topics names for short messages; an idle queue is polled every 0.1 s instead of every second.
The Redis writes nothing to disk, as most installations of Dramatiq have it, so its messages are lost with it. `fill`
starts the Redis and `drain` ends it; the DSN only names it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import redis

os.environ.update(
    dramatiq_queue_prefetch="1000", dramatiq_worker_timeout="100"
)  # dramatiq reads them when it is imported

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from fleet import SIZES, Body, Calls, body, pace_threads
from redis_server import begin_redis, end_redis, socket_path

THREADS = 8


def declare(dsn: str, work: Body) -> dramatiq.Actor[..., Any]:
    """Set the broker of this process, and return its one actor."""
    dramatiq.set_broker(RedisBroker(client=redis.Redis(unix_socket_path=str(socket_path(dsn)))))
    return dramatiq.actor(work, actor_name="work", queue_name="work")


def fill(dsn: str, tasks: int, workload: str) -> None:
    """Start its Redis and enqueue `tasks` messages, one at a time, as it has no other way."""
    begin_redis(dsn)
    actor = declare(dsn, lambda number, body: None)
    size = SIZES.get(workload, 0)
    for number in range(tasks):
        actor.send(number, body(size))


def number(task: int, body: str) -> int:
    return task


def counter(done: Any, index: int) -> Callable[[], None]:
    """Return a function that counts a message. Each process counts in a slot of its own, which its threads share."""
    lock = threading.Lock()

    def count() -> None:
        with lock:
            done[index] += 1

    return count


def consume(dsn: str, work: Body) -> None:
    """Run one process until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    actor = declare(dsn, work)
    worker = dramatiq.Worker(actor.broker, worker_threads=THREADS)
    worker.start()
    signal.sigwait({signal.SIGTERM})
    worker.stop()


def finish(dsn: str) -> None:
    end_redis(dsn)


def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    actor = declare(dsn, lambda number, body: None)
    return pace_threads(lambda number: actor.send(number, ""), count, per_second)
