"""Workflows: recorded steps a second, trigger to result of a one-step run, a replay, and what sleeping runs cost.

Invariants: the rate is between the first checkpoint and the last end that the database has noted, so the boot of the
workers is no part of it; the runs are there before it begins.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import msgspec

from bench.contender import RunFailed
from bench.flow_peers import Durable, DurablePeers
from bench.flow_workloads import five_steps, many_steps, one_step, sleeper
from bench.ours import command_of, environment, running_supervisor
from bench.parts import Setting, head, setting_of
from bench.process import run_measured
from bench.server import Server, open_server
from bench.spread import Spread, percentile, spread
from pgtask import Client

__all__ = ["FlowsReport", "fill_sleeping", "flows_card", "measure_flows"]

_STEPS = 5
_WARM_UP = 5
_WINDOW = "SELECT extract(epoch FROM max(ended_at) - min(started_at))::float8 FROM pg_task_runs"
_PAUSE = 0.05  # seconds between two runs of the latency, so that the fleet is idle


class FlowsReport(msgspec.Struct, frozen=True):
    """`result`: milliseconds from the call of `trigger` to the result of a one-step run. `replay`: milliseconds from a
    signal to the result of a run with so many recorded steps, and of one with a single step. `cpu_us_per_step`: of all
    workers, and of Postgres. `peers`: durable ones, by name, and `skipped` why others did not take part."""

    bench: str
    setting: Setting
    procs: int
    concurrent: int
    runs: int
    steps_per_second: Spread
    worker_cpu_us_per_step: Spread
    server_cpu_us_per_step: Spread | None
    commits_per_run: Spread
    result_p50: float
    result_p99: float
    replayed_steps: int
    replay_ms: Spread
    replay_of_one_ms: Spread
    peers: dict[str, Durable]
    skipped: dict[str, str]

    @property
    def failures(self) -> list[str]:
        return [failure for peer in self.peers.values() for failure in peer.failures]


def measure_flows(
    *,
    runs: int,
    procs: int,
    concurrent: int,
    rounds: int,
    samples: int,
    steps: int,
    peers: DurablePeers,
    dsn: str | None,
    say: Callable[[str], None],
) -> FlowsReport:
    with open_server(dsn) as server:
        setting = setting_of(server)
        drains = []
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}: {runs:,} runs of {_STEPS} steps")
            drains.append(_drain(server, runs, procs, concurrent))
            peers.measure(server, number, drains[-1].rate / _STEPS)
        say(f"trigger to result, {samples} times")
        latencies = _latency(server, procs, samples)
        say(f"replay of {steps:,} steps")
        replays, ones = _replays(server, steps, rounds), _replays(server, 1, rounds)
    cpu = [drain.server_cpu for drain in drains]
    return FlowsReport(
        bench="flows",
        setting=setting,
        procs=procs,
        concurrent=concurrent,
        runs=runs,
        steps_per_second=spread([drain.rate for drain in drains]),
        worker_cpu_us_per_step=spread([drain.worker_cpu for drain in drains]),
        server_cpu_us_per_step=None if None in cpu else spread([one for one in cpu if one is not None]),
        commits_per_run=spread([drain.commits for drain in drains]),
        result_p50=percentile(latencies, 50),
        result_p99=percentile(latencies, 99),
        replayed_steps=steps,
        replay_ms=spread(replays),
        replay_of_one_ms=spread(ones),
        peers=peers.report(),
        skipped=peers.skipped,
    )


class _Drain(msgspec.Struct, frozen=True):
    rate: float
    worker_cpu: float
    server_cpu: float | None
    commits: float


def _drain(server: Server, runs: int, procs: int, concurrent: int) -> _Drain:
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)

        async def fill() -> None:
            async with Client(dsn) as client:
                await client.trigger_many(five_steps, range(runs))

        asyncio.run(fill())
        server.query("VACUUM (ANALYZE) pg_task, pg_task_runs", dsn=dsn)
        server.query("CHECKPOINT", dsn=dsn)
        commits, cpu = _commits(server, database), server.cpu_seconds()
        flags = ("--concurrency", str(max(1, concurrent // procs)), "--burst", "--burst-horizon", "0")
        ended = run_measured(
            command_of(dsn, procs, *flags), directory=Path(directory), env=environment(Path(directory)), timeout=300
        )
        cpu_after = server.cpu_seconds()
        summary = json.loads(ended.stdout)
        if (summary["tasks"], summary["errors"]) != (runs, 0):
            raise RunFailed(f"{runs} runs should be done without errors, and it says {summary}")
        ((seconds,),) = server.query(_WINDOW, dsn=dsn)
        steps = runs * _STEPS
        return _Drain(
            rate=steps / seconds,
            worker_cpu=1e6 * ended.cpu_seconds / steps,
            server_cpu=None if cpu is None or cpu_after is None else 1e6 * (cpu_after - cpu) / steps,
            commits=(_commits(server, database) - commits) / runs,
        )


def _commits(server: Server, database: str) -> int:
    return int(server.value("SELECT xact_commit FROM pg_stat_database WHERE datname = $1", database))


def _latency(server: Server, procs: int, samples: int) -> list[float]:
    async def ask(dsn: str) -> list[float]:
        found = []
        async with Client(dsn) as client:
            for number in range(samples + _WARM_UP):
                began = time.perf_counter()
                run = await client.trigger(one_step, number)
                await run.result(timeout=30)
                found.append(1000 * (time.perf_counter() - began))
                await asyncio.sleep(_PAUSE)
        return found[_WARM_UP:]

    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)
        with running_supervisor(dsn, procs, Path(directory)):
            return asyncio.run(ask(dsn))


def _replays(server: Server, steps: int, rounds: int) -> list[float]:
    async def ask(dsn: str) -> list[float]:
        found = []
        async with Client(dsn) as client:
            for number in range(rounds):
                run = await client.trigger(many_steps, steps)
                await asyncio.to_thread(_wait_until_paused, server, dsn)
                began = time.perf_counter()
                await run.signal("go", number)
                await run.result(timeout=timedelta(seconds=30))
                found.append(1000 * (time.perf_counter() - began))
        return found

    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)
        with running_supervisor(dsn, 1, Path(directory)):
            return asyncio.run(ask(dsn))


def _wait_until_paused(server: Server, dsn: str) -> None:
    while not server.query("SELECT FROM pg_task WHERE locked_by IS NULL AND wakeup_at = 'infinity'", dsn=dsn):
        time.sleep(_PAUSE)


def fill_sleeping(dsn: str, runs: int) -> None:
    """So many runs that sleep for a day, each put to sleep by a worker."""

    async def fill() -> None:
        async with Client(dsn) as client:
            await client.trigger_many(sleeper, [None] * runs)

    asyncio.run(fill())
    with tempfile.TemporaryDirectory(prefix="pgtask-bench-") as name:
        directory = Path(name)
        command = command_of(dsn, 2, "--burst", "--burst-horizon", "0")
        run_measured(command, directory=directory, env=environment(directory), timeout=600)


def flows_card(report: FlowsReport) -> str:
    server = report.server_cpu_us_per_step
    return "\n".join(
        [
            *head(
                report.setting,
                f"flows: {report.runs:,} runs of {_STEPS} steps, {report.concurrent} at once in {report.procs} "
                "processes",
            ),
            f"recorded steps                  {report.steps_per_second.median:,.0f} a second "
            f"({report.steps_per_second.min:,.0f} to {report.steps_per_second.max:,.0f})",
            f"CPU of the workers, a step      {report.worker_cpu_us_per_step.median:.1f} us",
            f"CPU of Postgres, a step         {'' if server is None else f'{server.median:.1f} us'}",
            f"commits a run                   {report.commits_per_run.median:.3f}",
            f"trigger to result, one step     p50 {report.result_p50:.2f} ms, p99 {report.result_p99:.2f} ms",
            f"signal to result, {report.replayed_steps:>5,} steps   {report.replay_ms.median:.1f} ms "
            f"({report.replay_of_one_ms.median:.1f} ms with one step)",
            *_peer_lines(report),
        ]
    )


def _peer_lines(report: FlowsReport) -> Iterator[str]:
    """Runs a second, ours first, and how many times theirs that is."""
    if report.peers:
        yield ""
        yield f"{'pgtask':<14} {report.steps_per_second.median / _STEPS:>10,.0f} runs/s"
    for name, peer in report.peers.items():
        if peer.runs_per_second is not None and peer.ratio is not None:
            yield (
                f"{name:<14} {peer.runs_per_second.median:>10,.0f} runs/s   {peer.ratio.median:>8.1f} x "
                f"({peer.ratio.min:.1f} to {peer.ratio.max:.1f})   {peer.entrant.version}, {peer.entrant.tasks:,} runs"
            )
    yield from (f"failed: {failure}" for failure in report.failures)
    yield from (f"skipped {name}: {why}" for name, why in report.skipped.items())
