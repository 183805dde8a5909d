"""The compiled stages beside plain Python: microseconds for each no-op task, without Postgres and without a network.

Invariants: both sides get the same rows and end with the same columns for the flush; both run on uvloop, with the
default garbage collector; the two take turns, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import uuid4

import msgspec
import uvloop

from bench.harness.fill import encode_step
from bench.harness.flags import add_number
from bench.harness.machine import current_commit, machine_facts, package_versions
from bench.harness.progress import Progress
from bench.harness.report import fact_line, format_spread
from bench.harness.spread import Spread, spread
from bench.scenario import Report
from bench.scenarios.plain import PlainDispatcher, PlainTable
from bench.workloads.app import app
from bench.workloads.workload import WORKLOADS
from pgtask._fastpath import Leases, Table
from pgtask._worker.dispatch import Dispatch
from pgtask.config import Config

__all__ = ["StagesScenario"]

_BATCH = 500


class StageCost(msgspec.Struct, frozen=True):
    """Microseconds for each task, compiled and plain. `ratio`: plain over compiled, for each round."""

    compiled: Spread
    plain: Spread
    ratio: Spread


class StagesReport(Report, frozen=True):
    """Cost by stage. It has no setting of a server, since it needs none."""

    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    tasks: int
    rounds: int
    stages: dict[str, StageCost]


class StagesScenario:
    """The command `stages`."""

    name = "stages"
    help = "the compiled stages, beside plain Python"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--tasks", 100_000, "tasks in a round")
        add_number(parser, "--rounds", 5, "rounds")

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> StagesReport:
        machine = machine_facts()
        text = encode_step(WORKLOADS["noop"].make(100_000))
        count, rounds = -(-arguments.tasks // _BATCH), arguments.rounds
        batches = [[(uuid4(), text, 0, 1, None) for _ in range(_BATCH)] for _ in range(count)]
        return StagesReport(
            bench="stages",
            commit=current_commit(),
            machine=machine,
            versions=package_versions(),
            tasks=count * _BATCH,
            rounds=rounds,
            stages={
                "decode: envelope to step": _compare(
                    count,
                    rounds,
                    lambda: _decode_all(Table(app), batches),
                    lambda: _decode_all(PlainTable(app), batches),
                ),
                "all: rows to leases, decode, dispatch, outcomes, columns": _compare(
                    count,
                    rounds,
                    lambda: _run_on_loop(_run_compiled(batches)),
                    lambda: _run_on_loop(_run_plain(batches)),
                ),
            },
        )

    def card(self, report: StagesReport) -> str:
        lines = [
            f"{report.tasks:,} no-op tasks in batches of {_BATCH}, {report.rounds} rounds; us / task",
            fact_line("machine", report.machine),
            fact_line("versions", report.versions),
            "",
            f"{'median (min - max)':<60}{'compiled':>24}{'plain':>24}{'plain / compiled':>24}",
        ]
        for name, stage in report.stages.items():
            cells = (format_spread(numbers, ".2f") for numbers in (stage.compiled, stage.plain, stage.ratio))
            lines.append(f"{name:<60}" + "".join(f"{cell:>24}" for cell in cells))
        return "\n".join(lines)


def _compare(batches: int, rounds: int, compiled: Callable[[], float], plain: Callable[[], float]) -> StageCost:
    """Run both sides in turn. Each returns its seconds of CPU for all batches."""
    factor = 1e6 / (batches * _BATCH)
    pairs = [(compiled() * factor, plain() * factor) for _ in range(rounds)]
    return StageCost(
        compiled=spread([ours for ours, _ in pairs]),
        plain=spread([theirs for _, theirs in pairs]),
        ratio=spread([theirs / ours for ours, theirs in pairs]),
    )


def _decode_all(table: Table | PlainTable, batches: list[list[Any]]) -> float:
    decode = table.decode
    before = time.process_time()
    for rows in batches:
        for row in rows:
            decode(row[1])
    return time.process_time() - before


def _run_on_loop(main: Coroutine[Any, Any, float]) -> float:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def _run_compiled(batches: list[list[Any]]) -> float:
    """Run the stages as a worker does, without the database."""
    config = Config()
    leases = Leases()
    ready = asyncio.Event()
    dispatch = Dispatch(
        Table(app),
        leases,
        concurrency=config.concurrency,
        max_step_bytes=config.max_step_bytes,
        wake=ready.set,
        unknown=lambda _: None,
        broke=_raise,
    )
    before = time.process_time()
    for rows in batches:
        claimed, _ = leases.add_claimed(rows, uuid4(), 0.0)
        dispatch.admit(claimed)
        while len(leases):
            await ready.wait()
            ready.clear()
            outcomes = dispatch.take_outcomes()
            outcomes.parameters()
            for lease in outcomes.done:
                leases.remove(lease)
    used = time.process_time() - before
    dispatch.close()
    return used


async def _run_plain(batches: list[list[Any]]) -> float:
    dispatcher = PlainDispatcher(PlainTable(app))
    before = time.process_time()
    for rows in batches:
        await dispatcher.run(dispatcher.claimed(rows, uuid4()))
        list(dispatcher.take())
    return time.process_time() - before


def _raise(error: BaseException) -> None:
    raise error
