"""Rate by the number of worker processes, also with more of them than the machine has cores.

Invariants: the counts take turns, round by round; a run and its rate are those of the drain.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec

from bench.contenders.pgtask import Pgtask
from bench.harness.flags import add_batch, add_number, add_server, add_workload, positive_numbers
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, failure_lines, format_spread, setting_of
from bench.harness.rounds import rotated, run_contender
from bench.harness.server import open_server
from bench.harness.spread import Spread, spread
from bench.harness.summary import ContenderRun
from bench.scenario import Report
from bench.workloads.workload import WORKLOADS

__all__ = ["ProcsScenario"]


class CountSummary(msgspec.Struct, frozen=True):
    """Runs with one number of processes. `of_best`: the rate over the best one of the same round."""

    tasks_per_second: Spread
    of_best: Spread
    client_cpu_us_per_task: Spread
    server_cpu_us_per_task: Spread | None


class ProcsReport(Report, frozen=True):
    """Rates by the number of processes."""

    setting: Setting
    tasks: int
    rounds: int
    batch: int
    workload: str
    counts: dict[int, CountSummary]
    failures: list[str]


class ProcsScenario:
    """The command `procs`."""

    name = "procs"
    help = "rate by the number of worker processes"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--counts",
            type=positive_numbers,
            default=[1, 2, 4, 8, 16],
            metavar="N,N",
            help="worker processes (default: 1,2,4,8,16)",
        )
        add_number(parser, "--tasks", 200_000, "tasks in a run")
        add_number(parser, "--rounds", 5, "runs of each count")
        add_batch(parser)
        add_workload(parser, "task to run")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> ProcsReport:
        workload = WORKLOADS[arguments.workload]
        size = {"tasks": arguments.tasks, "batch": arguments.batch}
        runs: list[tuple[int, ContenderRun]] = []
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            for number in range(1, arguments.rounds + 1):
                for count in rotated(arguments.counts, number):
                    run, _ = run_contender(server, Pgtask(), workload, procs=count, number=number, **size)
                    runs.append((count, run))
                    result = f"failed: {run.failed}" if run.failed else f"{run.tasks_per_second:,.0f} tasks/s"
                    progress(f"round {number} of {arguments.rounds}  {count:>3} processes  {result}")
        return ProcsReport(
            bench="procs",
            setting=setting,
            tasks=arguments.tasks,
            rounds=arguments.rounds,
            batch=arguments.batch,
            workload=arguments.workload,
            counts=_summarise_counts(runs, arguments.tasks),
            failures=[f"round {run.round}, {count} processes: {run.failed}" for count, run in runs if run.failed],
        )

    def card(self, report: ProcsReport) -> str:
        title = f"processes: {report.tasks:,} tasks of {report.workload}, batch {report.batch}, {report.rounds} rounds"
        lines = [
            *card_head(report.setting, title),
            f"{'processes':<10}{'tasks/s: median (min - max)':>34}{'of the best':>24}{'CPU us c / s':>16}",
        ]
        for count, result in report.counts.items():
            server = result.server_cpu_us_per_task
            cpu = f"{result.client_cpu_us_per_task.median:.1f} / {'' if server is None else f'{server.median:.1f}'}"
            lines.append(
                f"{count:<10}{format_spread(result.tasks_per_second, ',.0f'):>34}"
                f"{format_spread(result.of_best, '.2f'):>24}{cpu:>16}"
            )
        return "\n".join(lines + failure_lines(report.failures))


def _summarise_counts(runs: Sequence[tuple[int, ContenderRun]], tasks: int) -> dict[int, CountSummary]:
    """Summarise the runs by count. A count whose runs have all failed is left out."""
    best: dict[int, float] = {}
    for _, run in runs:
        best[run.round] = max(run.tasks_per_second, best.get(run.round, 0.0))
    found = {}
    for count in dict.fromkeys(count for count, _ in runs):
        good = [(run, run.effort, run.work) for other, run in runs if other == count and run.effort and run.work]
        if not good:
            continue
        server_cpu = [1e6 * work.server_cpu_seconds / tasks for _, _, work in good if work.server_cpu_seconds]
        found[count] = CountSummary(
            tasks_per_second=spread([run.tasks_per_second for run, _, _ in good]),
            of_best=spread([run.tasks_per_second / best[run.round] for run, _, _ in good]),
            client_cpu_us_per_task=spread([1e6 * effort.cpu_seconds / tasks for _, effort, _ in good]),
            server_cpu_us_per_task=spread(server_cpu) if server_cpu else None,
        )
    return found
