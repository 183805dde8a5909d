"""How the rate goes with the number of worker processes, also with more of them than there are cores.

Invariants: the counts take turns, round by round, and the rates are those of the drain: the same run, the same window.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bench.drain import run_once
from bench.ours import Ours
from bench.parts import Setting, head, setting_of
from bench.server import open_server
from bench.spread import Spread, spread
from bench.workloads import WORKLOADS

__all__ = ["ProcsReport", "measure_procs", "procs_card"]


class AtCount(msgspec.Struct, frozen=True):
    """`of_best`: over the best of the same round."""

    tasks_per_second: Spread
    of_best: Spread
    client_cpu_us_per_task: Spread
    server_cpu_us_per_task: Spread | None


class ProcsReport(msgspec.Struct, frozen=True):
    bench: str
    setting: Setting
    tasks: int
    rounds: int
    batch: int
    workload: str
    counts: dict[int, AtCount]
    failures: list[str]


def measure_procs(
    *,
    counts: list[int],
    tasks: int,
    rounds: int,
    batch: int,
    workload: str,
    dsn: str | None,
    say: Callable[[str], None],
) -> ProcsReport:
    with open_server(dsn) as server:
        setting = setting_of(server)
        runs = []
        for number in range(1, rounds + 1):
            turn = (number - 1) % len(counts)
            for count in (*counts[turn:], *counts[:turn]):
                run, _ = run_once(
                    server, Ours(), WORKLOADS[workload], tasks=tasks, procs=count, batch=batch, number=number
                )
                runs.append((count, run))
                result = f"failed: {run.failed}" if run.failed else f"{run.tasks_per_second:,.0f} tasks/s"
                say(f"round {number} of {rounds}  {count:>3} processes  {result}")
    best = {
        number: max(run.tasks_per_second for _, run in runs if run.round == number) for number in range(1, rounds + 1)
    }
    found = {}
    for count in counts:
        good = [(run, run.effort, run.work) for other, run in runs if other == count and run.effort and run.work]
        if not good:
            continue
        server_cpu = [1e6 * work.server_cpu_seconds / tasks for _, _, work in good if work and work.server_cpu_seconds]
        found[count] = AtCount(
            tasks_per_second=spread([run.tasks_per_second for run, _, _ in good]),
            of_best=spread([run.tasks_per_second / best[run.round] for run, _, _ in good]),
            client_cpu_us_per_task=spread([1e6 * effort.cpu_seconds / tasks for _, effort, _ in good if effort]),
            server_cpu_us_per_task=spread(server_cpu) if server_cpu else None,
        )
    return ProcsReport(
        bench="procs",
        setting=setting,
        tasks=tasks,
        rounds=rounds,
        batch=batch,
        workload=workload,
        counts=found,
        failures=[f"round {run.round}, {count} processes: {run.failed}" for count, run in runs if run.failed],
    )


def procs_card(report: ProcsReport) -> str:
    title = f"processes: {report.tasks:,} tasks of {report.workload}, batch {report.batch}, {report.rounds} rounds"
    lines = [
        *head(report.setting, title),
        f"{'processes':<10}{'tasks/s: median (min - max)':>34}{'of the best':>24}{'CPU us c / s':>16}",
    ]
    for count, at in report.counts.items():
        rate, ratio, server = at.tasks_per_second, at.of_best, at.server_cpu_us_per_task
        cpu = f"{at.client_cpu_us_per_task.median:.1f} / {'' if server is None else f'{server.median:.1f}'}"
        lines.append(
            f"{count:<10}{f'{rate.median:,.0f} ({rate.min:,.0f} - {rate.max:,.0f})':>34}"
            f"{f'{ratio.median:.2f} ({ratio.min:.2f} - {ratio.max:.2f})':>24}{cpu:>16}"
        )
    return "\n".join(lines + [f"FAILED    {failure}" for failure in report.failures])
