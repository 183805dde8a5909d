"""The compiled stages beside plain Python: microseconds for each no-op task, without Postgres and without a network.

Invariants: both sides get the same rows and end with the same columns for the flush; both run on uvloop, with the
garbage collector as it is by default; the two take turns, round by round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import UUID, uuid4

import msgspec
import uvloop

from bench import plain
from bench.floor import envelope
from bench.machine import commit, machine, versions
from bench.spread import Spread, spread
from bench.workloads import WORKLOADS, app
from pgtask._fastpath import Leases, Table
from pgtask._worker.dispatch import Dispatch
from pgtask.config import Config

__all__ = ["StagesReport", "measure_stages", "stages_card"]

_BATCH = 500


class Stage(msgspec.Struct, frozen=True):
    """Microseconds for each task, compiled and plain, and plain / compiled of each round."""

    compiled: Spread
    plain: Spread
    ratio: Spread


class StagesReport(msgspec.Struct, frozen=True):
    bench: str
    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    tasks: int
    rounds: int
    stages: dict[str, Stage]


def measure_stages(*, tasks: int, rounds: int) -> StagesReport:
    about = machine()
    step = WORKLOADS["noop"].make(100_000)
    text = envelope(step)
    batches = [[(uuid4(), text, 0, 1, None) for _ in range(_BATCH)] for _ in range(-(-tasks // _BATCH))]
    return StagesReport(
        bench="stages",
        commit=commit(),
        machine=about,
        versions=versions(),
        tasks=len(batches) * _BATCH,
        rounds=rounds,
        stages={
            "decode: envelope to step": _compare(
                len(batches), rounds, lambda: _decode(Table(app), batches), lambda: _decode(plain.Table(app), batches)
            ),
            "all: rows to leases, decode, dispatch, outcomes, columns": _compare(
                len(batches), rounds, lambda: _on_loop(_compiled(batches)), lambda: _on_loop(_plain(batches))
            ),
        },
    )


def stages_card(report: StagesReport) -> str:
    lines = [
        f"{report.tasks:,} no-op tasks in batches of {_BATCH}, {report.rounds} rounds; us / task",
        f"machine   {', '.join(f'{name} {value}' for name, value in report.machine.items())}",
        f"versions  {', '.join(f'{name} {value}' for name, value in report.versions.items())}",
        "",
        f"{'median (min - max)':<60}{'compiled':>24}{'plain':>24}{'plain / compiled':>24}",
    ]
    for name, stage in report.stages.items():
        cells = (f"{of.median:.2f} ({of.min:.2f} - {of.max:.2f})" for of in (stage.compiled, stage.plain, stage.ratio))
        lines.append(f"{name:<60}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _compare(batches: int, rounds: int, compiled: Callable[[], float], plain: Callable[[], float]) -> Stage:
    """Each side returns seconds of CPU for all batches."""
    factor = 1e6 / (batches * _BATCH)
    pairs = [(compiled() * factor, plain() * factor) for _ in range(rounds)]
    return Stage(
        compiled=spread([ours for ours, _ in pairs]),
        plain=spread([theirs for _, theirs in pairs]),
        ratio=spread([theirs / ours for ours, theirs in pairs]),
    )


def _decode(table: Table | plain.Table, batches: list[list[Any]]) -> float:
    decode = table.decode
    before = time.process_time()
    for rows in batches:
        for row in rows:
            decode(row[1])
    return time.process_time() - before


def _on_loop(main: Coroutine[Any, Any, float]) -> float:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def _compiled(batches: list[list[Any]]) -> float:
    """As the worker's loop does it, with the database left out."""
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
        claimed, _ = leases.claimed(rows, _token(), 0.0)
        dispatch.admit(claimed)
        while len(leases):
            await ready.wait()
            ready.clear()
            outcomes = dispatch.take()
            outcomes.parameters()
            for lease in outcomes.done:
                leases.remove(lease)
    used = time.process_time() - before
    dispatch.close()
    return used


async def _plain(batches: list[list[Any]]) -> float:
    dispatcher = plain.Dispatcher(plain.Table(app))
    before = time.process_time()
    for rows in batches:
        await dispatcher.run(dispatcher.claimed(rows, _token()))
        list(dispatcher.take())
    return time.process_time() - before


def _token() -> UUID:
    return uuid4()


def _raise(error: BaseException) -> None:
    raise error
