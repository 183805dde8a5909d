"""The supervisors of this user on this host that count (`--metrics`), and what the system knows of their workers.

Invariant: their programs are asked nothing; what is read is their memory, which the system shows to the same user only.
"""

from __future__ import annotations

import contextlib
import os
import time

import psutil

from pgtask._observe import pages
from pgtask._observe.fleets import SeenFleet, UsageReader
from pgtask._observe.pages import Snapshot

__all__ = ["LocalFleets"]

FIND_INTERVAL = 5.0  # seconds between two searches for supervisors, which look at all processes


class LocalFleets:
    """The files of the supervisors, open while they live."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}  # by inode, which tells one file from another
        self._found_at = float("-inf")
        self._searches: dict[int, int] = {}  # by the pid of the process
        self._usage = UsageReader()

    def sample(self) -> tuple[SeenFleet, ...]:
        """Read all pages now."""
        now = time.monotonic()
        if now - self._found_at >= FIND_INTERVAL:
            self._found_at = now
            self._find()
        return self._usage.see(filter(None, [self._read(inode) for inode in list(self._files)]))

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

    def _read(self, inode: int) -> Snapshot | None:
        """Read the pages of a supervisor; forget it if it has ended, or is of another version of pgtask."""
        with contextlib.suppress(OSError, ValueError):
            snapshot = pages.read(self._files[inode])
            if psutil.pid_exists(snapshot.pid):
                return snapshot
        os.close(self._files.pop(inode))
        return None
