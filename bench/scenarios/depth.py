"""Conditions that slow queues down: a deep backlog, dead weight, a foreign snapshot that stays open, a stale plan.

Invariants: every run has a new database and the same fleet; the cases take turns, round by round, and each has a base
in the same round; a run ends when the fleet writes nothing more, so that the bench sends the table no query meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from uuid import uuid4

import asyncpg
import msgspec

from bench.harness.contender import RunFailed
from bench.harness.fill import fill_by_sql, fill_dead_weight
from bench.harness.flags import add_number, add_server, natural_number
from bench.harness.meter import Meter
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, failure_lines, format_spread, setting_of
from bench.harness.rounds import rotated
from bench.harness.server import BenchError, Server, open_server
from bench.harness.spread import Spread, percentile, spread
from bench.harness.supervisor import running_supervisor
from bench.scenario import Report
from pgtask._cpus import default_procs
from pgtask._fastpath import Leases, Outcomes
from pgtask._postgres.store import Link
from pgtask._worker.lanes import FLOOR_SLACK
from pgtask.config import Config

__all__ = ["DepthScenario"]

_CASES = {
    "deep": "many runnable tasks",
    "weight": "few runnable tasks among future, parked and elsewhere leased ones",
    "snapshot": "many runnable tasks, while a foreign transaction holds its snapshot from the first to the last",
}
_BASES = {"deep": "shallow", "weight": "shallow", "snapshot": "deep"}
_ABOUT = {"shallow": "few runnable tasks, nothing else"} | _CASES
_POLL_INTERVAL = 0.2
_QUIET_POLLS = 25  # in a row: beside a foreign snapshot a worker may search for lanes for seconds, and write nothing
_EMPTY_CLAIMS = 20  # more than enough for Postgres to keep a plan


class DepthTerms(msgspec.Struct, frozen=True):
    """Values of the flags. `scenarios`: the names of the cases."""

    scenarios: list[str]
    shallow: int
    deep: int
    future: int
    parked: int
    leased: int
    procs: int
    rounds: int
    claims: int

    @property
    def weight(self) -> dict[str, int]:
        return {"future": self.future, "parked": self.parked, "leased": self.leased}


class Flatness(msgspec.Struct, frozen=True):
    """Tasks per second of a case. `ratio`: this rate over that of the base, for each round."""

    rate: Spread
    base: str | None
    ratio: Spread | None


class ColdPlan(msgspec.Struct, frozen=True):
    """Milliseconds of the claim of a full batch, by a session opened on the empty table. `analysed`: after an ANALYZE,
    for comparison."""

    tasks: int
    batch: int
    claims: int
    first: float
    p50: float
    p99: float
    max: float
    analysed_p50: float
    analysed_p99: float


class DepthReport(Report, frozen=True):
    """Rates by case, and the cold plan if it was measured."""

    setting: Setting
    terms: DepthTerms
    flatness: dict[str, Flatness]
    cold: ColdPlan | None
    failures: list[str]


class DepthScenario:
    """The command `depth`."""

    name = "depth"
    help = "a deep backlog, dead weight, a foreign snapshot, a cold plan"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--scenarios",
            type=lambda text: text.split(","),
            default=[*_CASES, "cold"],
            metavar="NAMES",
            help=f"cases to measure, separated by commas (default: {','.join(_CASES)},cold)",
        )
        add_number(parser, "--shallow", 100_000, "runnable tasks where they are few")
        add_number(parser, "--deep", 3_000_000, "runnable tasks where they are many")
        for kind, default in (("future", 3_000_000), ("parked", 1_000_000), ("leased", 1_000_000)):
            text = f"{kind} tasks of the dead weight (default: {default:,})"
            parser.add_argument(f"--{kind}", type=natural_number, default=default, metavar="N", help=text)
        add_number(parser, "--procs", default_procs(), "worker processes")
        add_number(parser, "--rounds", 3, "runs of each case")
        add_number(parser, "--claims", 500, "claims to time with the cold plan")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> DepthReport:
        terms = DepthTerms(**{name: getattr(arguments, name) for name in DepthTerms.__struct_fields__})
        if unknown := set(terms.scenarios) - {*_CASES, "cold"}:
            raise BenchError(f"unknown scenarios: {', '.join(sorted(unknown))}; there are: {', '.join(_CASES)}, cold")
        wanted = [name for name in _CASES if name in terms.scenarios]
        needed = [name for name in _ABOUT if name in wanted or name in {_BASES[case] for case in wanted}]
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            rates, failures = _run_rounds(server, needed, terms, progress)
            cold = None
            if "cold" in terms.scenarios:
                progress("cold plan")
                cold = _measure_cold_plan(server, terms)
        return DepthReport(
            bench="depth",
            setting=setting,
            terms=terms,
            flatness={name: _flatness(name, rates) for name in needed if rates[name]},
            cold=cold,
            failures=failures,
        )

    def card(self, report: DepthReport) -> str:
        terms = report.terms
        weight = ", ".join(f"{number:,} {kind}" for kind, number in terms.weight.items())
        lines = [
            *card_head(report.setting, f"depth: {terms.procs} processes, {terms.rounds} rounds"),
            f"many: {terms.deep:,}; few: {terms.shallow:,}; weight: {weight}",
            f"{'median (min - max)':<14}{'tasks/s':>34}{'of the base':>26}",
        ]
        for name, flat in report.flatness.items():
            ratio = "" if flat.ratio is None else format_spread(flat.ratio, ".2f")
            base = f"; base: {flat.base}" if ratio else ""
            lines.append(f"{name:<14}{format_spread(flat.rate, ',.0f'):>34}{ratio:>26}   {_ABOUT[name]}{base}")
        if (cold := report.cold) is not None:
            lines += [
                "",
                f"cold plan: {cold.claims} claims of {cold.batch} by a session opened on the empty table, then "
                f"{cold.tasks:,} rows, no ANALYZE",
                f"  first {cold.first:.2f} ms, p50 {cold.p50:.2f} ms, p99 {cold.p99:.2f} ms, most {cold.max:.2f} ms; "
                f"after an ANALYZE p50 {cold.analysed_p50:.2f} ms, p99 {cold.analysed_p99:.2f} ms",
            ]
        return "\n".join(lines + failure_lines(report.failures))


def _run_rounds(
    server: Server, names: Sequence[str], terms: DepthTerms, progress: Progress
) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Return tasks per second by case and by round, and the failures."""
    rates: dict[str, dict[int, float]] = {name: {} for name in names}
    failures = []
    for number in range(1, terms.rounds + 1):
        for name in rotated(names, number):
            try:
                rates[name][number] = _measure_rate(server, name, terms)
                result = f"{rates[name][number]:,.0f} tasks/s"
            except RunFailed as error:
                failures.append(f"round {number}, {name}: {error}")
                result = f"failed: {error}"
            progress(f"round {number} of {terms.rounds}  {name:<9} {result}")
    return rates, failures


def _flatness(name: str, rates: dict[str, dict[int, float]]) -> Flatness:
    base = _BASES.get(name)
    if base not in rates:
        base = None
    other = rates[base] if base is not None else {}
    ratios = [rate / other[number] for number, rate in rates[name].items() if number in other]
    return Flatness(spread(list(rates[name].values())), base, spread(ratios) if ratios else None)


# --- one run of a case


def _measure_rate(server: Server, case: str, terms: DepthTerms) -> float:
    tasks = terms.deep if case in ("deep", "snapshot") else terms.shallow
    with (
        server.fresh_database() as database,
        tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
    ):
        dsn = server.database(database)
        fill_by_sql(server, dsn, tasks)
        fill_dead_weight(server, dsn, terms.weight if case == "weight" else {})
        meter = Meter(server, database)
        with (
            _foreign_snapshot(dsn) if case == "snapshot" else nullcontext(),
            running_supervisor(dsn, terms.procs, Path(directory)),
        ):
            _wait_until_quiet(server, timeout=60 + tasks / 500)
        work = meter.read()
        left = server.value(
            "SELECT count(*) FROM pg_task WHERE wakeup_at <= now() AND locked_by IS NULL AND error IS NULL", dsn=dsn
        )
    if left or work.first_commit_at is None or work.last_commit_at is None:
        raise RunFailed(f"{left} of {tasks} tasks were left")
    return tasks / max(work.last_commit_at - work.first_commit_at, 1e-3)


def _wait_until_quiet(server: Server, *, timeout: float) -> None:
    """Wait until no process writes WAL any more, polling over another database."""
    deadline = time.monotonic() + timeout
    last, quiet = "", 0
    while quiet < _QUIET_POLLS:
        if time.monotonic() > deadline:
            raise RunFailed(f"not finished after {timeout:g} s")
        time.sleep(_POLL_INTERVAL)
        now = server.value("SELECT pg_current_wal_insert_lsn()::text")
        quiet = quiet + 1 if now == last else 0
        last = now


@contextmanager
def _foreign_snapshot(dsn: str) -> Iterator[None]:
    """Hold a transaction open that has read something, as a long report of another program would."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(dsn))
    try:
        loop.run_until_complete(connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class"))
        yield
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


# --- the cold plan


def _measure_cold_plan(server: Server, terms: DepthTerms) -> ColdPlan:
    with server.fresh_database() as database:
        dsn = server.database(database)
        # Autovacuum would analyse the table at some time: the worst case is that it does not.
        server.query("ALTER TABLE pg_task SET (autovacuum_enabled = off)", dsn=dsn)
        times, analysed = asyncio.run(_claim_cold(dsn, terms))
    batch = Config().batch
    return ColdPlan(
        tasks=terms.deep,
        batch=batch,
        claims=len(times),
        first=times[0],
        p50=percentile(times, 50),
        p99=percentile(times, 99),
        max=max(times),
        analysed_p50=percentile(analysed, 50),
        analysed_p99=percentile(analysed, 99),
    )


async def _claim_cold(dsn: str, terms: DepthTerms) -> tuple[list[float], list[float]]:
    """Claim and flush over a connection as a worker has it. Return the times before and after an ANALYZE."""
    link = Link(dsn, "bench")
    other = await asyncpg.connect(dsn)
    try:
        await _claim_repeatedly(link, _EMPTY_CLAIMS)
        await asyncio.to_thread(_fill_cold, dsn, terms.deep)
        cold = await _claim_repeatedly(link, terms.claims)
        await other.execute("ANALYZE pg_task")
        return cold, await _claim_repeatedly(link, terms.claims)
    finally:
        await other.close()
        await link.close()


def _fill_cold(dsn: str, tasks: int) -> None:
    fill_by_sql(Server(dsn), dsn, tasks)


async def _claim_repeatedly(link: Link, claims: int) -> list[float]:
    """Claim batches and flush them as done; return the milliseconds of each claim."""
    config, times, floor = Config(), [], 0.0
    for _ in range(claims):
        token, outcomes = uuid4(), Outcomes()
        limits = config.batch, token, config.lease_timeout, config.max_step_bytes
        began = time.perf_counter()
        rows = await link.once("claim", "default", 0, *limits, floor)
        times.append(1000 * (time.perf_counter() - began))
        for lease in Leases().add_claimed(rows, token, 0.0)[0]:
            outcomes.add_done(lease)
        await link.once("flush", *outcomes.parameters())
        floor = max((row[5] for row in rows), default=FLOOR_SLACK) - FLOOR_SLACK
    return times
