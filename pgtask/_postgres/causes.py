"""Parked tasks, folded by the causes of their errors.

Invariants: it only reads, in one transaction; the memory is bounded with any number of rows, since a cause keeps the
first and the last of its tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from pgtask._fastpath import CauseReader
from pgtask._postgres.listing import TaskFilter
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import TaskRow, describe

__all__ = ["MAX_CAUSES", "ParkedCause", "find_causes", "fold_causes"]

MAX_CAUSES = 1_000
_LITERAL = str.maketrans({"\\": r"\\", "%": r"\%", "_": r"\_"})
_LIKE_SPECIAL = _LITERAL | {ord("#"): "%"}
_CLASS = re.compile(r"(?:[a-z_]\w*\.)*[A-Z_]\w*(?=: |$)")
_Found = tuple[str, str, str, int, bytes, bytes]


class ParkedCause(msgspec.Struct, frozen=True, kw_only=True):
    """A cause for which `tasks` are parked: the step, the class of the error if its text has one, the text with `#` for
    each number, id and quoted value, and the place in user code. `example` is the id of the latest of them, with its
    whole `error`."""

    tasks: int
    step: str
    error_class: str | None
    text: str
    place: str | None
    first_at: datetime
    last_at: datetime
    example: UUID
    error: str
    seen_at: datetime

    @property
    def pattern(self) -> str | None:
        """The pattern of LIKE that fits the errors of these tasks, and perhaps others; None without a text."""
        if not self.text:
            return None
        text, place = self.text.translate(_LIKE_SPECIAL), (self.place or "").translate(_LITERAL)
        pattern = f"{text} (at {place})%" if place else f"{text}%"
        return "".join(character if character.isprintable() else "_" for character in pattern)


async def find_causes(connection: Any, wanted: TaskFilter) -> list[ParkedCause]:
    """Return the causes of the parked tasks that the filter chooses, those of most tasks first.

    Those beyond the first thousand count as one, with an empty step and text."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("SET LOCAL statement_timeout = 0")
        return await fold_causes(connection, wanted)


async def fold_causes(connection: Any, wanted: TaskFilter, *, last: int | None = None) -> list[ParkedCause]:
    """Return such causes in the caller's snapshot, of the `last` tasks to be parked at most."""
    reader = CauseReader(MAX_CAUSES)

    async def take_chunk(chunk: bytes) -> None:
        reader.feed(bytes(chunk))

    more: tuple[Any, ...] = ()
    name = "causes"
    if wanted.group is not None:
        name, more = "groups/causes", (wanted.group, last)
    elif last is not None:
        name, more = "web/last_causes", (last,)
    values = True, *wanted.args, *more
    await connection.copy_from_query(statement(name), *values, output=take_chunk, format="binary")
    found: list[_Found] = sorted(reader.found(), key=lambda one: (-one[3], one[:3]))
    ids = {UUID(bytes=raw) for one in found for raw in one[4:]}
    rows = {row.id: row for row in await describe(connection, sorted(ids), None)}
    return list(_join(found, rows))


def _join(found: Iterable[_Found], rows: dict[UUID, TaskRow]) -> Iterable[ParkedCause]:
    for step, text, place, count, first, last in found:
        example = rows[UUID(bytes=last)]
        matched = _CLASS.match(text)
        yield ParkedCause(
            tasks=count,
            step=step,
            error_class=matched[0] if matched is not None and (place or matched[0] != text) else None,
            text=text,
            place=place or None,
            first_at=rows[UUID(bytes=first)].wakeup_at,
            last_at=example.wakeup_at,
            example=example.id,
            error=example.error or "",
            seen_at=example.seen_at,
        )
