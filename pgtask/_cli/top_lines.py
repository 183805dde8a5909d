"""The screen of `pgtask top` as lines: a frame as it is seen, given the size and the state of the view.

Invariant: no line is wider, and no screen higher, than a terminal of `MIN_COLUMNS` or more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from pgtask._cli.quantities import format_elapsed, format_number, format_size
from pgtask._cli.tables import Column, Screen, printable, table_lines, truncate
from pgtask._observe.fleet_database import LeasedTask
from pgtask._observe.top import QueueRow, TopFrame

__all__ = ["PAGES", "HELP_LINES", "Line", "TopView", "plain_lines", "screen_lines"]

Style = Literal["", "bar", "head", "bad", "dim"]
MIN_COLUMNS = 20
MAX_SILENT = 3


class Line(msgspec.Struct, frozen=True):
    """A line of the screen, and how it looks where there are colours."""

    text: str
    style: Style = ""


class TopView(msgspec.Struct, frozen=True, kw_only=True):
    """The choice of the keys: a page, the column that sorts each page, and a text that rows have in their names.
    `typed` is the filter while it is typed."""

    page: str = "queues"
    sorts: dict[str, int] = {}
    filter: str = ""
    typed: str | None = None
    is_paused: bool = False
    shows_help: bool = False


def _signed(value: float | None) -> str:
    return (
        "-"
        if value is None
        else "0"
        if abs(value) < 0.05
        else f"{'+' if value > 0 else '-'}{format_number(abs(value))}"
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else format_elapsed(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _count(state: str) -> Callable[[QueueRow], str]:
    return lambda row: f"{'~' if state in row.estimated else ''}{getattr(row, state):,}"


def _field(name: str, show: Callable[[Any], str] = format_number) -> Callable[[Any], str]:
    return lambda row: show(getattr(row, name))


class TopPage(msgspec.Struct, frozen=True):
    """A page: its columns with the fields that sort them, and the column that sorts it at first."""

    columns: tuple[Column[Any], ...]
    fields: tuple[str, ...]
    first: int


def _column(title: str, name: str, show: Callable[[Any], str], rank: int | None = None) -> Column[Any]:
    return Column(title, _field(name, show), is_number=True, rank=rank)


PAGES: dict[str, TopPage] = {
    "queues": TopPage(
        (
            Column("queue", lambda row: row.queue, is_name=True),
            *(Column(state, _count(state), is_number=True) for state in ("due", "leased", "scheduled", "parked")),
            Column("limited", _count("limited"), is_number=True, usual="0", rank=2),
            _column("oldest due", "oldest_due", _seconds),
            _column("growth/s", "growth", _signed, rank=1),
        ),
        ("queue", "due", "leased", "scheduled", "parked", "limited", "oldest_due", "growth"),
        1,
    ),
    "steps": TopPage(
        (
            Column("step", lambda row: row.step, is_name=True),
            _column("runs/s", "runs", format_number),
            _column("errors/s", "errors", format_number),
            _column("p50", "run_p50", _seconds),
            _column("p95", "run_p95", _seconds),
            _column("wait p50", "wait_p50", _seconds, rank=2),
            _column("wait p95", "wait_p95", _seconds, rank=3),
            _column("done", "done", format_number, rank=1),
            _column("parked", "parked", format_number, rank=4),
        ),
        ("step", "runs", "errors", "run_p50", "run_p95", "wait_p50", "wait_p95", "done", "parked"),
        1,
    ),
    "workers": TopPage(
        (
            Column("worker", lambda row: row.worker, is_name=True),
            Column("host", lambda row: row.host, is_name=True, rank=5),
            _column("pid", "pid", lambda pid: "-" if pid is None else str(pid), rank=4),
            Column("state", lambda row: row.state or "-", rank=7),
            _column("runs/s", "runs", format_number),
            _column("errors/s", "errors", format_number, rank=8),
            _column("leases", "leases", format_number),
            _column("exec", "executing", format_number, rank=6),
            _column("wait", "waiting", format_number, rank=3),
            _column("unwr", "unwritten", format_number, rank=1),
            _column("lag p95", "lag", _seconds, rank=9),
            _column("cpu", "cpu", _share),
            _column("rss", "rss", _size),
            _column("up", "uptime", _seconds, rank=2),
        ),
        (
            *("worker", "host", "pid", "state", "runs", "errors", "leases", "executing", "waiting", "unwritten"),
            *("lag", "cpu", "rss", "uptime"),
        ),
        4,
    ),
}

HELP_LINES = (
    "1 2 3     queues, steps, workers",
    "s S       sort by the next column, by the one before",
    "f /       filter by a text; Enter ends, Esc clears it",
    "p space   pause and go on; the keys still work",
    "q         quit",
    "",
    "Queues, leases and what runs longest are those of the whole table.",
    "Steps, and all about workers, are counted by supervisors that have --metrics:",
    "yours on this host, and those that --from names. Rates, percentiles and CPU are",
    "of the last 5 s. ~ is an estimate, and - is unknown.",
)


def screen_lines(frame: TopFrame, view: TopView, columns: int, rows: int) -> list[Line]:
    """Return the whole screen. In fewer columns than `MIN_COLUMNS`, its lines are cut by the terminal."""
    columns = max(columns, MIN_COLUMNS)
    head = [*_head_lines(frame, view)]
    if view.shows_help:
        body = [Line(text) for text in ("", *HELP_LINES)]
    else:
        body = _body_lines(frame, view, columns, max(1, rows - len(head) - 2))
    room = max(0, rows - len(head) - 1)
    body = (body + [Line("")] * room)[:room]
    return [Line(truncate(line.text, columns), line.style) for line in (*head, *body, _key_line(view, columns))][:rows]


def plain_lines(frame: TopFrame) -> Iterator[str]:
    """Yield all pages, for a program or a file."""
    for line in _head_lines(frame, None):
        yield line.text
    for name in PAGES:
        yield ""
        yield from (line.text for line in _table(frame, TopView(page=name), Screen(), 10_000))
    if frame.longest:
        yield ""
        yield from _longest_lines(frame, frame.longest, Screen())


def _head_lines(frame: TopFrame, view: TopView | None) -> Iterator[Line]:
    at = _clock(frame.seen_at, frame.seen_at)
    paused = "  PAUSED" if view is not None and view.is_paused else ""
    workers = sum(worker.pid is not None for worker in frame.workers)
    here = sum(worker.host == "here" for worker in frame.workers)
    yield Line(f"pgtask top  {at}  {workers} workers, {here} of them here{paused}", "bar")
    if frame.database is not None:
        last = "" if frame.answered_at is None else f" (what it said is of {_clock(frame.answered_at, frame.seen_at)})"
        yield Line(printable(f"no database{last}: {frame.database}"), "bad")
    else:
        due, leased, parked = (sum(getattr(row, name) for row in frame.queues) for name in ("due", "leased", "parked"))
        about = "~" if any(row.estimated for row in frame.queues) else ""
        rates = f"in {format_number(frame.added)}/s  out {format_number(frame.removed)}/s"
        yield Line(f"{rates}  due {about}{due:,}  leased {leased:,}  parked {parked:,}", "bad" if parked else "")
    for reason in frame.silent[:MAX_SILENT]:
        yield Line(printable(reason), "bad")
    if not frame.supervisors and not frame.silent:
        yield Line("no supervisor of yours here counts: start it with --metrics PORT to see steps and CPU", "dim")


def _body_lines(frame: TopFrame, view: TopView, columns: int, room: int) -> list[Line]:
    screen = Screen(columns)
    wanted = _wanted(view)
    tasks = [task for task in frame.longest if wanted in f"{task.step} {task.queue} {task.worker}".lower()]
    longest = list(_longest_lines(frame, tasks, screen)) if tasks else []
    reserved = min(len(longest) + 1, room // 3)
    table = list(_table(frame, view, screen, room - reserved - 1))
    left = max(reserved, room - len(table) - 1) - 1
    lines = [Line(text, "" if at else "head") for at, text in enumerate(longest[:left])]
    return [Line(""), *table, *([Line(""), *lines] if len(lines) > 1 else [])]


def _wanted(view: TopView) -> str:
    """Return the text that names must have, in lower case."""
    return (view.filter if view.typed is None else view.typed).lower()


def _table(frame: TopFrame, view: TopView, screen: Screen, room: int) -> Iterator[Line]:
    page = PAGES[view.page]
    at = view.sorts.get(view.page, page.first)
    rows: Sequence[Any] = [row for row in getattr(frame, view.page) if _matches(page, row, view)]
    if not rows:
        yield Line(f"no {view.page}" + (f" with {view.filter!r}" if view.filter else ""), "dim")
        return
    rows = sorted(rows, key=lambda row: _sort_key(getattr(row, page.fields[at])))
    shown = rows if len(rows) < room else rows[: max(1, room - 2)]
    marked = [_marked(column, number == at) for number, column in enumerate(page.columns)]
    lines = table_lines(marked, shown, screen)
    yield Line(next(lines), "head")
    for row, text in zip(shown, lines, strict=True):
        yield Line(text, "bad" if getattr(row, "errors", 0) else "")
    if len(shown) < len(rows):
        yield Line(f"{len(rows) - len(shown)} more: filter them by f", "dim")


def _marked(column: Column[Any], is_sorting: bool) -> Column[Any]:
    """Return the column that sorts with a mark, and never left out."""
    if not is_sorting:
        return column
    return Column(f"{column.title}*", column.cell, is_number=column.is_number, is_name=column.is_name)


def _matches(page: TopPage, row: Any, view: TopView) -> bool:
    wanted = _wanted(view)
    return not wanted or any(wanted in column.cell(row).lower() for column in page.columns if not column.is_number)


def _sort_key(value: Any) -> tuple[int, Any]:
    """Order names from A to Z and numbers from the greatest; what is unknown comes last."""
    if value is None:
        return 1, 0
    return (0, value.lower()) if isinstance(value, str) else (0, -value)


def _longest_lines(frame: TopFrame, tasks: Sequence[LeasedTask], screen: Screen) -> Iterator[str]:
    def since(task: LeasedTask) -> str:
        return _clock(frame.seen_at - task.seconds, frame.seen_at)

    columns = (
        Column[LeasedTask]("runs longest", lambda task: task.step, is_name=True),
        Column[LeasedTask]("for", lambda task: _seconds(task.seconds), is_number=True),
        Column[LeasedTask]("since", since, is_number=True, rank=1),
        Column[LeasedTask]("queue", lambda task: task.queue, is_name=True, usual="default", rank=3),
        Column[LeasedTask]("task", lambda task: str(task.id), is_id=True),
        Column[LeasedTask]("worker", lambda task: task.worker, rank=2),
    )
    return table_lines(columns, tasks, screen)


def _clock(at: float, now: float) -> str:
    """Return a time of day, with the date if it is not of the last twelve hours."""
    return time.strftime("%H:%M:%S" if now - at < 43_200 else "%Y-%m-%d %H:%M", time.localtime(at))


def _key_line(view: TopView, columns: int) -> Line:
    if view.typed is not None:
        return Line(f"filter: {view.typed}_", "bar")
    filtered = f"  filter: {view.filter}" if view.filter else ""
    keys = f"1 queues  2 steps  3 workers  s sort  f filter  p pause  ? help  q quit{filtered}"
    return Line((keys if len(keys) <= columns else f"?:help q:quit{filtered}"), "bar")
