"""Single enqueues with their commits, by each way into the table, beside a bare loop of INSERTs by the same driver.

Invariants: all methods write the same number of rows with the same columns into the same table of a fresh database, one
row a transaction; they take turns, round by round; connections are open before the clock starts.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from uuid import UUID

import asyncpg
import psycopg
import psycopg2

from bench.harness.contender import RunFailed
from bench.harness.flags import add_number, add_server
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, format_spread, setting_of
from bench.harness.rounds import rotated
from bench.harness.server import Server, open_server
from bench.harness.spread import Spread, spread
from bench.scenario import Report
from bench.workloads.workload import WORKLOADS
from pgtask import Client, SyncClient
from pgtask._ids import first_id
from pgtask._validate import encode, envelope_of

__all__ = ["DoorsScenario"]

_INSERT = "INSERT INTO pg_task (id, step, queue, priority) VALUES ({}, {}, {}, {}) RETURNING id"
_NUMBERED = _INSERT.format("$1", "$2", "$3", "$4")
_FORMAT = _INSERT.format("%s", "%s", "%s", "%s")
_OURS = {
    "Client": "asyncpg",
    "SyncClient": "asyncpg",
    "psycopg, conn=": "psycopg",
    "psycopg2, conn=": "psycopg2",
}
"""Our ways, and the bare loop that each is compared with."""


class DoorsReport(Report, frozen=True):
    """Enqueues per second by way. `ratio`: the rate of our way over that of the bare loop, for each round."""

    setting: Setting
    tasks: int
    rounds: int
    rates: dict[str, Spread]
    ratio: dict[str, Spread]


class DoorsScenario:
    """The command `doors`."""

    name = "doors"
    help = "single enqueues, beside a bare INSERT loop of the same driver"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--tasks", 5_000, "tasks in a round of each way")
        add_number(parser, "--rounds", 5, "rounds of each way")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> DoorsReport:
        rates: dict[str, list[float]] = {name: [] for name in _WAYS}
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            for number in range(1, arguments.rounds + 1):
                for name in rotated(list(_WAYS), number):
                    rates[name].append(_measure_way(server, name, arguments.tasks))
                    progress(f"round {number} of {arguments.rounds}  {name:<16} {rates[name][-1]:,.0f}/s")
        return DoorsReport(
            bench="doors",
            setting=setting,
            tasks=arguments.tasks,
            rounds=arguments.rounds,
            rates={name: spread(numbers) for name, numbers in rates.items()},
            ratio={
                ours: spread([one / other for one, other in zip(rates[ours], rates[bare], strict=True)])
                for ours, bare in _OURS.items()
            },
        )

    def card(self, report: DoorsReport) -> str:
        title = f"{report.tasks:,} single enqueues, {report.rounds} rounds; enqueues/s, each with its commit"
        lines = [
            *card_head(report.setting, title),
            f"{'median (min - max)':<18}{'enqueues/s':>28}{'this / the bare loop':>28}",
        ]
        for name, rate in report.rates.items():
            ratio = format_spread(report.ratio[name], ".2f") if name in report.ratio else ""
            lines.append(f"{name:<18}{format_spread(rate, ',.0f'):>28}{ratio:>28}")
        return "\n".join(lines)


def _measure_way(server: Server, name: str, tasks: int) -> float:
    """Return the enqueues per second."""
    with server.fresh_database() as database:
        server.query("CHECKPOINT")
        target = server.database(database)
        rate = tasks / _WAYS[name](target, tasks)
        rows = server.value("SELECT count(*) FROM pg_task", dsn=target)
    if rows != tasks:
        raise RunFailed(f"{name} wrote {rows} rows of {tasks}")
    return rate


# --- the ways


def _rows(tasks: int) -> Iterator[tuple[str, str, str, int]]:
    for number in range(tasks):
        step = WORKLOADS["noop"].make(number)
        text = envelope_of(*encode(step, 1_000_000))
        yield str(UUID(int=first_id())), text, step.policy.queue, step.policy.priority


async def _by_asyncpg(dsn: str, tasks: int) -> float:
    connection = await asyncpg.connect(dsn)
    began = time.monotonic()
    for row in _rows(tasks):
        await connection.fetchval(_NUMBERED, *row)
    seconds = time.monotonic() - began
    await connection.close()
    return seconds


async def _by_client(dsn: str, tasks: int) -> float:
    async with Client(dsn) as client:
        began = time.monotonic()
        for number in range(tasks):
            await client.enqueue(WORKLOADS["noop"].make(number))
        return time.monotonic() - began


def _by_sync_client(dsn: str, tasks: int) -> float:
    with SyncClient(dsn) as client:
        began = time.monotonic()
        for number in range(tasks):
            client.enqueue(WORKLOADS["noop"].make(number))
        return time.monotonic() - began


def _by_driver(connect: Callable[[str], Any], dsn: str, tasks: int) -> float:
    with closing(connect(dsn)) as connection:
        began = time.monotonic()
        for row in _rows(tasks):
            with connection.cursor() as cursor:
                cursor.execute(_FORMAT, row)
                cursor.fetchone()
            connection.commit()
        return time.monotonic() - began


def _by_door(connect: Callable[[str], Any], dsn: str, tasks: int) -> float:
    client = SyncClient()
    with closing(connect(dsn)) as connection:
        began = time.monotonic()
        for number in range(tasks):
            client.enqueue(WORKLOADS["noop"].make(number), conn=connection)
            connection.commit()
        return time.monotonic() - began


_WAYS: dict[str, Callable[[str, int], float]] = {
    "asyncpg": lambda dsn, tasks: asyncio.run(_by_asyncpg(dsn, tasks)),
    "Client": lambda dsn, tasks: asyncio.run(_by_client(dsn, tasks)),
    "SyncClient": _by_sync_client,
    "psycopg": lambda dsn, tasks: _by_driver(psycopg.connect, dsn, tasks),
    "psycopg, conn=": lambda dsn, tasks: _by_door(psycopg.connect, dsn, tasks),
    "psycopg2": lambda dsn, tasks: _by_driver(psycopg2.connect, dsn, tasks),
    "psycopg2, conn=": lambda dsn, tasks: _by_door(psycopg2.connect, dsn, tasks),
}
