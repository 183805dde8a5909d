"""Interface of a contender: it fills a database, drains it, and reports the cost on the client's side."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from bench.harness.server import Server
from bench.workloads.workload import Workload

__all__ = ["Arena", "Contender", "ContenderSkipped", "Effort", "Latency", "RunFailed"]


class RunFailed(Exception):
    """A run that no average may include; the text gives the cause."""


class ContenderSkipped(Exception):
    """A contender that cannot take part; the text gives the reason."""


class Arena(msgspec.Struct, frozen=True):
    """The database and the terms of one run. `directory` is empty and belongs to the contender during this run."""

    dsn: str
    directory: Path
    workload: Workload
    tasks: int
    procs: int
    batch: int

    @property
    def timeout(self) -> float:
        """Seconds until the bench gives up the run."""
        return 60 + self.tasks * self.workload.steps / 100


class Effort(msgspec.Struct, frozen=True):
    """Cost of a run on the client's side.

    `began_at`: seconds since the epoch. `seconds`: of the whole process, from its start to its end. `cpu_seconds`: of
    all workers. `tree_cpu_seconds`: of all processes, their boot included. The memory is that of the largest worker.
    `window`: seconds of the work itself, for a contender that writes nothing, so that Postgres cannot tell.
    """

    began_at: float
    seconds: float
    cpu_seconds: float
    tree_cpu_seconds: float
    peak_rss_bytes: int | None = None
    unique_bytes: int | None = None
    window: float | None = None


class Latency(msgspec.Struct, frozen=True):
    """Latency in milliseconds. `enqueue`: the call itself, its commit included. `start`: from the call to the start of
    the step, by the clock of this host."""

    per_second: float
    samples: int
    enqueue_p50: float
    enqueue_p99: float
    start_p50: float
    start_p99: float
    start_max: float | None = None


class Contender(Protocol):
    """An engine that can be measured.

    `name` is short, for tables and JSON; `about` is one line for people. `on_our_schema`: its database has our schema
    before the fill. `left`: the query that counts the unfinished tasks. `settle`: statements to run after the fill.
    `max_tasks` and `max_procs`: its limits, if it has any.
    """

    name: str
    about: str
    on_our_schema: bool
    left: str
    settle: tuple[str, ...]
    max_tasks: int | None
    max_procs: int | None
    can_measure_latency: bool

    def prepare(self, workload: Workload) -> str:
        """Get ready for this workload, and return the version. Raises `ContenderSkipped`."""
        ...

    def fill(self, arena: Arena) -> float | None:
        """Create the tasks; return their rate per second if it is measured. Raises `RunFailed`."""
        ...

    def drain(self, arena: Arena) -> Effort:
        """Run until no task is left. Raises `RunFailed`."""
        ...

    def measure_latency(self, server: Server, *, procs: int, per_second: float, seconds: float) -> Latency:
        """Measure an idle fleet at this rate. Call it only if `can_measure_latency`. Raises `RunFailed`."""
        ...
