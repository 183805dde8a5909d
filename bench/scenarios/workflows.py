"""Workflows: recorded steps per second, the time from trigger to result of a one-step run, and the time of a replay.

Invariants: the window of the rate is from the first checkpoint to the last end of a run in the database, so that the
boot of the workers is no part of it; all runs are enqueued before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import msgspec

from bench.harness.contender import RunFailed
from bench.harness.flags import add_number, add_peers, add_server
from bench.harness.process import run_measured
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, setting_of
from bench.harness.server import Server, open_server
from bench.harness.spread import Spread, percentile, spread
from bench.harness.supervisor import clean_environment, running_supervisor, supervisor_command
from bench.scenario import Report
from bench.scenarios.workflow_floor import drain_by_pgbench
from bench.scenarios.workflow_peers import DurablePeers, PeerSummary
from bench.workloads.workflows import FIVE, five_steps, many_steps, one_step
from pgtask import Client
from pgtask._cpus import default_procs

__all__ = ["WorkflowsScenario"]

_STEPS = len(FIVE)
_WARM_UP = 5
_WINDOW = "SELECT extract(epoch FROM max(ended_at) - min(started_at))::float8, count(ended_at) FROM pg_task_runs"
_PAUSE = 0.05  # seconds before each sample of the latency, so that the fleet is idle


class FlowsReport(Report, frozen=True):
    """Rates and times of workflows.

    `result_*`: milliseconds from the call of `trigger` to the result of a one-step run. `replay_*`: milliseconds from a
    signal to the result of a run with `replayed_steps` recorded steps, and of a run with one. `*_cpu_us_per_step`: of
    all workers, and of Postgres. `floor_steps_per_second`: the same rows by the same statements, by pgbench;
    `of_floor`: the rate over that of the same round. `peers`: the durable peers by name. `skipped`: the reasons of
    those that could not take part.
    """

    setting: Setting
    procs: int
    concurrent: int
    runs: int
    steps_per_second: Spread
    worker_cpu_us_per_step: Spread
    server_cpu_us_per_step: Spread | None
    commits_per_run: Spread
    floor_steps_per_second: Spread
    of_floor: Spread
    result_p50: float
    result_p99: float
    replayed_steps: int
    replay_ms: Spread
    replay_of_one_ms: Spread
    peers: dict[str, PeerSummary]
    skipped: dict[str, str]

    @property
    def failures(self) -> list[str]:
        return [failure for peer in self.peers.values() for failure in peer.failures]


class WorkflowsScenario:
    """The command `flows`."""

    name = "flows"
    help = "workflows: recorded steps, trigger to result, replay"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--runs", 10_000, "runs of five steps")
        add_number(parser, "--procs", default_procs(), "worker processes")
        add_number(parser, "--concurrent", 500, "runs under way at once, in all processes")
        add_number(parser, "--rounds", 5, "rounds")
        add_number(parser, "--samples", 100, "samples of the time from the trigger to the result")
        add_number(parser, "--steps", 1000, "recorded steps of the replayed run")
        add_number(parser, "--peer-runs", 2_000, "runs of five steps by each durable peer")
        add_peers(parser, "")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> FlowsReport:
        runs, procs, rounds, steps = arguments.runs, arguments.procs, arguments.rounds, arguments.steps
        peers = DurablePeers(
            arguments.contenders,
            arguments.peer_runs,
            procs,
            peers=arguments.peers,
            homes=arguments.peers_home,
            progress=progress,
        )
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            drains: list[_RunsDrain] = []
            floors: list[float] = []
            for number in range(1, rounds + 1):
                progress(f"round {number} of {rounds}: {runs:,} runs of {_STEPS} steps")
                drains.append(_drain_runs(server, runs, procs, arguments.concurrent))
                floors.append(_drain_floor(server, runs, procs, arguments.concurrent))
                peers.measure(server, number, drains[-1].rate / _STEPS)
            progress(f"trigger to result, {arguments.samples} times")
            latencies = _measure_latency(server, procs, arguments.samples)
            progress(f"replay of {steps:,} steps")
            replays, replays_of_one = _time_replays(server, steps, rounds), _time_replays(server, 1, rounds)
        return FlowsReport(
            bench="flows",
            setting=setting,
            procs=procs,
            concurrent=arguments.concurrent,
            runs=runs,
            steps_per_second=spread([drain.rate for drain in drains]),
            worker_cpu_us_per_step=spread([drain.worker_cpu for drain in drains]),
            server_cpu_us_per_step=_spread_server_cpu(drains),
            commits_per_run=spread([drain.commits for drain in drains]),
            floor_steps_per_second=spread(floors),
            of_floor=spread([drain.rate / floor for drain, floor in zip(drains, floors, strict=True)]),
            result_p50=percentile(latencies, 50),
            result_p99=percentile(latencies, 99),
            replayed_steps=steps,
            replay_ms=spread(replays),
            replay_of_one_ms=spread(replays_of_one),
            peers=peers.summarise(),
            skipped=peers.skipped,
        )

    def card(self, report: FlowsReport) -> str:
        server = report.server_cpu_us_per_step
        return "\n".join(
            [
                *card_head(
                    report.setting,
                    f"flows: {report.runs:,} runs of {_STEPS} steps, {report.concurrent} at once in {report.procs} "
                    "processes",
                ),
                f"recorded steps                  {report.steps_per_second.median:,.0f} a second "
                f"({report.steps_per_second.min:,.0f} to {report.steps_per_second.max:,.0f})",
                f"the same rows by pgbench        {report.floor_steps_per_second.median:,.0f} a second, "
                f"pgtask / this {report.of_floor.median:.2f} ({report.of_floor.min:.2f} to {report.of_floor.max:.2f})",
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
    """Format the runs per second, ours first, and the ratio of ours to that of each peer."""
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
    yield from (f"skipped {name}: {reason}" for name, reason in report.skipped.items())


class _RunsDrain(msgspec.Struct, frozen=True):
    """One drain of five-step runs: steps per second, CPU in microseconds per step, commits per run."""

    rate: float
    worker_cpu: float
    server_cpu: float | None
    commits: float


@contextmanager
def _triggered_runs(server: Server, runs: int) -> Iterator[tuple[str, str]]:
    """Make a database with so many runs of five steps, all due; yield its name and its DSN."""
    with server.fresh_database() as database:
        dsn = server.database(database)

        async def trigger() -> None:
            async with Client(dsn) as client:
                await client.trigger_many(five_steps, range(runs))

        asyncio.run(trigger())
        server.query("VACUUM (ANALYZE) pg_task, pg_task_runs", dsn=dsn)
        server.query("CHECKPOINT", dsn=dsn)
        yield database, dsn


def _drain_floor(server: Server, runs: int, procs: int, concurrent: int) -> float:
    """Return the recorded steps per second of pgbench."""
    with _triggered_runs(server, runs) as (_, dsn):
        drain_by_pgbench(dsn, runs=runs, steps=FIVE, procs=procs, batch=max(1, concurrent // procs))
        ((seconds, ended),) = server.query(_WINDOW, dsn=dsn)
        if ended != runs:
            raise RunFailed(f"pgbench has ended {ended} runs of {runs}")
        return runs * _STEPS / float(seconds)


def _drain_runs(server: Server, runs: int, procs: int, concurrent: int) -> _RunsDrain:
    with (
        _triggered_runs(server, runs) as (database, dsn),
        tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
    ):
        commits, cpu = _count_commits(server, database), server.cpu_seconds()
        flags = ("--concurrency", str(max(1, concurrent // procs)), "--burst", "--burst-horizon", "0")
        result = run_measured(
            supervisor_command(dsn, procs, *flags),
            directory=Path(directory),
            env=clean_environment(Path(directory)),
            timeout=300,
        )
        cpu_after = server.cpu_seconds()
        summary = json.loads(result.stdout)
        if (summary["tasks"], summary["errors"]) != (runs, 0):
            raise RunFailed(f"{runs} runs should end without errors, but the summary says {summary}")
        ((seconds, _),) = server.query(_WINDOW, dsn=dsn)
        steps = runs * _STEPS
        return _RunsDrain(
            rate=steps / seconds,
            worker_cpu=1e6 * result.cpu_seconds / steps,
            server_cpu=None if cpu is None or cpu_after is None else 1e6 * (cpu_after - cpu) / steps,
            commits=(_count_commits(server, database) - commits) / runs,
        )


def _spread_server_cpu(drains: Sequence[_RunsDrain]) -> Spread | None:
    """Return the spread of all drains, or None if one has no CPU time of Postgres."""
    found = [drain.server_cpu for drain in drains if drain.server_cpu is not None]
    return spread(found) if len(found) == len(drains) else None


def _count_commits(server: Server, database: str) -> int:
    return int(server.value("SELECT xact_commit FROM pg_stat_database WHERE datname = $1", database))


def _measure_latency(server: Server, procs: int, samples: int) -> list[float]:
    """Return the milliseconds from the trigger to the result of each sample."""

    async def sample(dsn: str) -> list[float]:
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
            return asyncio.run(sample(dsn))


def _time_replays(server: Server, steps: int, rounds: int) -> list[float]:
    """Return the milliseconds from a signal to the result of a run with this many recorded steps."""

    async def sample(dsn: str) -> list[float]:
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
            return asyncio.run(sample(dsn))


def _wait_until_paused(server: Server, dsn: str) -> None:
    while not server.query("SELECT FROM pg_task WHERE locked_by IS NULL AND wakeup_at = 'infinity'", dsn=dsn):
        time.sleep(_PAUSE)
