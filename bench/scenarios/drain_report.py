"""Report of a drain, and its card: one page of text about the setting, the contenders and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from bench.harness.contender import Latency
from bench.harness.paths import PEERS, PEERS_HOME
from bench.harness.report import fact_line, failure_lines, format_spread
from bench.harness.rounds import Entrant
from bench.harness.spread import Spread, spread
from bench.harness.summary import ContenderRun, Summary
from bench.scenario import Report

__all__ = ["DrainReport", "DrainTerms", "drain_card"]

_LABEL = 34
_COLUMN = 30
_MAX_COLUMNS = 4  # contenders side by side

_Row: TypeAlias = tuple[str, Callable[[Summary], Spread | None], str]
_ROWS: Sequence[_Row] = (
    ("tasks/s", lambda summary: summary.tasks_per_second, ",.0f"),
    ("steps/s", lambda summary: summary.steps_per_second, ",.0f"),
    ("pgtask / this, round by round", lambda summary: summary.ratio, ".2f"),
    ("whole process, s", lambda summary: summary.process_seconds, ".2f"),
    ("  before the first claim, s", lambda summary: summary.before_seconds, ".2f"),
    ("  after the last outcome, s", lambda summary: summary.after_seconds, ".2f"),
    ("transactions / task", lambda summary: summary.transactions_per_task, ".4f"),
    ("WAL bytes / task", lambda summary: summary.wal_bytes_per_task, ",.0f"),
    ("  full page images / task", lambda summary: summary.full_page_images_per_task, ".4f"),
    ("dead rows / task", lambda summary: summary.dead_rows_per_task, ".2f"),
    ("HOT share of the updates", lambda summary: summary.hot_share, ".2f"),
    ("CPU us / task, client", lambda summary: summary.client_cpu_us_per_task, ".2f"),
    ("  with boot and parent", lambda summary: summary.tree_cpu_us_per_task, ".2f"),
    ("CPU us / task, Postgres", lambda summary: summary.server_cpu_us_per_task, ".2f"),
    ("autovacuums of the table", lambda summary: summary.autovacuums, ".0f"),
    ("peak RSS of a worker, MB", lambda summary: summary.peak_rss_mb, ".1f"),
    ("  unique at its end, MB", lambda summary: summary.unique_mb, ".1f"),
)


class DrainTerms(msgspec.Struct, frozen=True):
    """Values of the flags."""

    tasks: int
    procs: int
    rounds: int
    workload: str
    batch: int
    latency_seconds: float
    contenders: str
    dsn: str | None = None
    peers: Path = PEERS
    peers_home: Path = PEERS_HOME


class DrainReport(Report, frozen=True):
    """Everything about one drain, raw runs included."""

    at: str
    command: str
    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    server: str
    settings: dict[str, str]
    session_settings: dict[str, str]
    terms: DrainTerms
    steps_per_task: int
    contenders: dict[str, Entrant]
    skipped: dict[str, str]
    runs: list[ContenderRun]
    summary: dict[str, Summary]
    enqueue_many_per_second: list[float]
    latency: dict[str, Latency]
    latency_failed: dict[str, str]

    @property
    def failures(self) -> list[str]:
        failed = [f"round {run.round}, {run.contender}: {run.failed}" for run in self.runs if run.failed]
        return failed + [f"latency of {name}: {reason}" for name, reason in self.latency_failed.items()]


# --- the card


def drain_card(report: DrainReport) -> str:
    table = ("", *_table(report)) if len(report.summary) <= _MAX_COLUMNS else ()
    return "\n".join([*_head(report), "", *_lines(report), *table, "", *_foot(report)])


def _head(report: DrainReport) -> Iterator[str]:
    terms = report.terms
    steps = f"{report.steps_per_task} step{'s' if report.steps_per_task > 1 else ''} each"
    yield report.command
    yield (
        f"drain of {terms.tasks:,} tasks of {terms.workload} ({steps}), {terms.procs} processes or connections, "
        f"batch {terms.batch}, {terms.rounds} rounds"
    )
    yield f"at        {report.at}, commit {report.commit}"
    yield fact_line("machine", report.machine)
    yield fact_line("versions", report.versions)
    yield f"server    {report.server}"
    yield fact_line("settings", report.settings)
    for name, entrant in report.contenders.items():
        facts = [f"{entrant.about} ({entrant.version})"]
        if entrant.tasks != terms.tasks:
            facts.append(f"{entrant.tasks:,} tasks only")
        if entrant.procs != terms.procs:
            facts.append(f"{entrant.procs:,} processes only")
        yield f"{name:<13} {'; '.join(facts)}"
    for name, reason in report.skipped.items():
        yield f"{name:<13} skipped: {reason}"


def _lines(report: DrainReport) -> Iterator[str]:
    """Format one line for each contender, the fastest first."""
    widths = (30, 22, 9, 9, 9, 16, 8, 16)
    names = ("tasks/s", "pgtask / this", "tx/task", "WAL/task", "dead", "CPU us c / s", "peak MB", "p50 / p99 ms")
    yield f"{'median (min - max)':<20}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    for name, summary in sorted(report.summary.items(), key=lambda item: -item[1].tasks_per_second.median):
        latency = report.latency.get(name)
        server = summary.server_cpu_us_per_task
        cells = (
            _cell(summary.tasks_per_second, ",.0f"),
            _cell(summary.ratio, ".2f"),
            f"{summary.transactions_per_task.median:.4f}",
            f"{summary.wal_bytes_per_task.median:,.0f}",
            f"{summary.dead_rows_per_task.median:.2f}",
            f"{summary.tree_cpu_us_per_task.median:,.1f} / {'' if server is None else f'{server.median:,.1f}'}",
            "" if summary.peak_rss_mb is None else f"{summary.peak_rss_mb.median:.0f}",
            "" if latency is None else f"{latency.start_p50:.2f} / {latency.start_p99:.2f}",
        )
        yield f"{name:<20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _table(report: DrainReport) -> Iterator[str]:
    yield f"{'median (min - max)':<{_LABEL}}" + "".join(f"{name:>{_COLUMN}}" for name in report.summary)
    for label, pick, form in _ROWS:
        cells = [_cell(pick(summary), form) for summary in report.summary.values()]
        if any(cells):
            yield f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _foot(report: DrainReport) -> Iterator[str]:
    if report.enqueue_many_per_second:
        yield f"enqueue_many, tasks/s: {_cell(spread(report.enqueue_many_per_second), ',.0f')}"
    for name, latency in report.latency.items():
        maximum = "" if latency.start_max is None else f", most {latency.start_max:.2f} ms"
        yield (
            f"{name}, idle fleet, {latency.per_second:g}/s, {latency.samples} tasks: from the call of enqueue to the "
            f"start of the step p50 {latency.start_p50:.2f} ms, p99 {latency.start_p99:.2f} ms{maximum}"
        )
        yield (
            f"  of which the call itself, with its commit: p50 {latency.enqueue_p50:.2f} ms, "
            f"p99 {latency.enqueue_p99:.2f} ms"
        )
    yield from failure_lines(report.failures)


def _cell(numbers: Spread | None, form: str) -> str:
    if numbers is None:
        return ""
    return format(numbers.median, form) if numbers.min == numbers.max else format_spread(numbers, form)
