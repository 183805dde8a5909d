"""Numbers of the card, computed from raw runs: rates, ratios of the runs of one round, and the cost of each task.

Invariants: the raw counts of every run stay in the report, so that each number can be computed again; no number
includes a failed run, or a pair of runs of which one has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from bench.harness.contender import Effort
from bench.harness.meter import Work
from bench.harness.spread import Spread, spread

__all__ = ["ContenderRun", "Summary", "contender_run", "summarise"]


class ContenderRun(msgspec.Struct, frozen=True):
    """One contender in one round.

    `seconds` is the window of the rates, from the commit of the first claim to the commit of the last outcome;
    `before_seconds` and `after_seconds` are the time of the process before and after this window.
    """

    round: int
    contender: str
    failed: str | None = None
    tasks: int = 0
    steps: int = 0
    seconds: float = 0.0
    tasks_per_second: float = 0.0
    steps_per_second: float = 0.0
    process_seconds: float = 0.0
    before_seconds: float = 0.0
    after_seconds: float = 0.0
    effort: Effort | None = None
    work: Work | None = None


class Summary(msgspec.Struct, frozen=True):
    """One contender over all rounds. `ratio`: the rate of the reference over its own, for each round."""

    rounds: int
    failed: int
    tasks_per_second: Spread
    steps_per_second: Spread
    ratio: Spread | None
    process_seconds: Spread
    before_seconds: Spread
    after_seconds: Spread
    transactions_per_task: Spread
    wal_bytes_per_task: Spread
    full_page_images_per_task: Spread
    dead_rows_per_task: Spread
    hot_share: Spread | None
    client_cpu_us_per_task: Spread
    tree_cpu_us_per_task: Spread
    server_cpu_us_per_task: Spread | None
    autovacuums: Spread
    peak_rss_mb: Spread | None
    unique_mb: Spread | None


def contender_run(
    number: int, contender: str, tasks: int, steps_per_task: int, effort: Effort, work: Work
) -> ContenderRun:
    first, last = work.first_commit_at, work.last_commit_at
    # The first commit empties a table that fits in one batch: then the whole process is the only window.
    seconds = effort.window or (last - first if first is not None and last is not None else 0) or effort.seconds
    return ContenderRun(
        round=number,
        contender=contender,
        tasks=tasks,
        steps=tasks * steps_per_task,
        seconds=seconds,
        tasks_per_second=tasks / seconds,
        steps_per_second=tasks * steps_per_task / seconds,
        process_seconds=effort.seconds,
        before_seconds=0.0 if first is None else first - effort.began_at,
        after_seconds=0.0 if last is None else effort.began_at + effort.seconds - last,
        effort=effort,
        work=work,
    )


def summarise(runs: Sequence[ContenderRun], *, reference: str) -> dict[str, Summary]:
    """Summarise the runs by contender. A contender whose runs have all failed is left out."""
    rates = {run.round: run.tasks_per_second for run in runs if run.contender == reference and not run.failed}
    names = dict.fromkeys(run.contender for run in runs)
    found = {name: [run for run in runs if run.contender == name] for name in names}
    return {
        name: _summary(mine, None if name == reference else rates)
        for name, mine in found.items()
        if not all(run.failed for run in mine)
    }


def _summary(runs: Sequence[ContenderRun], rates: dict[int, float] | None) -> Summary:
    good = [run for run in runs if not run.failed]
    ratios = [rates[run.round] / run.tasks_per_second for run in good if rates and run.round in rates]

    def spread_of(number: Callable[[ContenderRun, Effort, Work], float | None]) -> Spread | None:
        numbers = [number(run, run.effort, run.work) for run in good if run.effort and run.work]
        present = [number for number in numbers if number is not None]
        return spread(present) if len(present) == len(good) else None

    def full_spread_of(number: Callable[[ContenderRun, Effort, Work], float]) -> Spread:
        found = spread_of(number)
        assert found is not None
        return found

    return Summary(
        rounds=len(good),
        failed=len(runs) - len(good),
        tasks_per_second=full_spread_of(lambda run, _, __: run.tasks_per_second),
        steps_per_second=full_spread_of(lambda run, _, __: run.steps_per_second),
        ratio=spread(ratios) if ratios else None,
        process_seconds=full_spread_of(lambda run, _, __: run.process_seconds),
        before_seconds=full_spread_of(lambda run, _, __: run.before_seconds),
        after_seconds=full_spread_of(lambda run, _, __: run.after_seconds),
        transactions_per_task=full_spread_of(lambda run, _, work: work.transactions / run.tasks),
        wal_bytes_per_task=full_spread_of(lambda run, _, work: work.wal_bytes / run.tasks),
        full_page_images_per_task=full_spread_of(lambda run, _, work: work.full_page_images / run.tasks),
        dead_rows_per_task=full_spread_of(lambda run, _, work: (work.updates + work.deletes) / run.tasks),
        hot_share=spread_of(lambda _, __, work: work.hot_updates / work.updates if work.updates else None),
        client_cpu_us_per_task=full_spread_of(lambda run, effort, _: 1e6 * effort.cpu_seconds / run.tasks),
        tree_cpu_us_per_task=full_spread_of(lambda run, effort, _: 1e6 * effort.tree_cpu_seconds / run.tasks),
        server_cpu_us_per_task=spread_of(
            lambda run, _, work: None if work.server_cpu_seconds is None else 1e6 * work.server_cpu_seconds / run.tasks
        ),
        autovacuums=full_spread_of(lambda _, __, work: work.autovacuums),
        peak_rss_mb=spread_of(lambda _, effort, __: _megabytes(effort.peak_rss_bytes)),
        unique_mb=spread_of(lambda _, effort, __: _megabytes(effort.unique_bytes)),
    )


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20
