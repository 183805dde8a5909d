"""Costs of a worker's own statements beside dead index entries, which a foreign snapshot keeps.

Invariants: the stage that is measured is the one of a worker, over a connection as a worker has it; the clean database
and the other one hold the same living tasks, and the worker does the same with them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import defaultdict
from statistics import median
from typing import Any

import asyncpg
import msgspec

from bench.harness.flags import add_number, add_server
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, setting_of
from bench.harness.server import Server, open_server
from bench.scenario import Report
from pgtask._postgres.store import Link
from pgtask._worker.claim import POLL_INTERVAL, Claim
from pgtask.config import Config

__all__ = ["DeadScenario"]

_KINDS = ("poll", "expire", "claim")  # what is to cost the same
_BATCH = 10
# As claims and flushes leave them, of tasks that fell due within the last hour; some of the leases would end after now.
_FINISHED = """
    INSERT INTO pg_task (step, wakeup_at, queue, priority)
    SELECT '{{"T":{{"S":null}}}}', now() - interval '1 h' + n * interval '1 h' / {0}, 'q' || n % 2, n / 2 % 2
    FROM generate_series(1, {0}) AS n;
    UPDATE pg_task
    SET locked_by = gen_random_uuid(),
        lock_expires_at = wakeup_at + (wakeup_at - now() + interval '1 h') / 10,
        claims = 1;
    DELETE FROM pg_task;
"""
_WAITING = """
    INSERT INTO pg_task (step, queue, priority)
    SELECT '{{"T":{{"S":null}}}}', 'q' || n % 2, n / 2 % 2 FROM generate_series(1, {0}) AS n
"""


class DeadTerms(msgspec.Struct, frozen=True):
    """Values of the flags."""

    dead: int
    turns: int


class DeadReport(Report, frozen=True):
    """Milliseconds by kind of statement: the first of a new worker, and the median of those that follow, in a clean
    database and beside dead entries; the ratio of those medians. `sweep`: the portions of sweeps, their median and
    maximum in milliseconds, and the share of the time that they took."""

    setting: Setting
    terms: DeadTerms
    clean: dict[str, float]
    dead: dict[str, float]
    first: dict[str, float]
    ratio: dict[str, float]
    sweep: dict[str, float]


class DeadScenario:
    """The command `dead`."""

    name = "dead"
    help = "polls, claims and expired leases beside dead index entries that a foreign snapshot keeps"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--dead", 3_000_000, "tasks that were claimed and finished since the snapshot began")
        add_number(parser, "--turns", 100, "times that the worker polls and claims")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> DeadReport:
        terms = DeadTerms(arguments.dead, arguments.turns)
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            progress("clean")
            clean, _ = _measure(server, terms, dead=0)
            progress(f"beside {terms.dead:,} dead entries in each index")
            times, took = _measure(server, terms, dead=terms.dead)
        portions = times.pop("portion", [0.0])
        medians = {kind: median(clean[kind]) for kind in _KINDS}, {kind: median(times[kind]) for kind in _KINDS}
        return DeadReport(
            bench="dead",
            setting=setting,
            terms=terms,
            clean=medians[0],
            dead=medians[1],
            first={kind: times[kind][0] for kind in _KINDS},
            ratio={kind: medians[1][kind] / medians[0][kind] for kind in _KINDS},
            sweep={"median": median(portions), "max": max(portions), "share": sum(portions) / 1000 / took},
        )

    def card(self, report: DeadReport) -> str:
        title = f"dead: {report.terms.dead:,} dead entries in each index, {report.terms.turns} turns"
        lines = [
            *card_head(report.setting, title),
            f"{'milliseconds, medians':<24}{'clean':>10}{'beside':>10}{'ratio':>8}{'the first':>12}",
        ]
        for kind in _KINDS:
            numbers = report.clean[kind], report.dead[kind], report.ratio[kind], report.first[kind]
            lines.append("{:<24}{:>10.2f}{:>10.2f}{:>8.2f}{:>12.1f}".format(kind, *numbers))
        sweep = report.sweep
        lines.append(
            f"portions of sweeps: median {sweep['median']:.1f} ms, max {sweep['max']:.1f} ms, "
            f"{100 * sweep['share']:.1f} % of the time"
        )
        return "\n".join(lines)


class _TimedLink(Link):
    """A link that notes the milliseconds of each statement by its kind."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, "bench")
        self.times: defaultdict[str, list[float]] = defaultdict(list)

    async def once(self, name: str, *args: Any, **options: Any) -> list[Any]:
        began = time.perf_counter()
        rows = await super().once(name, *args, **options)
        youngest = {"lanes": 1, "expire": 3}.get(name)
        kind = {"lanes": "poll"}.get(name, name)
        if youngest is not None and args[youngest] > float("-inf"):
            kind = "portion"
        self.times[kind].append(1000 * (time.perf_counter() - began))
        return rows


def _measure(server: Server, terms: DeadTerms, *, dead: int) -> tuple[dict[str, list[float]], float]:
    """Return the times of a worker's statements, and the seconds that it had for all of them."""
    with server.fresh_database() as database:
        return asyncio.run(_take_turns(server.database(database), terms, dead))


async def _take_turns(dsn: str, terms: DeadTerms, dead: int) -> tuple[dict[str, list[float]], float]:
    reader, writer = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    link = _TimedLink(dsn)
    try:
        # It could remove none of them, and would read all of them again and again.
        await writer.execute("ALTER TABLE pg_task SET (autovacuum_enabled = off)")
        await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class")
        if dead:
            await writer.execute(_FINISHED.format(dead))
        await writer.execute(_WAITING.format(2 * _BATCH * terms.turns))
        await writer.execute("CHECKPOINT")
        config = Config()
        claim = Claim(
            link,
            worker=os.urandom(8),
            queues=(),
            lease_timeout=config.lease_timeout,
            max_step_bytes=config.max_step_bytes,
            min_poll=1.0,
            max_poll=30.0,
        )
        await link.open()
        began = time.monotonic()
        for _ in range(terms.turns):
            claim.expired.free_soon()
            await claim.poll_lanes()
            await claim.claim_batch(_BATCH)
            await asyncio.sleep(POLL_INTERVAL)
        return dict(link.times), time.monotonic() - began
    finally:
        await link.close()
        await writer.close()
        await reader.close()
