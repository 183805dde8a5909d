"""turn_slots: how many workers of one supervisor hold the rows of tasks at once.

A turn (hold.py) steps over each row that another one holds, which costs Postgres a fifth of what the task itself does.
So turns whose steps take less than their statements gain nothing from more workers than there are cores to run both.

Invariants: a slot is free when its process is dead, whatever killed it; taking one never waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile

from pgtask._cpus import default_procs

__all__ = ["TurnSlots", "slot_descriptors"]

MIN_SLOTS = 2  # one worker computes while Postgres works for the other


_descriptors: list[int] = []


def slot_descriptors() -> list[int]:
    """Return the descriptors of all slots that this process has made or inherited, for a forked copy of it."""
    return list(_descriptors)


class TurnSlots:
    """The slots of one supervisor. Make it before the fork; each worker takes one slot at most.

    A slot is a byte of a file without a name, locked by its process. Without a place for that file there is no limit.
    """

    def __init__(self) -> None:
        self._count = max(MIN_SLOTS, default_procs())
        self._file = _open_file()
        if self._file is not None:
            _descriptors.append(self._file)
        self._taken: int | None = None

    def take(self) -> bool:
        """Take a slot, unless this process has one. Return whether it has."""
        if self._file is None or self._taken is not None:
            return True
        for slot in range(self._count):
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                self._taken = slot
                return True
        return False

    def free(self) -> None:
        """Free the slot of this process, if it has one."""
        if self._file is not None and self._taken is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._taken)
            self._taken = None


def _open_file() -> int | None:
    try:
        if hasattr(os, "memfd_create"):
            return os.memfd_create("pgtask-turns")
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    except OSError:
        return None
