"""The watchdog: detects silent workers, and workers over a task or memory limit.

Invariants: silence counts from the fork, and only while the supervisor itself runs: a suspended supervisor counts no
silence. A worker that waits for its database while it starts is not silent: its loop ticks. The supervisor asks a
worker for its stacks at most twice in one silence: at the warning, and at the stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil

from pgtask._supervisor.slot import SupervisedWorker
from pgtask._supervisor.states import STOP_MARGIN, Event, State
from pgtask.config import Config

__all__ = ["CHECK_INTERVAL", "Watchdog", "process_usage"]

CHECK_INTERVAL = 0.5  # seconds
MIN_WARNING = 5.0  # seconds of silence that cause no warning, unless half the limit is less
TWO_TICKS = 1.5  # seconds in which a healthy worker sends a message, on a busy machine too
MEASURE_INTERVAL = 1.0  # seconds
MIN_LIFETIME = 2.0  # seconds in which a worker is not replaced again, however small the limit
MEGABYTE = 2**20


class Watchdog:
    """The clock of the workers' silence, and their limits."""

    def __init__(self, config: Config) -> None:
        self._stall, self._grace = config.stall, config.grace
        self._warn = min(max(config.stall / 10, MIN_WARNING), max(config.stall / 2, TWO_TICKS))
        self._max_tasks, self._max_rss = config.max_tasks, config.max_rss
        self._checked: float | None = None
        self._passed = 0.0
        self._measured = float("-inf")

    @property
    def is_needed(self) -> bool:
        """The supervisor must wake up for the watchdog, since no message does it."""
        return self._stall > 0

    def is_due(self, now: float) -> bool:
        """Tell if it is time for a check, and count the time that has passed since the last one."""
        passed = 0.0 if self._checked is None else now - self._checked
        if self._checked is not None and passed < CHECK_INTERVAL / 2:
            return False
        self._checked = now
        self._passed = min(passed, 2 * CHECK_INTERVAL)
        return True

    def silent_workers(self, workers: Iterable[SupervisedWorker]) -> Iterator[tuple[SupervisedWorker, Event]]:
        """Yield the workers whose loop is silent. Call it once each time that `is_due`, after reading all messages."""
        if not self._stall:
            return
        for worker in workers:
            if worker.slot.state not in (State.STARTING, State.READY):
                continue
            worker.silence += self._passed
            # After its exit notice, at the end of a burst, a worker does what Python does at exit.
            is_leaving = worker.process is not None and worker.process.notice is not None
            allowance = self._grace + STOP_MARGIN if is_leaving else 0.0
            if worker.silence >= self._stall + allowance:
                yield worker, Event.STALLED
            elif worker.silence >= self._warn + allowance and not worker.dump_requested:
                worker.dump_requested = True
                yield worker, Event.SILENT

    def over_limit(
        self, workers: Iterable[SupervisedWorker], now: float
    ) -> Iterator[tuple[SupervisedWorker, str, dict[str, Any]]]:
        """Yield the workers over a limit, with the limit's name and the measure."""
        if not (self._max_tasks or self._max_rss) or now - self._measured < MEASURE_INTERVAL:
            return
        self._measured = now
        for worker in workers:
            since = worker.slot.ready_since
            if worker.slot.state is not State.READY or worker.process is None:
                continue
            if since is None or now - since < MIN_LIFETIME:
                continue
            tasks = worker.process.totals.settled
            if self._max_tasks and tasks >= self._max_tasks * (0.8 + 0.2 * worker.recycle_jitter):
                yield worker, "max-tasks", {"tasks": tasks}
            elif self._max_rss:
                rss = process_usage(worker.process.pid).get("rss_mb", 0.0)
                if rss > self._max_rss:
                    yield worker, "max-rss", {"rss_mb": rss}


def process_usage(pid: int) -> dict[str, float]:
    """Return a process's memory in megabytes of 2**20 bytes, and its share of one CPU since its start.

    {} for a process that is gone.
    """
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times, rss, created = process.cpu_times(), process.memory_info().rss, process.create_time()
    except psutil.Error:
        return {}
    age = max(time.time() - created, 0.01)
    return {
        "cpu_percent": round(100 * (times.user + times.system) / age, 1),
        "rss_mb": round(rss / MEGABYTE, 1),
    }
