"""Rounds of a measurement: contenders take turns, each with a database of its own, on the same server.

Invariants: each contender fills its database in its own way, and the bench settles it before the run; the order of the
contenders rotates with the rounds; a run that leaves tasks unfinished counts as failed and enters no number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import asyncpg
import msgspec

from bench.harness.contender import Arena, Contender, ContenderSkipped, RunFailed
from bench.harness.meter import Meter
from bench.harness.progress import Progress
from bench.harness.server import BenchError, Server
from bench.harness.summary import ContenderRun, contender_run
from bench.workloads.workload import Workload

__all__ = ["Entrant", "prepare_contenders", "rotated", "run_contender"]

T = TypeVar("T")


class Entrant(msgspec.Struct, frozen=True):
    """A contender of this measurement, and the size of its runs, which its limits may reduce."""

    about: str
    version: str
    tasks: int
    procs: int


def prepare_contenders(
    chosen: Sequence[Contender], tasks: int, procs: int, workload: Workload, progress: Progress
) -> tuple[list[Contender], dict[str, Entrant], dict[str, str]]:
    """Return the contenders that can take part, their entrants by name, and the reason for each skipped one."""
    contenders: list[Contender] = []
    entrants: dict[str, Entrant] = {}
    skipped: dict[str, str] = {}
    for contender in chosen:
        if not contender.on_our_schema:
            progress(f"preparing {contender.name}")
        try:
            version = contender.prepare(workload)
        except ContenderSkipped as reason:
            skipped[contender.name] = str(reason)
            progress(f"skipped {contender.name}: {reason}")
            continue
        contenders.append(contender)
        entrants[contender.name] = Entrant(
            about=contender.about,
            version=version,
            tasks=min(tasks, contender.max_tasks or tasks),
            procs=min(procs, contender.max_procs or procs),
        )
    return contenders, entrants, skipped


def run_contender(
    server: Server, contender: Contender, workload: Workload, *, tasks: int, procs: int, batch: int, number: int
) -> tuple[ContenderRun, float | None]:
    """Run one contender in round `number`. Return its run, and the rate of its fill if that is measured."""
    rate = None
    with (
        server.fresh_database(empty=not contender.on_our_schema) as database,
        tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
    ):
        dsn = server.database(database)
        arena = Arena(dsn, Path(directory), workload, tasks, procs, batch)
        try:
            rate = contender.fill(arena)
            for statement in (*contender.settle, "CHECKPOINT"):
                server.query(statement, dsn=dsn)
            meter = Meter(server, database)
            effort = contender.drain(arena)
            work = meter.read()
            left = server.value(contender.left, dsn=dsn)
            if left:
                raise RunFailed(f"{left} of {tasks} tasks were left")
        except (RunFailed, BenchError, asyncpg.PostgresError) as error:
            return ContenderRun(number, contender.name, failed=str(error)), rate
        return contender_run(number, contender.name, tasks, workload.steps, effort, work), rate


def rotated(items: Sequence[T], number: int) -> list[T]:
    """List the items for round `number` (from 1), each round beginning at the next one."""
    turn = (number - 1) % max(1, len(items))
    return [*items[turn:], *items[:turn]]
