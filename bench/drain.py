"""The drain: every contender empties a database of its own, one after the other in each round, on the same server.

Invariants: a contender's database is filled in its own way and settled before its run; the order of the contenders
turns with the rounds; a run that has not finished its tasks is reported as failed and is part of no number; a contender
that cannot take part is reported as skipped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import msgspec

from bench.contender import Arena, Contender, RunFailed, Skipped
from bench.contenders import choose, find_contenders
from bench.latency import Latency, can_measure, measure_latency
from bench.machine import commit, machine, versions
from bench.meter import Meter
from bench.ours import Ours
from bench.peer import HOME, PEERS
from bench.server import BenchError, Server, open_server
from bench.summary import Run, Summary, run_of, summarise
from bench.workloads import WORKLOADS, Workload
from pgtask._postgres.store import HOT_SETTINGS

__all__ = ["Entrant", "Report", "Terms", "drain", "prepare", "run_once"]

LATENCY_PER_SECOND = 50.0


class Terms(msgspec.Struct, frozen=True):
    """What was asked for."""

    tasks: int
    procs: int
    rounds: int
    workload: str
    batch: int
    latency_seconds: float
    contenders: str
    dsn: str | None = None
    peers: Path = PEERS
    peers_home: Path = HOME


class Entrant(msgspec.Struct, frozen=True):
    """A contender of this measurement, and what it was asked for: it may have limits."""

    about: str
    version: str
    tasks: int
    procs: int


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
    contenders: dict[str, Entrant]
    skipped: dict[str, str]
    runs: list[Run]
    summary: dict[str, Summary]
    enqueue_many_per_second: list[float]
    latency: dict[str, Latency]
    latency_failed: dict[str, str]

    @property
    def failures(self) -> list[str]:
        failed = [f"round {run.round}, {run.contender}: {run.failed}" for run in self.runs if run.failed]
        return failed + [f"latency of {name}: {why}" for name, why in self.latency_failed.items()]


def drain(terms: Terms, say: Callable[[str], None]) -> Report:
    """Measure. `say` takes a line of progress. Raises `BenchError` when nothing can be measured."""
    workload = WORKLOADS[terms.workload]
    chosen = choose(terms.contenders, find_contenders(terms.peers, terms.peers_home))
    about = machine()
    contenders, entrants, skipped = prepare(chosen, terms.tasks, terms.procs, workload, say)
    if not contenders:
        raise BenchError("no contender can take part: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    with open_server(terms.dsn) as server:
        say(f"{server.version.split(',')[0]}; fsync and synchronous_commit are on")
        runs, enqueued = _rounds(server, terms, workload, contenders, entrants, say)
        latency, failed = _latencies(server, terms, contenders, say)
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
            terms=_without_paths(terms),
            steps_per_task=workload.steps,
            contenders=entrants,
            skipped=skipped,
            runs=runs,
            summary=summarise(runs, reference=Ours.name),
            enqueue_many_per_second=enqueued,
            latency=latency,
            latency_failed=failed,
        )


def prepare(
    chosen: Sequence[Contender], tasks: int, procs: int, workload: Workload, say: Callable[[str], None]
) -> tuple[list[Contender], dict[str, Entrant], dict[str, str]]:
    """Those that can take part, what each is asked for, and why the others cannot."""
    contenders: list[Contender] = []
    entrants: dict[str, Entrant] = {}
    skipped: dict[str, str] = {}
    for contender in chosen:
        if not contender.on_our_schema:
            say(f"preparing {contender.name}")
        try:
            version = contender.prepare(workload)
        except Skipped as why:
            skipped[contender.name] = str(why)
            say(f"skipped {contender.name}: {why}")
            continue
        contenders.append(contender)
        entrants[contender.name] = Entrant(
            about=contender.about,
            version=version,
            tasks=min(tasks, contender.most_tasks or tasks),
            procs=min(procs, contender.most_procs or procs),
        )
    return contenders, entrants, skipped


def _without_paths(terms: Terms) -> Terms:
    """Fit to be shown to others: without the places of this machine, and without a DSN, which may hold a password."""
    return msgspec.structs.replace(
        terms,
        dsn=None if terms.dsn is None else "...",
        peers=Path(terms.peers.name),
        peers_home=Path(terms.peers_home.name),
    )


def _command(terms: Terms) -> str:
    """What repeats this measurement."""
    values = msgspec.structs.asdict(_without_paths(terms))
    del values["peers"], values["peers_home"]
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)
    return " ".join(["python -m bench drain", *flags])


def _rounds(
    server: Server,
    terms: Terms,
    workload: Workload,
    contenders: Sequence[Contender],
    entrants: dict[str, Entrant],
    say: Callable[[str], None],
) -> tuple[list[Run], list[float]]:
    runs, enqueued = [], []
    for number in range(1, terms.rounds + 1):
        turn = (number - 1) % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            entrant = entrants[contender.name]
            run, rate = run_once(
                server, contender, workload, tasks=entrant.tasks, procs=entrant.procs, batch=terms.batch, number=number
            )
            runs.append(run)
            if rate is not None:
                enqueued.append(rate)
            result = f"failed: {run.failed}" if run.failed else f"{run.tasks_per_second:,.0f} tasks/s"
            say(f"round {number} of {terms.rounds}  {contender.name:<12} {result}")
    return runs, enqueued


def run_once(
    server: Server, contender: Contender, workload: Workload, *, tasks: int, procs: int, batch: int, number: int
) -> tuple[Run, float | None]:
    """One contender's turn, and how many tasks a second were enqueued for it, if it was `enqueue_many`."""
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
            return Run(number, contender.name, failed=str(error)), rate
        return run_of(number, contender.name, tasks, workload.steps, effort, work), rate


def _latencies(
    server: Server, terms: Terms, contenders: Sequence[Contender], say: Callable[[str], None]
) -> tuple[dict[str, Latency], dict[str, str]]:
    found: dict[str, Latency] = {}
    failed: dict[str, str] = {}
    rate, seconds = LATENCY_PER_SECOND, terms.latency_seconds
    for contender in contenders if seconds else ():
        if not can_measure(contender):
            continue
        say(f"latency of {contender.name} at {rate:g}/s for {seconds:g} s")
        try:
            found[contender.name] = measure_latency(
                server, contender, procs=terms.procs, per_second=rate, seconds=seconds
            )
        except (RunFailed, BenchError) as error:
            failed[contender.name] = str(error)
    return found, failed
