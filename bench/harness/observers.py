"""Observers of a burst: they read the events of its supervisor, and may kill or reload its workers."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from typing import IO, Any, TypeAlias

from bench.harness.contender import RunFailed

__all__ = ["Observer", "RandomKills", "Reloads", "SingleKill", "TimeSpan"]

TimeSpan: TypeAlias = tuple[float, float]
"""Begin and end, in seconds since the epoch."""


class Observer:
    """Reader of the supervisor's events. It leaves the workers alone. `pid` is the supervisor's."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        self.pid = 0

    def count_events(self, event: str) -> int:
        return sum(1 for _, name, _ in self.events if name == event)

    def event_times(self, event: str) -> list[float]:
        return [at for at, name, _ in self.events if name == event]

    def read_log(self, lines: IO[bytes]) -> None:
        for line in lines:
            if line.startswith(b"{"):
                entry = json.loads(line)
                self.add_event(time.time(), entry["event"], entry.get("fields") or {})

    def add_event(self, at: float, event: str, fields: dict[str, Any]) -> None:
        self.events.append((at, event, fields))

    def intervene(self, finished: float) -> None:
        """Act on the workers, when about `finished` tasks are finished."""


class RandomKills(Observer):
    """SIGKILL for a random ready worker, at random shares of the work."""

    def __init__(self, tasks: int, kills: int, *, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._due = sorted(self._random.uniform(0.02, 0.95) * tasks for _ in range(kills))
        self._ready: dict[int, int] = {}  # by process: the number of the worker
        self._killed: dict[int, tuple[float, int]] = {}

    def add_event(self, at: float, event: str, fields: dict[str, Any]) -> None:
        super().add_event(at, event, fields)
        if event == "worker.ready":
            self._ready[fields["pid"]] = fields["worker"]
        elif event in ("worker.died", "worker.exited"):
            self._ready.pop(fields["pid"], None)

    def intervene(self, finished: float) -> None:
        ready = sorted(self._ready.keys() - self._killed.keys())
        if ready and self._due and finished >= self._due[0]:
            pid = self._random.choice(ready)
            self._killed[pid] = time.time(), self._ready[pid]
            os.kill(pid, signal.SIGKILL)
            del self._due[0]

    def spans(self) -> tuple[list[TimeSpan], list[TimeSpan]]:
        """Return the spans from each kill to the release of the leases, and to the readiness of the next worker."""
        releases, restarts = [], []
        released = {fields["pid"]: at for at, event, fields in self.events if event == "leases.released"}
        ready = [(at, fields["worker"]) for at, event, fields in self.events if event == "worker.ready"]
        for pid, (killed, number) in self._killed.items():
            if pid not in released:
                raise RunFailed(f"the supervisor did not release the leases of worker {pid}")
            releases.append((killed, released[pid]))
            restarts.append(
                (killed, min((at for at, worker in ready if worker == number and at > killed), default=1e12))
            )
        return releases, restarts


class SingleKill(Observer):
    """SIGKILL for one worker, some seconds after all of them are ready."""

    def __init__(self, procs: int, seconds: float) -> None:
        super().__init__()
        self._procs, self._seconds = procs, seconds
        self._has_killed = False

    def intervene(self, finished: float) -> None:
        ready = [(at, fields["pid"]) for at, event, fields in self.events if event == "worker.ready"]
        if not self._has_killed and len(ready) == self._procs and time.time() >= ready[-1][0] + self._seconds:
            self._has_killed = True
            os.kill(ready[-1][1], signal.SIGKILL)


class Reloads(Observer):
    """SIGHUP, and the next one as soon as all workers are replaced, until most of the work is done."""

    def __init__(self, tasks: int, procs: int) -> None:
        super().__init__()
        self._tasks, self._procs = tasks, procs
        self._sent = 0

    def intervene(self, finished: float) -> None:
        if 0.1 < finished / self._tasks < 0.8 and self.count_events("reload.done") == self._sent:
            self._sent += 1
            os.kill(self.pid, signal.SIGHUP)

    @property
    def spans(self) -> list[TimeSpan]:
        return list(zip(self.event_times("reload.started"), self.event_times("reload.done"), strict=False))

    @property
    def min_ready(self) -> int:
        """Return the minimum of ready workers."""
        ready, minimum = 0, self._procs
        for _, event, _ in self.events:
            if event == "worker.ready":
                ready += 1
            elif event in ("worker.replaced", "worker.died"):
                ready -= 1
                minimum = min(minimum, ready)
        return minimum
