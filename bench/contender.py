"""What it takes to take part: fill a database, drain it, and say what that cost on the client's side."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

import asyncpg
import msgspec

from bench.workloads import Workload
from pgtask import Client

__all__ = ["Arena", "Contender", "Effort", "OnOurTable", "RunFailed", "Skipped"]


class RunFailed(Exception):
    """A run that must not be averaged in; the text says what went wrong."""


class Skipped(Exception):
    """A contender that cannot take part; the text says why."""


class Arena(msgspec.Struct, frozen=True):
    """A database and the terms. `directory` is empty and the contender's for this run."""

    dsn: str
    directory: Path
    workload: Workload
    tasks: int
    procs: int
    batch: int

    @property
    def timeout(self) -> float:
        """Seconds after which a run is given up."""
        return 60 + self.tasks * self.workload.steps / 100


class Effort(msgspec.Struct, frozen=True):
    """The client's side of a run. `began_at`: seconds since the epoch; `seconds`: of the whole process, from its
    start to its end; `cpu_seconds`: of all workers; `tree_cpu_seconds`: of all processes with their boot; the memory is
    that of the largest worker. `window`: seconds of the work itself, where Postgres cannot tell, since nothing is
    written."""

    began_at: float
    seconds: float
    cpu_seconds: float
    tree_cpu_seconds: float
    peak_rss_bytes: int | None = None
    unique_bytes: int | None = None
    window: float | None = None


class Contender(Protocol):
    """`name` is short, for tables and JSON; `about` is one line for people. `on_our_schema`: its database has our
    schema already. `left`: the query that counts the tasks that are not finished. `settle`: what is done after a fill.
    """

    name: str
    about: str
    on_our_schema: bool
    left: str
    settle: tuple[str, ...]
    most_tasks: int | None
    most_procs: int | None

    def prepare(self, workload: Workload) -> str:
        """Get ready to do this workload, and say the version. Raises `Skipped`."""
        ...

    def fill(self, arena: Arena) -> float | None:
        """Make the tasks; how many a second, if that is measured. Raises `RunFailed`."""
        ...

    def drain(self, arena: Arena) -> Effort:
        """Run until no task is left. Raises `RunFailed`."""
        ...


class OnOurTable:
    """A contender that drains `pg_task`, filled by `enqueue_many`."""

    on_our_schema = True
    left = "SELECT count(*) FROM pg_task"
    settle: tuple[str, ...] = ("VACUUM (ANALYZE) pg_task",)
    most_tasks: int | None = None
    most_procs: int | None = None

    def fill(self, arena: Arena) -> float | None:
        """How many tasks a second, from the call of `enqueue_many` to its return, the commit included."""
        return asyncio.run(_fill(arena.dsn, arena.workload, arena.tasks))


async def _fill(dsn: str, workload: Workload, tasks: int) -> float:
    if workload.setup:
        connection = await asyncpg.connect(dsn)
        await connection.execute(workload.setup)
        await connection.close()
    async with Client(dsn) as client:
        began = time.monotonic()
        ids = await client.enqueue_many(workload.make(number) for number in range(tasks))
        seconds = time.monotonic() - began
    if len(ids) != tasks:
        raise RunFailed(f"enqueue_many returned {len(ids)} ids for {tasks} tasks")
    return tasks / seconds
