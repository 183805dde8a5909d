"""The clock of leases in this process.

A lease ends by the clock of the database, also while this machine or its virtual machine is suspended. The monotonic
clock of Linux stands still then, so a worker that used it would believe that it still has an ended lease.
"""

from __future__ import annotations

import time

__all__ = ["lease_clock"]

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)


def lease_clock() -> float:
    """Return the seconds since a fixed time in the past, including suspends where the system counts them (Linux)."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)
