"""The card: one page of text that says what was measured, where, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.drain import Report
from bench.spread import Spread, spread
from bench.summary import Summary

__all__ = ["card"]

_LABEL = 34
_COLUMN = 30
_FEW = 4  # contenders, for which there is room side by side

_Row = tuple[str, Callable[[Summary], Spread | None], str]
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


def card(report: Report) -> str:
    few = len(report.summary) <= _FEW
    return "\n".join([*_head(report), "", *_lines(report), *(("", *_table(report)) if few else ()), "", *_foot(report)])


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
    for name, entrant in report.contenders.items():
        less = [
            f"{number:,} {what} only"
            for number, asked, what in (
                (entrant.tasks, terms.tasks, "tasks"),
                (entrant.procs, terms.procs, "processes"),
            )
            if number != asked
        ]
        yield f"{name:<13} {'; '.join([f'{entrant.about} ({entrant.version})', *less])}"
    for name, why in report.skipped.items():
        yield f"{name:<13} skipped: {why}"


def _lines(report: Report) -> Iterator[str]:
    """One line for each contender, the fastest first."""
    widths = (30, 22, 9, 9, 9, 16, 8, 16)
    names = ("tasks/s", "pgtask / this", "tx/task", "WAL/task", "dead", "CPU us c / s", "peak MB", "p50 / p99 ms")
    yield f"{'median (min - max)':<20}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    for name, summary in sorted(report.summary.items(), key=lambda item: -item[1].tasks_per_second.median):
        late = report.latency.get(name)
        server = summary.server_cpu_us_per_task
        cells = (
            _show(summary.tasks_per_second, ",.0f"),
            _show(summary.ratio, ".2f"),
            f"{summary.transactions_per_task.median:.4f}",
            f"{summary.wal_bytes_per_task.median:,.0f}",
            f"{summary.dead_rows_per_task.median:.2f}",
            f"{summary.tree_cpu_us_per_task.median:,.1f} / {'' if server is None else f'{server.median:,.1f}'}",
            "" if summary.peak_rss_mb is None else f"{summary.peak_rss_mb.median:.0f}",
            "" if late is None else f"{late.start_p50:.2f} / {late.start_p99:.2f}",
        )
        yield f"{name:<20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _table(report: Report) -> Iterator[str]:
    yield f"{'median (min - max)':<{_LABEL}}" + "".join(f"{name:>{_COLUMN}}" for name in report.summary)
    for label, pick, form in _ROWS:
        cells = [_show(pick(summary), form) for summary in report.summary.values()]
        if any(cells):
            yield f"{label:<{_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _foot(report: Report) -> Iterator[str]:
    if report.enqueue_many_per_second:
        yield f"enqueue_many, tasks/s: {_show(spread(report.enqueue_many_per_second), ',.0f')}"
    for name, late in report.latency.items():
        most = "" if late.start_max is None else f", most {late.start_max:.2f} ms"
        yield (
            f"{name}, idle fleet, {late.per_second:g}/s, {late.samples} tasks: from the call of enqueue to the start "
            f"of the step p50 {late.start_p50:.2f} ms, p99 {late.start_p99:.2f} ms{most}"
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
