"""The supervisors of this user on this host that count (`--metrics`), and what the system knows of their workers.

Invariant: their programs are asked nothing; what is read is their memory, which the system shows to the same user only.
"""

from __future__ import annotations

import contextlib
import os
import time

import msgspec
import psutil

from pgtask._observe import pages
from pgtask._observe.pages import Snapshot

__all__ = ["LocalFleets", "LocalSample", "Usage"]

FIND_INTERVAL = 5.0  # seconds between two searches for supervisors, which look at all processes


class Usage(msgspec.Struct, frozen=True):
    """The seconds of CPU that a process has used, and the bytes of memory that it holds."""

    cpu: float
    rss: int


class LocalSample(msgspec.Struct, frozen=True):
    """The supervisors, and the usage of their workers by pid, at a time in monotonic seconds."""

    seen_at: float
    fleets: tuple[Snapshot, ...] = ()
    usage: dict[int, Usage] = {}


class LocalFleets:
    """The files of the supervisors, open while they live."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}  # by inode, which tells one file from another
        self._found_at = float("-inf")
        self._searches: dict[int, int] = {}  # by the pid of the process
        self._processes: dict[int, psutil.Process] = {}

    def sample(self) -> LocalSample:
        """Read all pages now."""
        now = time.monotonic()
        if now - self._found_at >= FIND_INTERVAL:
            self._found_at = now
            self._find()
        fleets = tuple(filter(None, (self._read(inode) for inode in list(self._files))))
        pids = [worker.pid for fleet in fleets for worker in fleet.workers]
        self._processes = {pid: process for pid in pids if (process := self._process(pid)) is not None}
        usage = {pid: found for pid, process in self._processes.items() if (found := _usage(process)) is not None}
        return LocalSample(now, fleets, usage)

    def close(self) -> None:
        for inode in list(self._files):
            os.close(self._files.pop(inode))

    def _find(self) -> None:
        searches: dict[int, int] = {}

        def is_searched(pid: int) -> bool:
            """Search a process ever more rarely: at the searches 1, 2, 4, 8 and so on since it was first seen."""
            searches[pid] = self._searches.get(pid, 0) + 1
            return searches[pid].bit_count() == 1

        for path in pages.find(is_searched):
            with contextlib.suppress(OSError):  # it has just ended
                file = os.open(path, os.O_RDONLY)
                inode = os.fstat(file).st_ino
                if inode in self._files:
                    os.close(file)
                else:
                    self._files[inode] = file
        self._searches = searches

    def _process(self, pid: int) -> psutil.Process | None:
        try:
            return self._processes.get(pid) or psutil.Process(pid)
        except psutil.Error:
            return None

    def _read(self, inode: int) -> Snapshot | None:
        """Read the pages of a supervisor; forget it if it has ended, or is of another version of pgtask."""
        with contextlib.suppress(OSError, ValueError):
            snapshot = pages.read(self._files[inode])
            if psutil.pid_exists(snapshot.pid):
                return snapshot
        os.close(self._files.pop(inode))
        return None


def _usage(process: psutil.Process) -> Usage | None:
    try:
        with process.oneshot():
            times = process.cpu_times()
            return Usage(times.user + times.system, process.memory_info().rss)
    except psutil.Error:
        return None
