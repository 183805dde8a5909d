"""Lists of tasks, page by page, out of the indexes of the table.

Invariants: nothing scans or sorts the table. A page costs what it shows, and with a filter `SCAN_LIMIT` rows at most.
The order is that of the indexes: among tasks of one time, such as a million enqueued at once, that of their places in
the table, for which an index needs no sort.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote
from uuid import UUID

import msgspec

from pgtask._postgres.store import statement
from pgtask._postgres.tasks import TaskRow, aware, describe, transaction

__all__ = ["SCAN_LIMIT", "STATES", "Cursor", "Page", "TaskFilter", "list_tasks"]

STATES = ("leased", "ready", "scheduled", "parked")
"""Each task is in one of them, and lists show them in this order: what runs, what runs next, what waits for a person.

Parked tasks come last, because they alone may be many that a filter by queue must read to leave out.
"""

SCAN_LIMIT = 100_000
"""Rows read at most for one page; a filter may leave most of them out."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# asyncpg takes the first and last of Python's times for the infinities, as which it also reads them.
_NEVER, _LONG_AGO = datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)
# Before and behind all rows of one time.
_FIRST_PLACE, _LAST_PLACE = (0, 0), (2**32 - 1, 2**16 - 1)


class TaskFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which tasks. `states` in the order of `STATES`; `task` and `step` are names in the envelope; None is any."""

    states: tuple[str, ...] = STATES
    queue: str | None = None
    task: str | None = None
    step: str | None = None

    @property
    def pattern(self) -> str | None:
        """The beginning of the envelope, as a regular expression of Postgres: a person may have put blanks in it."""
        if self.task is None and self.step is None:
            return None
        inner = "" if self.step is None else rf"{_quoted(self.step)}\s*:"
        return rf"^\s*\{{\s*{_quoted(self.task)}\s*:\s*\{{\s*{inner}"


def _quoted(name: str | None) -> str:
    if name is None:
        return '"[^"]+"'
    return re.sub(r"([^\w\s])", r"\\\1", json.dumps(name, ensure_ascii=False))


class Cursor(msgspec.Struct, frozen=True):
    """A place in a list of tasks, just after one of them; as text it needs no quotes in a shell."""

    state: str
    queue: str
    priority: int
    microseconds: int
    block: int
    offset: int

    def __str__(self) -> str:
        numbers = f"{self.priority}.{self.microseconds}.{self.block}.{self.offset}"
        # No dot at its end: said at the end of a sentence, it would be lost when it is copied.
        queue = quote(self.queue, safe="").replace(".", "%2E")
        return f"{self.state}.{numbers}.{queue}".removesuffix(".")

    @staticmethod
    def parse(text: str) -> Cursor:
        """Raises `ValueError`."""
        state, priority, microseconds, block, offset, *rest = text.split(".", 5)
        queue = rest[0] if rest else ""
        cursor = Cursor(state, unquote(queue), int(priority), int(microseconds), int(block), int(offset))
        if state not in STATES or cursor.block not in range(2**32) or cursor.offset not in range(2**16):
            raise ValueError(text)
        _ = cursor.time
        return cursor

    @property
    def time(self) -> datetime:
        try:
            return _EPOCH + timedelta(microseconds=self.microseconds)
        except OverflowError:
            raise ValueError(str(self)) from None


class Page(msgspec.Struct, frozen=True):
    """Some tasks and their places. `following` is where the next page begins, None at the end of the list; `is_cut`
    says that it was the scan that ended, not the page that was full."""

    rows: list[TaskRow]
    places: list[Cursor]
    following: Cursor | None
    is_cut: bool


class _Section(msgspec.Struct, frozen=True):
    """A part of the list that one index scan reads: a state, or of a waiting state one lane."""

    state: str
    queue: str = ""
    priority: int = 0

    @property
    def rank(self) -> tuple[int, str, int]:
        return STATES.index(self.state), self.queue, -self.priority


async def list_tasks(
    connection: Any, wanted: TaskFilter, *, limit: int, after: Cursor | None = None, characters: int | None = None
) -> Page:
    """A page of up to `limit` tasks, state by state; waiting ones lane by lane, in the order in which they are claimed.
    Of steps and errors the first `characters`.

    Each page is a snapshot of its own: a task that changes its place in between may show twice, or not at all.
    """
    async with transaction(connection, readonly=True) as now:
        found, following, is_cut = await _scan(connection, wanted, limit, after, now)
        rows = await describe(connection, [task for task, _ in found], characters)
    return Page(rows, [place for _, place in found], following, is_cut)


async def _scan(
    connection: Any, wanted: TaskFilter, limit: int, after: Cursor | None, now: datetime
) -> tuple[list[tuple[UUID, Cursor]], Cursor | None, bool]:
    """The tasks of a page with their places; where the next page begins; and whether the scan was cut short."""
    found: list[tuple[UUID, Cursor]] = []
    is_filtered = wanted.pattern is not None or wanted.queue is not None
    left = SCAN_LIMIT if is_filtered else limit + 1
    for section in await _sections(connection, wanted, after):
        start = after if after is not None and _section_of(after) == section else None
        rows = await _fetch(connection, section, wanted, start, left, limit + 1 - len(found), now)
        places = [_place(section, row) for row in rows]
        found += [(row["id"], place) for row, place in zip(rows, places, strict=True) if row["matches"]]
        if len(found) > limit:
            return found[:limit], found[limit - 1][1], False
        left -= rows[-1]["nth"] if rows else 0
        if left <= 0:
            return found, places[-1], True
    return found, None, False


async def _sections(connection: Any, wanted: TaskFilter, after: Cursor | None) -> list[_Section]:
    sections = [_Section(state) for state in wanted.states if state in ("parked", "leased")]
    waiting = [state for state in wanted.states if state in ("ready", "scheduled")]
    if waiting and wanted.queue is None:
        lanes = await connection.fetch(statement("lanes"))
    elif waiting:
        lanes = await connection.fetch(statement("lanes_of_queues"), [wanted.queue])
    else:
        lanes = []
    sections += [_Section(state, queue, priority) for state in waiting for queue, priority, *_ in lanes]
    if after is not None:
        start = _section_of(after).rank
        sections = [section for section in sections if section.rank >= start]
    return sorted(sections, key=lambda section: section.rank)


def _section_of(cursor: Cursor) -> _Section:
    return _Section(cursor.state, cursor.queue, cursor.priority)


async def _fetch(
    connection: Any, section: _Section, wanted: TaskFilter, start: Cursor | None, scan: int, limit: int, now: datetime
) -> list[Any]:
    """Rows (id, at, place, matches, nth) of a section, from `start` or its head; see list_parked.sql."""
    place = _FIRST_PLACE if start is None else (start.block, start.offset)
    since = _LONG_AGO if start is None else start.time
    if section.state == "parked":
        until, place = (_NEVER, _LAST_PLACE) if start is None else (since, place)
        return await _rows(connection, "list_parked", wanted, wanted.queue, until, place, scan, limit)
    if section.state == "leased":
        return await _rows(connection, "list_leased", wanted, wanted.queue, since, place, scan, limit)
    if section.state == "ready":
        until = now
    else:
        until = _NEVER
        since, place = (now, _LAST_PLACE) if start is None else (since, place)
    lane = (section.queue, since, place, scan, limit, section.priority, until)
    return await _rows(connection, "list_waiting", wanted, *lane)


async def _rows(connection: Any, name: str, wanted: TaskFilter, *parameters: Any) -> list[Any]:
    rows: list[Any] = await connection.fetch(statement(name), wanted.pattern, *parameters)
    return rows


def _place(section: _Section, row: Any) -> Cursor:
    microseconds = (aware(row["at"]) - _EPOCH) // timedelta(microseconds=1)
    return Cursor(section.state, section.queue, section.priority, microseconds, *row["place"])
