"""Where queues rot: a deep backlog, dead weight, a foreign transaction that keeps its snapshot, a plan made too early.

Invariants: every run has a new database and the same fleet; the scenarios take turns, round by round, and each has a
base in the same round; a run ends when the fleet writes nothing more, so nobody asks the table while it works.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from uuid import uuid4

import asyncpg
import msgspec

from bench.contender import RunFailed
from bench.idle import fill_dead_weight
from bench.meter import Meter
from bench.ours import running_supervisor
from bench.parts import Setting, fill_by_sql, head, setting_of
from bench.server import Server, open_server
from bench.spread import Spread, percentile, spread
from pgtask._fastpath import Outcomes
from pgtask._postgres.store import Link
from pgtask._worker.claim import FLOOR_SLACK
from pgtask.config import Config

__all__ = ["SCENARIOS", "DepthReport", "DepthTerms", "depth_card", "measure_depth"]

SCENARIOS = {
    "deep": "many runnable tasks",
    "weight": "few runnable tasks among future, parked and elsewhere leased ones",
    "snapshot": "many runnable tasks, while a foreign transaction holds its snapshot from the first to the last",
}
_BASES = {"deep": "shallow", "weight": "shallow", "snapshot": "deep"}
_ABOUT = {"shallow": "few runnable tasks, nothing else"} | SCENARIOS
_LOOK = 0.2
_QUIET = 25  # looks in a row without anything written: a look for lanes may take seconds beside a foreign snapshot
_EMPTY_CLAIMS = 20  # as many as make Postgres keep a plan, and more


class DepthTerms(msgspec.Struct, frozen=True):
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
    """Tasks per second, and this over its base, round by round."""

    rate: Spread
    base: str | None
    ratio: Spread | None


class ColdPlan(msgspec.Struct, frozen=True):
    """Milliseconds of each claim of a full batch, by a session that was opened on the empty table; `analysed`: after
    an ANALYZE, for comparison."""

    tasks: int
    batch: int
    claims: int
    first: float
    p50: float
    p99: float
    max: float
    analysed_p50: float
    analysed_p99: float


class DepthReport(msgspec.Struct, frozen=True):
    bench: str
    setting: Setting
    terms: DepthTerms
    flatness: dict[str, Flatness]
    cold: ColdPlan | None
    failures: list[str]


def measure_depth(terms: DepthTerms, dsn: str | None, say: Callable[[str], None]) -> DepthReport:
    wanted = [name for name in SCENARIOS if name in terms.scenarios]
    needed = [name for name in _ABOUT if name in wanted or name in {_BASES[one] for one in wanted}]
    rates: dict[str, dict[int, float]] = {name: {} for name in needed}
    failures = []
    with open_server(dsn) as server:
        setting = setting_of(server)
        for number in range(1, terms.rounds + 1):
            turn = (number - 1) % max(1, len(needed))
            for name in (*needed[turn:], *needed[:turn]):
                try:
                    rates[name][number] = _rate(server, name, terms)
                    said = f"{rates[name][number]:,.0f} tasks/s"
                except RunFailed as error:
                    failures.append(f"round {number}, {name}: {error}")
                    said = f"failed: {error}"
                say(f"round {number} of {terms.rounds}  {name:<9} {said}")
        cold = None
        if "cold" in terms.scenarios:
            say("cold plan")
            cold = _cold(server, terms)
    return DepthReport(
        bench="depth",
        setting=setting,
        terms=terms,
        flatness={name: _flatness(name, rates) for name in needed if rates[name]},
        cold=cold,
        failures=failures,
    )


def depth_card(report: DepthReport) -> str:
    terms = report.terms
    weight = ", ".join(f"{number:,} {kind}" for kind, number in terms.weight.items())
    lines = [
        *head(report.setting, f"depth: {terms.procs} processes, {terms.rounds} rounds"),
        f"many: {terms.deep:,}; few: {terms.shallow:,}; weight: {weight}",
        f"{'median (min - max)':<14}{'tasks/s':>34}{'of the base':>26}",
    ]
    for name, flat in report.flatness.items():
        rate = f"{flat.rate.median:,.0f} ({flat.rate.min:,.0f} - {flat.rate.max:,.0f})"
        ratio = flat.ratio
        beside = "" if ratio is None else f"{ratio.median:.2f} ({ratio.min:.2f} - {ratio.max:.2f})"
        lines.append(f"{name:<14}{rate:>34}{beside:>26}   {_ABOUT[name]}" + (f"; base: {flat.base}" if beside else ""))
    if (cold := report.cold) is not None:
        lines += [
            "",
            f"cold plan: {cold.claims} claims of {cold.batch} by a session opened on the empty table, then "
            f"{cold.tasks:,} rows, no ANALYZE",
            f"  first {cold.first:.2f} ms, p50 {cold.p50:.2f} ms, p99 {cold.p99:.2f} ms, most {cold.max:.2f} ms; "
            f"after an ANALYZE p50 {cold.analysed_p50:.2f} ms, p99 {cold.analysed_p99:.2f} ms",
        ]
    return "\n".join(lines + [f"FAILED    {failure}" for failure in report.failures])


def _flatness(name: str, rates: dict[str, dict[int, float]]) -> Flatness:
    base = _BASES.get(name)
    if base not in rates:
        base = None
    other = rates[base] if base is not None else {}
    ratios = [rate / other[number] for number, rate in rates[name].items() if number in other]
    return Flatness(spread(list(rates[name].values())), base, spread(ratios) if ratios else None)


# --- one run


def _rate(server: Server, scenario: str, terms: DepthTerms) -> float:
    tasks = terms.deep if scenario in ("deep", "snapshot") else terms.shallow
    with (
        server.fresh_database() as database,
        tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
    ):
        dsn = server.database(database)
        fill_by_sql(server, dsn, tasks)
        fill_dead_weight(server, dsn, terms.weight if scenario == "weight" else {})
        meter = Meter(server, database)
        with (
            _foreign_snapshot(dsn) if scenario == "snapshot" else nullcontext(),
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
    """Until nothing is written to the WAL any more; looked at from another database."""
    deadline = time.monotonic() + timeout
    last, quiet = "", 0
    while quiet < _QUIET:
        if time.monotonic() > deadline:
            raise RunFailed(f"not finished after {timeout:g} s")
        time.sleep(_LOOK)
        now = server.value("SELECT pg_current_wal_insert_lsn()::text")
        quiet = quiet + 1 if now == last else 0
        last = now


@contextmanager
def _foreign_snapshot(dsn: str) -> Iterator[None]:
    """Somebody's long report: a transaction that has read something, and stays open."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(dsn))
    try:
        loop.run_until_complete(connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class"))
        yield
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


# --- the cold plan


def _cold(server: Server, terms: DepthTerms) -> ColdPlan:
    with server.fresh_database() as database:
        dsn = server.database(database)
        # Autovacuum would analyse the table when it gets to it: the worst case is that it does not.
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
    """A worker's own connection, claiming and flushing as its pump does."""
    link = Link(dsn, "bench")
    other = await asyncpg.connect(dsn)
    try:
        await _turns(link, _EMPTY_CLAIMS)
        await asyncio.to_thread(_fill_cold, dsn, terms.deep)
        cold = await _turns(link, terms.claims)
        await other.execute("ANALYZE pg_task")
        return cold, await _turns(link, terms.claims)
    finally:
        await other.close()
        await link.close()


def _fill_cold(dsn: str, tasks: int) -> None:
    fill_by_sql(Server(dsn), dsn, tasks)


async def _turns(link: Link, claims: int) -> list[float]:
    """Milliseconds of each claim; what it has taken is written as done."""
    config, times, floor = Config(), [], 0.0
    for _ in range(claims):
        token, outcomes = uuid4(), Outcomes()
        limits = config.batch, token, config.lease_timeout, config.max_step_bytes
        began = time.perf_counter()
        rows = await link.once("claim", "default", 0, *limits, floor)
        times.append(1000 * (time.perf_counter() - began))
        outcomes.done_ids.extend(row[0] for row in rows)
        outcomes.done_tokens.extend(token for _ in rows)
        await link.once("flush", *outcomes.parameters())
        floor = max((row[5] for row in rows), default=FLOOR_SLACK) - FLOOR_SLACK
    return times
