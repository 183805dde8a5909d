"""Looks after workers between their messages: is the loop of each alive, and has any done or taken enough.

Invariants: silence counts from the fork, and only while we could have heard it: time in which the supervisor itself
did not run is nobody's silence. A worker that waits for its database while it starts is not silent: its loop ticks.
A worker is asked for its stacks at most twice in one silence: when it is noticed, and when it is ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil

from pgtask._supervisor.progress import ended
from pgtask._supervisor.states import Event, State
from pgtask._supervisor.worker import Worker
from pgtask.config import Config

__all__ = ["LOOK_EVERY", "Watch", "usage"]

LOOK_EVERY = 0.5
WARN_FIRST = 5.0  # seconds of silence that are never worth a warning, unless half the limit is less
TWO_TICKS = 1.5  # seconds in which a worker that is well is heard of, on a busy machine too
WEIGH_EVERY = 1.0
YOUNG = 2.0  # seconds in which a worker is not replaced again, however small the limit
MEGABYTE = 2**20


class Watch:
    def __init__(self, config: Config) -> None:
        self._stall = config.stall
        self._warn = min(max(config.stall / 10, WARN_FIRST), max(config.stall / 2, TWO_TICKS))
        self._max_tasks, self._max_rss = config.max_tasks, config.max_rss
        self._looked: float | None = None
        self._passed = 0.0
        self._weighed = float("-inf")

    @property
    def is_needed(self) -> bool:
        """Whether there is something that no message will bring up."""
        return self._stall > 0

    def is_time(self, now: float) -> bool:
        """Whether to look now; counts the time that has passed."""
        passed = 0.0 if self._looked is None else now - self._looked
        if self._looked is not None and passed < LOOK_EVERY / 2:
            return False
        self._looked = now
        self._passed = min(passed, 2 * LOOK_EVERY)
        return True

    def silent(self, workers: Iterable[Worker]) -> Iterator[tuple[Worker, Event]]:
        """Whose loop is silent; to be called once each time that `is_time`, after what has come was read."""
        if not self._stall:
            return
        for worker in workers:
            if worker.slot.state not in (State.STARTING, State.READY):
                continue
            worker.silence += self._passed
            if worker.silence >= self._stall:
                yield worker, Event.STALLED
            elif worker.silence >= self._warn and not worker.asked:
                worker.asked = True
                yield worker, Event.SILENT

    def worn(self, workers: Iterable[Worker], now: float) -> Iterator[tuple[Worker, str, dict[str, Any]]]:
        """Who is over a limit, over which, and by what measure."""
        if not (self._max_tasks or self._max_rss) or now - self._weighed < WEIGH_EVERY:
            return
        self._weighed = now
        for worker in workers:
            since = worker.slot.ready_since
            if worker.slot.state is not State.READY or worker.process is None or since is None or now - since < YOUNG:
                continue
            tasks = ended(worker.process.totals)
            if self._max_tasks and tasks >= self._max_tasks * (0.8 + 0.2 * worker.luck):
                yield worker, "max-tasks", {"tasks": tasks}
            elif self._max_rss:
                rss = usage(worker.process.pid).get("rss_mb", 0.0)
                if rss > self._max_rss:
                    yield worker, "max-rss", {"rss_mb": rss}


def usage(pid: int) -> dict[str, float]:
    """Memory in megabytes of 2**20 bytes, and the share of one CPU over its life; {} for a process that is gone."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times, rss, created = process.cpu_times(), process.memory_info().rss, process.create_time()
    except psutil.Error:
        return {}
    lived = max(time.time() - created, 0.01)
    return {
        "cpu_percent": round(100 * (times.user + times.system) / lived, 1),
        "rss_mb": round(rss / MEGABYTE, 1),
    }
