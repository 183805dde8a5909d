"""The card: one page of text that says what was measured, where, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.drain import Report
from bench.spread import Spread, spread
from bench.summary import Summary

__all__ = ["card"]

_LABEL = 34
_COLUMN = 30

_Row = tuple[str, Callable[[Summary], Spread | None], str]
_ROWS: Sequence[_Row] = (
    ("tasks/s", lambda summary: summary.tasks_per_second, ",.0f"),
    ("steps/s", lambda summary: summary.steps_per_second, ",.0f"),
    ("pgtask / this, round by round", lambda summary: summary.ratio, ".2f"),
    ("whole process, s", lambda summary: summary.process_seconds, ".2f"),
    ("  before the first claim, s", lambda summary: summary.before_seconds, ".2f"),
    ("  after the last outcome, s", lambda summary: summary.after_seconds, ".2f"),
    ("transactions = statements / task", lambda summary: summary.transactions_per_task, ".4f"),
    ("WAL bytes / task", lambda summary: summary.wal_bytes_per_task, ",.0f"),
    ("  full page images / task", lambda summary: summary.full_page_images_per_task, ".4f"),
    ("dead rows / task", lambda summary: summary.dead_rows_per_task, ".2f"),
    ("HOT share of the updates", lambda summary: summary.hot_share, ".2f"),
    ("CPU us / task, client", lambda summary: summary.client_cpu_us_per_task, ".2f"),
    ("CPU us / task, Postgres", lambda summary: summary.server_cpu_us_per_task, ".2f"),
    ("autovacuums of the table", lambda summary: summary.autovacuums, ".0f"),
    ("peak RSS of a worker, MB", lambda summary: summary.peak_rss_mb, ".1f"),
    ("  unique at its end, MB", lambda summary: summary.unique_mb, ".1f"),
)


def card(report: Report) -> str:
    return "\n".join([*_head(report), "", *_table(report), "", *_foot(report)])


def _head(report: Report) -> Iterator[str]:
    terms = report.terms
    steps = f"{report.steps_per_task} step{'s' if report.steps_per_task > 1 else ''} each"
    yield f"{report.command}"
    yield (
        f"drain of {terms.tasks:,} tasks of {terms.workload} ({steps}), {terms.procs} processes or connections, "
        f"batch {terms.batch}, {terms.rounds} rounds"
    )
    yield f"at        {report.at}, commit {report.commit}"
    yield "machine   " + ", ".join(f"{name} {value}" for name, value in report.machine.items())
    yield "versions  " + ", ".join(f"{name} {value}" for name, value in report.versions.items())
    yield f"server    {report.server}"
    yield "settings  " + ", ".join(f"{name} {value}" for name, value in report.settings.items())
    for name, about in report.contenders.items():
        yield f"{name:<9} {about}"


def _table(report: Report) -> Iterator[str]:
    yield f"{'median (min - max)':<{_LABEL}}" + "".join(f"{name:>{_COLUMN}}" for name in report.summary)
    for label, pick, form in _ROWS:
        cells = [_show(pick(summary), form) for summary in report.summary.values()]
        if any(cells):
            yield f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _foot(report: Report) -> Iterator[str]:
    yield f"enqueue_many, tasks/s: {_show(spread(report.enqueue_many_per_second), ',.0f')}"
    if report.latency is not None:
        late = report.latency
        yield (
            f"idle fleet, {late.per_second:g}/s, {late.samples} tasks: from the call of enqueue to the start of the "
            f"step p50 {late.start_p50:.2f} ms, p99 {late.start_p99:.2f} ms, most {late.start_max:.2f} ms"
        )
        yield (
            f"  of which the call itself, with its commit: p50 {late.enqueue_p50:.2f} ms, p99 {late.enqueue_p99:.2f} ms"
        )
    for failure in report.failures:
        yield f"FAILED    {failure}"


def _show(numbers: Spread | None, form: str) -> str:
    if numbers is None:
        return ""
    if numbers.min == numbers.max:
        return format(numbers.median, form)
    return f"{numbers.median:{form}} ({numbers.min:{form}} - {numbers.max:{form}})"
