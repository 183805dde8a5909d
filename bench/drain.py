"""The drain: every contender empties a table of its own, one after the other in each round, on the same server.

Invariants: all runs of a round see the same rows, made by the same `enqueue_many` and settled in the same way; the
order of the contenders turns with the rounds; a run that has not finished its tasks is reported as failed and is part
of no number.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.contender import Arena, Contender, RunFailed
from bench.floor import Floor, Minimum
from bench.latency import Latency, measure_latency
from bench.machine import commit, machine, versions
from bench.meter import Meter
from bench.ours import Ours
from bench.server import BenchError, Server, open_server
from bench.summary import Run, Summary, run_of, summarise
from bench.workloads import WORKLOADS, Workload
from pgtask import Client
from pgtask._postgres.store import HOT_SETTINGS

__all__ = ["Report", "Terms", "drain"]

_SETTLE = ("VACUUM (ANALYZE) pg_task", "CHECKPOINT")
LATENCY_PER_SECOND = 50.0


class Terms(msgspec.Struct, frozen=True):
    """What was asked for."""

    tasks: int
    procs: int
    rounds: int
    workload: str
    batch: int
    latency_seconds: float
    dsn: str | None = None


class Report(msgspec.Struct, frozen=True):
    """Everything about one measurement, as the JSON file has it."""

    bench: str
    at: str
    command: str
    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    server: str
    settings: dict[str, str]
    session_settings: dict[str, str]
    terms: Terms
    steps_per_task: int
    contenders: dict[str, str]
    runs: list[Run]
    summary: dict[str, Summary]
    enqueue_many_per_second: list[float]
    latency: Latency | None
    latency_failed: str | None = None

    @property
    def failures(self) -> list[str]:
        failed = [f"round {run.round}, {run.contender}: {run.failed}" for run in self.runs if run.failed]
        return failed + ([f"latency: {self.latency_failed}"] if self.latency_failed else [])


def drain(terms: Terms, say: Callable[[str], None]) -> Report:
    """Measure. `say` takes a line of progress. Raises `BenchError` when nothing can be measured."""
    workload = WORKLOADS[terms.workload]
    contenders: list[Contender] = [Ours(), Floor()]
    if workload.steps == 1:
        contenders.append(Minimum())
    about = machine()
    with open_server(terms.dsn) as server:
        say(f"{server.version.split(',')[0]}; fsync and synchronous_commit are on")
        runs, enqueued = _rounds(server, terms, workload, contenders, say)
        latency, failed = _latency(server, terms, say)
        return Report(
            bench="drain",
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=_command(terms),
            commit=commit(),
            machine=about,
            versions=versions(),
            server=server.version,
            settings=server.settings,
            session_settings=HOT_SETTINGS,
            terms=msgspec.structs.replace(terms, dsn=None if terms.dsn is None else "..."),
            steps_per_task=workload.steps,
            contenders={contender.name: contender.about for contender in contenders},
            runs=runs,
            summary=summarise(runs, reference=Ours.name),
            enqueue_many_per_second=enqueued,
            latency=latency,
            latency_failed=failed,
        )


def _command(terms: Terms) -> str:
    """What repeats this measurement; a DSN is left out, it may hold a password."""
    values = msgspec.structs.asdict(terms) | {"dsn": None if terms.dsn is None else "..."}
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)
    return " ".join(["python -m bench drain", *flags])


def _rounds(
    server: Server,
    terms: Terms,
    workload: Workload,
    contenders: Sequence[Contender],
    say: Callable[[str], None],
) -> tuple[list[Run], list[float]]:
    runs, enqueued = [], []
    for number in range(1, terms.rounds + 1):
        turn = (number - 1) % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            run, rate = _run(server, terms, workload, contender, number)
            runs.append(run)
            enqueued.append(rate)
            result = f"failed: {run.failed}" if run.failed else f"{run.tasks_per_second:,.0f} tasks/s"
            say(f"round {number} of {terms.rounds}  {contender.name:<8} {result}")
    return runs, enqueued


def _run(server: Server, terms: Terms, workload: Workload, contender: Contender, number: int) -> tuple[Run, float]:
    """One contender's turn, and how many tasks a second were enqueued for it."""
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)
        rate = asyncio.run(_fill(dsn, workload, terms.tasks))
        for statement in _SETTLE:
            server.query(statement, dsn=dsn)
        arena = Arena(dsn, Path(directory), workload, terms.tasks, terms.procs, terms.batch)
        meter = Meter(server, database)
        try:
            effort = contender.drain(arena)
            work = meter.read()
            left, parked = server.query("SELECT count(*), count(error) FROM pg_task", dsn=dsn)[0]
            if left or work is None:
                raise RunFailed(f"{left} of {terms.tasks} tasks were left, {parked} of them parked")
        except (RunFailed, BenchError) as error:
            return Run(number, contender.name, failed=str(error)), rate
        return run_of(number, contender.name, terms.tasks, workload.steps, effort, work), rate


async def _fill(dsn: str, workload: Workload, tasks: int) -> float:
    """Enqueue the tasks; how many a second, from the call to its return, the commit included."""
    async with Client(dsn) as client:
        began = time.monotonic()
        ids = await client.enqueue_many(workload.make(number) for number in range(tasks))
        seconds = time.monotonic() - began
    if len(ids) != tasks:
        raise BenchError(f"enqueue_many returned {len(ids)} ids for {tasks} tasks")
    return tasks / seconds


def _latency(server: Server, terms: Terms, say: Callable[[str], None]) -> tuple[Latency | None, str | None]:
    if not terms.latency_seconds:
        return None, None
    rate, seconds = LATENCY_PER_SECOND, terms.latency_seconds
    say(f"latency at {rate:g}/s for {seconds:g} s")
    try:
        return measure_latency(server, procs=terms.procs, per_second=rate, seconds=seconds), None
    except RunFailed as error:
        return None, str(error)
