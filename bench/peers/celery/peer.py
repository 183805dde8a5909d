"""Celery under the bench, on a Redis of its own: fill its queue, drain it with N processes, measure its latency.

Settings: prefork with as many children as processes are asked for, results ignored, and a prefetch of 128 a child, the
larger of the two that its guide to optimizing names for many short tasks; no gossip, mingle and heartbeat of workers.
The Redis writes nothing to disk, and tasks are acknowledged before they run, as is the default: what is in flight is
lost with a worker, and everything with the Redis. `fill` starts the Redis and `drain` ends it; the DSN only names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billiard import current_process
from celery import Celery
from fleet import SIZES, Body, Calls, body, fork, pace_threads
from redis_server import begin_redis, end_redis, socket_path

BOOT_SECONDS = 4


def make_app(dsn: str, work: Body) -> Celery:
    """Make an app with one task."""
    app = Celery("bench", broker=f"redis+socket://{socket_path(dsn)}")
    app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=128, worker_hijack_root_logger=False)
    app.task(name="work", shared=False)(work)
    return app


def nothing(number: int, body: str) -> None:
    """Stand in for the task in a producer."""


def fill(dsn: str, tasks: int, workload: str) -> None:
    """Start its Redis and enqueue `tasks` tasks, one at a time, as it has no other way."""
    begin_redis(dsn)
    app = make_app(dsn, nothing)
    size = SIZES.get(workload, 0)
    for number in range(tasks):
        app.tasks["work"].delay(number, body(size))


def number(task: int, body: str) -> int:
    return task


def counter(done: Any, index: int) -> Callable[[], None]:
    """Return a function that counts a task. Each child counts in a slot of its own, so it needs no lock."""

    def count() -> None:
        done[current_process().index] += 1

    return count


def start(dsn: str, works: list[Body]) -> list[Any]:
    """Start one worker, with a child for each of `works`, which are all alike."""
    options = [f"--concurrency={len(works)}", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    arguments = ["--quiet", "worker", "--pool=prefork", "--loglevel=ERROR", *options]
    parent = fork.Process(target=lambda: make_app(dsn, works[0]).worker_main(arguments))
    parent.start()
    return [parent]


def finish(dsn: str) -> None:
    end_redis(dsn)


def produce(dsn: str, count: int, per_second: float) -> Calls:
    """Return the begin and the end of each call of enqueue."""
    app = make_app(dsn, nothing)
    return pace_threads(lambda number: app.tasks["work"].delay(number, ""), count, per_second)
