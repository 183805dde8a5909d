"""Producers: single enqueues that commit on their own, over many connections, with and without our insert trigger.

Invariants: all variants insert by the same statement into a fresh copy of the same table; they take turns, round by
round; the connections stay open, and each has one commit under way at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from uuid import UUID

import asyncpg
import uvloop

from bench.harness.flags import add_number, add_server, seconds
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, format_spread, setting_of
from bench.harness.rounds import rotated
from bench.harness.server import Server, open_server
from bench.harness.spread import Spread, spread
from bench.scenario import Report
from pgtask._ids import first_id
from pgtask._postgres.store import statement

__all__ = ["ProducersScenario"]

_STEP = '{"Noop":{"Run":{"number":1}}}'
_NO_TRIGGER = "no trigger"
_DISABLE = "ALTER TABLE pg_task DISABLE TRIGGER pg_task_inserted"
_VARIANTS = {_NO_TRIGGER: None, "none asleep": None, "asleep elsewhere": "other", "asleep": "default"}
"""The queue of a session that sleeps all the time: each enqueue into it notifies."""


class ProducersReport(Report, frozen=True):
    """Enqueues per second by variant. `ratio`: the rate over that without our trigger, for each round."""

    setting: Setting
    connections: int
    seconds: float
    rounds: int
    rates: dict[str, Spread]
    ratio: dict[str, Spread]


class ProducersScenario:
    """The command `producers`."""

    name = "producers"
    help = "single enqueues over many connections, with and without the notifications of our trigger"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--connections", 24, "connections, each with one enqueue under way")
        parser.add_argument("--seconds", type=seconds, default=4.0, metavar="S", help="time of each (default: 4)")
        add_number(parser, "--rounds", 5, "rounds per variant")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> ProducersReport:
        rates: dict[str, list[float]] = {name: [] for name in _VARIANTS}
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            for number in range(1, arguments.rounds + 1):
                for name in rotated(list(_VARIANTS), number):
                    rate = _measure_variant(server, name, arguments.connections, arguments.seconds)
                    rates[name].append(rate)
                    progress(f"round {number} of {arguments.rounds}  {name:<17} {rate:,.0f}/s")
        without = rates[_NO_TRIGGER]
        return ProducersReport(
            bench="producers",
            setting=setting,
            connections=arguments.connections,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            rates={name: spread(numbers) for name, numbers in rates.items()},
            ratio={
                name: spread([one / other for one, other in zip(numbers, without, strict=True)])
                for name, numbers in rates.items()
            },
        )

    def card(self, report: ProducersReport) -> str:
        title = (
            f"single enqueues over {report.connections} connections for {report.seconds:g} s, {report.rounds} rounds; "
            "a worker that sleeps is a session that says so"
        )
        lines = [*card_head(report.setting, title), f"{'median (min - max)':<17}{'enqueues/s':>32}{'/ no trigger':>24}"]
        for name, rate in report.rates.items():
            ratio = format_spread(report.ratio[name], ".2f")
            lines.append(f"{name:<17}{format_spread(rate, ',.0f'):>32}{ratio:>24}")
        return "\n".join(lines)


def _measure_variant(server: Server, name: str, connections: int, time_limit: float) -> float:
    with server.fresh_database() as database:
        dsn = server.database(database)
        if name == _NO_TRIGGER:
            server.query(_DISABLE, dsn=dsn)
        server.query("CHECKPOINT")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_produce(dsn, _VARIANTS[name], connections, time_limit))


async def _produce(dsn: str, queue: str | None, connections: int, time_limit: float) -> float:
    """Return enqueues per second."""
    listener = await asyncpg.connect(dsn)
    producers = [await asyncpg.connect(dsn) for _ in range(connections)]
    try:
        if queue is not None:
            await listener.add_listener("pg_task_changed", lambda *_: None)
            await listener.fetch(statement("sleep"), [queue])
        began = time.monotonic()
        counts = await asyncio.gather(*(_enqueue_until(one, began + time_limit) for one in producers))
        return sum(counts) / (time.monotonic() - began)
    finally:
        for connection in (listener, *producers):
            await connection.close()


async def _enqueue_until(connection: asyncpg.Connection, end: float) -> int:
    insert = await connection.prepare(statement("enqueue_keyless"))
    count = 0
    while time.monotonic() < end:
        await insert.fetchval(UUID(int=first_id()), _STEP, None, None, "default", 0, None, None)
        count += 1
    return count
