"""Lists of tasks, page by page, from the indexes of the table.

Invariants: no statement scans or sorts the table. A page reads the rows that it shows, and with a filter `SCAN_LIMIT`
rows at most. The order is that of the indexes: among tasks of one time, such as a million enqueued at once, that of
their places in the table, for which an index needs no sort.
"""

from __future__ import annotations

import json
import re
import shlex
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, unquote
from uuid import UUID

import msgspec

from pgtask._placement import scoped_key
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import TaskRow, aware, describe, transaction
from pgtask._postgres.times import from_microseconds, to_microseconds

__all__ = [
    "SCAN_LIMIT",
    "STATES",
    "Cursor",
    "Page",
    "TaskFilter",
    "check_error_pattern",
    "filter_words",
    "find_tasks",
    "list_tasks",
]

STATES = ("leased", "ready", "scheduled", "parked")
"""The states of a task, in the order of lists: running, next to run, waiting for a person.

Parked tasks come last, because a filter by queue may have to read many of them to leave them out.
"""

SCAN_LIMIT = 100_000
"""The most rows that one page reads; a filter may leave most of them out."""

_LITERAL = str.maketrans({"\\": r"\\", "%": r"\%", "_": r"\_"})  # in a pattern of LIKE
# The first and last of Python's times stand for the infinities.
_NEVER, _LONG_AGO = datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)
# Kinds of members as groups/members.sql has them, by the state of a cursor that stands among them.
_MEMBERS = (("parked", "parked"), ("leased", "started"), ("ready", "added"))
# Places before and after all rows of one time.
_FIRST_PLACE, _LAST_PLACE = (0, 0), (2**32 - 1, 2**16 - 1)


class TaskFilter(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of tasks. `states` in the order of `STATES`; `queues`: any of them; `task` and `step` are names of the
    envelope; `error` is a pattern of LIKE; `older_than` counts since a task fell due or was parked; None: any. With a
    `key` there is a `task`. `where`: paths of fields of the step, each with the text that it has. `created_before`: for
    changes of many, which end though others enqueue meanwhile. `group`: the name of one; its members come in the order
    of their ids, the parked ones first."""

    states: tuple[str, ...] = STATES
    queues: tuple[str, ...] | None = None
    task: str | None = None
    step: str | None = None
    error: str | None = None
    older_than: timedelta | None = None
    key: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    created_before: datetime | None = None
    group: str | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """The parameters of shared/matching.sql."""
        age = None if self.older_than is None else self.older_than.total_seconds()
        return list(self.states), self.pattern, self.queue_array, self.error, age, self.fields

    @property
    def queue_array(self) -> list[str] | None:
        return None if self.queues is None else list(self.queues)

    @property
    def fields(self) -> list[str] | None:
        """Two patterns that the step of each such task matches, and the parameter of pg_task_has: each path and its
        text; None: any. See shared/matching.sql."""
        if not self.where:
            return None
        longest = max(self.where, key=lambda pair: len(pair[1]))
        return [*_written(*longest), *(part for pair in self.where for part in pair)]

    @property
    def words(self) -> str:
        """What it chooses by, as the words of a command that has the same."""
        words = [] if self.states == STATES else ["--state", ",".join(self.states)]
        words += filter_words(self)
        return shlex.join(words) or "--all"

    @property
    def stored_keys(self) -> list[str]:
        """The key as the column has it, and that of a task which waits behind the other one."""
        assert self.task is not None
        stored = scoped_key(self.task, self.key)
        return [stored, f"/{stored}"]

    @property
    def is_selective(self) -> bool:
        """Whether it may leave out rows of the states that it reads."""
        parts = (self.pattern, self.queues, self.error, self.older_than, self.fields, self.created_before)
        return any(part is not None for part in parts)

    @property
    def pattern(self) -> str | None:
        """The beginning of the envelope, as a regular expression of Postgres: one written by hand may hold blanks."""
        if self.task is None and self.step is None:
            return None
        inner = "" if self.step is None else rf"{_quote_name(self.step)}\s*:"
        return rf"^\s*\{{\s*{_quote_name(self.task)}\s*:\s*\{{\s*{inner}"


def filter_words(wanted: TaskFilter, *, queue_flag: str = "--queue") -> list[str]:
    """Return the filter, but for its states, as the words of a command that has the same."""
    words = [] if wanted.queues is None else [queue_flag, ",".join(wanted.queues)]
    if wanted.step is not None:
        words += ["--step", wanted.step if wanted.task is None else f"{wanted.task}.{wanted.step}"]
    elif wanted.task is not None:
        words += ["--task", wanted.task]
    for flag, text in (("--key", wanted.key), ("--error", wanted.error), ("--group", wanted.group)):
        words += [] if text is None else [flag, text]
    words += [] if wanted.older_than is None else ["--age", f"{wanted.older_than.total_seconds():.12g}s"]
    return words + [word for path, text in wanted.where for word in ("--where", f"{path}={text}")]


def check_error_pattern(pattern: str) -> str:
    """Return a pattern of LIKE. Raises `ValueError` for one that Postgres refuses."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise ValueError("the backslash at its end quotes nothing: write \\\\ for the sign itself")
    return pattern


def _quote_name(name: str | None) -> str:
    if name is None:
        return '"[^"]+"'
    return _escape(json.dumps(name, ensure_ascii=False))


def _escape(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)


def _written(path: str, text: str) -> tuple[str, str]:
    """Return a pattern of LIKE and a regular expression of a field as JSON without escapes has it. The last part of its
    path may be the number of an item."""
    name = path.rpartition(".")[2]
    is_item = name.lstrip("-").isdigit()
    pattern = "".join("%" + part.translate(_LITERAL) for part in ((text,) if is_item else (f'"{name}"', text)))
    expression = rf'"?{_escape(text)}["\s,}}\]]'
    return f"{pattern}%", expression if is_item else rf'"{_escape(name)}"\s*:\s*{expression}'


class Cursor(msgspec.Struct, frozen=True):
    """A place in a list of tasks, just after one of them. Its text needs no quotes in a shell."""

    state: str
    queue: str
    priority: int
    microseconds: int
    block: int
    offset: int

    def __str__(self) -> str:
        numbers = f"{self.priority}.{self.microseconds}.{self.block}.{self.offset}"
        # No dot at the end: a person who copies the cursor from the end of a sentence would leave it out.
        queue = quote(self.queue, safe="").replace(".", "%2E")
        return f"{self.state}.{numbers}.{queue}".removesuffix(".")

    @staticmethod
    def parse(text: str) -> Cursor:
        """Raise `ValueError` for a text that is no cursor."""
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
            return from_microseconds(self.microseconds)
        except OverflowError:
            raise ValueError(str(self)) from None


class Page(msgspec.Struct, frozen=True):
    """Some tasks and their places; those with a key are one page, and have none. `following` is the place after which
    the next page begins, None at the end of the list; `is_cut`: the scan reached its limit before the page was full."""

    rows: list[TaskRow]
    places: list[Cursor]
    following: Cursor | None
    is_cut: bool


class _Section(msgspec.Struct, frozen=True):
    """A part of the list that one index scan reads: a state, or one lane of a waiting state."""

    state: str
    queue: str = ""
    priority: int = 0

    @property
    def rank(self) -> tuple[int, str, int]:
        return STATES.index(self.state), self.queue, -self.priority


async def list_tasks(
    connection: Any,
    wanted: TaskFilter,
    *,
    limit: int,
    after: Cursor | None = None,
    characters: int | None = None,
    max_read: int | None = None,
) -> Page:
    """Return a page of up to `limit` tasks, state by state; waiting ones lane by lane, in claim order. Of steps and
    errors it holds the first `characters`. With a filter it reads `max_read` tasks at most, by default `SCAN_LIMIT`.

    Each page is a snapshot of its own: a task that changes its place in between may show twice, or not at all.
    """
    async with transaction(connection, readonly=True) as now:
        if wanted.key is not None:
            rows = await describe(connection, (await _find_keyed(connection, wanted))[:limit], characters)
            return Page(rows, [], None, False)
        if wanted.group is not None:
            ids, following = await _find_members(connection, wanted, limit, after)
            return Page(await describe(connection, ids, characters), [], following, False)
        found, following, is_cut = await _scan_sections(connection, wanted, limit, after, now, max_read or SCAN_LIMIT)
        rows = await describe(connection, [row["id"] for _, row in found], characters)
    return Page(rows, [_cursor_of(section, row) for section, row in found], following, is_cut)


async def find_tasks(
    connection: Any, wanted: TaskFilter, *, limit: int, after: Cursor | None = None
) -> tuple[list[UUID], Cursor | None]:
    """Return the ids of such a page, and the place of the next one."""
    async with transaction(connection, readonly=True) as now:
        if wanted.key is not None:
            return (await _find_keyed(connection, wanted))[:limit], None
        if wanted.group is not None:
            return await _find_members(connection, wanted, limit, after)
        found, following, _ = await _scan_sections(connection, wanted, limit, after, now, SCAN_LIMIT)
    return [row["id"] for _, row in found], following


async def _find_keyed(connection: Any, wanted: TaskFilter) -> list[UUID]:
    rows = await connection.fetch(statement("keyed"), wanted.stored_keys, *wanted.args)
    return [UUID(int=row["id"].int) for row in rows]


async def _find_members(
    connection: Any, wanted: TaskFilter, limit: int, after: Cursor | None
) -> tuple[list[UUID], Cursor | None]:
    """Return members of a group, kind by kind, and the place of the next page: the last id is its queue."""
    found: list[UUID] = []
    for state, kind in _MEMBERS[0 if after is None else [one for one, _ in _MEMBERS].index(after.state) :]:
        if not (("parked" in wanted.states) if kind == "parked" else set(wanted.states) - {"parked"}):
            continue
        last = UUID(after.queue) if after is not None and after.state == state else UUID(int=0)
        args = (*wanted.args, wanted.group, last, limit - len(found), wanted.created_before)
        rows = await connection.fetch(statement("groups/members"), kind, *args)
        found += [UUID(int=row[0].int) for row in rows]
        if len(found) >= limit:
            return found, Cursor(state, str(found[-1]), 0, 0, 0, 0)
    return found, None


async def _scan_sections(
    connection: Any, wanted: TaskFilter, limit: int, after: Cursor | None, now: datetime, max_read: int
) -> tuple[list[tuple[_Section, Any]], Cursor | None, bool]:
    """Return the rows of a page with their sections, the place of the next page, and whether the scan was cut short."""
    found: list[tuple[_Section, Any]] = []
    left = max_read if wanted.is_selective else limit + 1
    for section in await _list_sections(connection, wanted, after):
        start = after if after is not None and _section_of(after) == section else None
        rows = await _read_section(connection, section, wanted, start, left, limit + 1 - len(found), now)
        found += [(section, row) for row in rows if row["matches"]]
        if len(found) > limit:
            return found[:limit], _cursor_of(*found[limit - 1]), False
        left -= rows[-1]["nth"] if rows else 0
        if left <= 0:
            return found, _cursor_of(section, rows[-1]), True
    return found, None, False


async def _list_sections(connection: Any, wanted: TaskFilter, after: Cursor | None) -> list[_Section]:
    sections = [_Section(state) for state in wanted.states if state in ("parked", "leased")]
    waiting = [state for state in wanted.states if state in ("ready", "scheduled")]
    lanes = []
    if waiting:
        lanes = await connection.fetch(statement("lanes"), *lane_parameters(wanted.queues))
    sections += [
        _Section(state, queue, priority) for state in waiting for queue, priority, *_ in lanes if queue is not None
    ]
    if after is not None:
        start = _section_of(after).rank
        sections = [section for section in sections if section.rank >= start]
    return sorted(sections, key=lambda section: section.rank)


def _section_of(cursor: Cursor) -> _Section:
    return _Section(cursor.state, cursor.queue, cursor.priority)


async def _read_section(
    connection: Any, section: _Section, wanted: TaskFilter, start: Cursor | None, scan: int, limit: int, now: datetime
) -> list[Any]:
    """Return rows (id, at, place, matches, nth) of a section, from `start` or its head; see list_tasks.sql."""
    since = _LONG_AGO if start is None else start.time
    place = _FIRST_PLACE if start is None else (start.block, start.offset)
    kind, queues, until = section.state, wanted.queue_array, now
    before = None if wanted.older_than is None else now - wanted.older_than
    if section.state == "parked" and start is None:
        since, place = before or _NEVER, _LAST_PLACE
    elif section.state in ("ready", "scheduled"):
        kind, queues = "waiting", [section.queue]
    if section.state == "scheduled":
        until = _NEVER
        since, place = (now, _LAST_PLACE) if start is None else (since, place)
    lane = (queues, section.priority, until if before is None else min(until, before))
    rows: list[Any] = await connection.fetch(
        statement("list_tasks"),
        kind,
        wanted.pattern,
        *lane,
        since,
        place,
        scan,
        limit,
        wanted.error,
        before,
        wanted.fields,
        wanted.created_before,
    )
    return rows


def _cursor_of(section: _Section, row: Any) -> Cursor:
    return Cursor(section.state, section.queue, section.priority, to_microseconds(aware(row["at"])), *row["place"])
