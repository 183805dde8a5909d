"""A supervisor as it is seen at one moment, here or on another host: its counters, and the usage of its workers."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec
import psutil

from pgtask._observe.pages import Snapshot

__all__ = ["FLEET_PATH", "HERE", "FleetsSample", "SeenFleet", "Usage", "UsageReader"]

HERE = "here"
FLEET_PATH = "/fleet"
"""The page of an exporter with a `SeenFleet` in JSON."""


class Usage(msgspec.Struct, frozen=True):
    """The seconds of CPU that a process has used, and the bytes of memory that it holds."""

    cpu: float
    rss: int


class SeenFleet(msgspec.Struct, frozen=True, kw_only=True):
    """A supervisor with its workers, read when `clock` was the time of its host (monotonic seconds). `usage` is that of
    its workers, by pid."""

    snapshot: Snapshot
    clock: float
    usage: dict[int, Usage] = {}
    host: str = HERE

    @property
    def key(self) -> tuple[str, int, float]:
        """Tell it from every other supervisor, and from an earlier one with its pid."""
        return self.host, self.snapshot.pid, self.snapshot.started


class FleetsSample(msgspec.Struct, frozen=True):
    """The supervisors at a time in monotonic seconds of this host. `silent`: why others have not answered."""

    seen_at: float
    fleets: tuple[SeenFleet, ...] = ()
    silent: tuple[str, ...] = ()


class UsageReader:
    """Reads what the system knows of the workers of supervisors on this host."""

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}

    def see(self, snapshots: Iterable[Snapshot]) -> tuple[SeenFleet, ...]:
        """Return the supervisors with the usage of their workers now."""
        found = list(snapshots)
        pids = [worker.pid for one in found for worker in one.workers]
        self._processes = {pid: process for pid in pids if (process := self._process(pid)) is not None}
        return tuple(self._see(one) for one in found)

    def _see(self, snapshot: Snapshot) -> SeenFleet:
        known = {one.pid: self._processes.get(one.pid) for one in snapshot.workers}
        usage = {pid: _usage(process) for pid, process in known.items() if process is not None}
        return SeenFleet(
            snapshot=snapshot,
            clock=time.monotonic(),
            usage={pid: found for pid, found in usage.items() if found is not None},
        )

    def _process(self, pid: int) -> psutil.Process | None:
        try:
            return self._processes.get(pid) or psutil.Process(pid)
        except psutil.Error:
            return None


def _usage(process: psutil.Process) -> Usage | None:
    try:
        with process.oneshot():
            times = process.cpu_times()
            return Usage(times.user + times.system, process.memory_info().rss)
    except psutil.Error:
        return None
