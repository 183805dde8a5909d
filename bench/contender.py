"""What it takes to take part: drain a filled table, and say what it cost on the client's side."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from bench.workloads import Workload

__all__ = ["Arena", "Contender", "Effort", "RunFailed"]


class RunFailed(Exception):
    """A run that must not be averaged in; the text says what went wrong."""


class Arena(msgspec.Struct, frozen=True):
    """A filled database and the terms, the same for all. `directory` is empty and the contender's for this run."""

    dsn: str
    directory: Path
    workload: Workload
    tasks: int
    procs: int
    batch: int

    @property
    def timeout(self) -> float:
        """Seconds after which a run is given up."""
        return 60 + self.tasks * self.workload.steps / 500


class Effort(msgspec.Struct, frozen=True):
    """The client's side of a run. `began_at`: seconds since the epoch; `seconds`: of the whole process, from its
    start to its end; `cpu_seconds`: of all workers; the memory is that of the largest worker."""

    began_at: float
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int | None = None
    unique_bytes: int | None = None


class Contender(Protocol):
    """`name` is short, for tables and JSON; `about` is one line for people."""

    name: str
    about: str

    def drain(self, arena: Arena) -> Effort:
        """Run until no task is left. Raises `RunFailed`."""
        ...
