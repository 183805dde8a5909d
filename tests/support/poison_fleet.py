"""A fleet of the app `poison`, whose tasks kill or block their process."""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import fleet
from fleet import Fleet


def working(dsn: str, *arguments: str, procs: int = 1) -> AbstractContextManager[Fleet]:
    """Run a fleet; QUIT at the end cancels the steps that never end."""
    return fleet.working(dsn, *arguments, procs=procs, app="poison:app", order=signal.SIGQUIT)


def burst(dsn: str, *arguments: str, procs: int = 2, code: int = 1) -> Fleet:
    return fleet.burst(dsn, *arguments, procs=procs, app="poison:app", code=code)


def until_begun(path: Path, times: int = 1) -> int:
    """Wait until so many processes have begun a `Blocked` of that path; return the pid of the last one."""
    deadline = time.monotonic() + 30
    while len(found := sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: file.stat().st_mtime_ns)) < times:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return int(found[-1].suffix[1:])
