"""What all doors have in common: rows, values as text, and errors.

Invariant: an exception of a driver leaves a door as one of asyncpg's, or as `EnqueueError` if nothing was sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn
from uuid import UUID

import asyncpg

from pgtask.errors import DatabaseUnavailable, EnqueueError

__all__ = [
    "Door",
    "Row",
    "as_named_text",
    "as_text",
    "raise_closed",
    "raise_outside",
    "server_error",
    "whole_copies",
]

_UUID_TYPE = 2950
_COPY_HEADER_SIZE = 19  # of the binary format: a signature, flags, and the length of no extension
_COPY_TRAILER = b"\xff\xff"


class Row:
    """A row, by index and by name."""

    __slots__ = ("_names", "_values")

    def __init__(self, names: Sequence[str], values: Sequence[Any]) -> None:
        self._names = names
        self._values = values

    def __getitem__(self, at: Any) -> Any:
        return self._values[self._names.index(at) if isinstance(at, str) else at]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[tuple[str, Any]]:
        return zip(self._names, self._values, strict=True)


def as_text(value: Any) -> str | None:
    """Return a value as the text that Postgres reads, so that the statement alone says of what type it is, whichever
    types and adapters the driver has."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, UUID):
        return f"{value.int:032x}"  # Postgres needs no hyphens, and Python takes time for them
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Sequence):
        return "{" + ",".join(map(_element, value)) + "}"
    raise TypeError(f"{value!r:.80} cannot be sent by this driver")


def _element(value: Any) -> str:
    text = as_text(value)
    if text is None:
        return "NULL"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def as_named_text(args: Sequence[Any]) -> dict[str, str | None]:
    """Return the values of `%(p1)s`, `%(p2)s` and so on."""
    return {f"p{number}": as_text(value) for number, value in enumerate(args, 1)}


def raise_outside(remedy: str) -> NoReturn:
    """Refuse a connection that is in no transaction."""
    raise EnqueueError(
        "conn= is not in a transaction, so this would be committed at once, even if your own data is not; "
        f"{remedy}. Pass no conn if you want no transaction"
    )


def raise_closed() -> NoReturn:
    raise DatabaseUnavailable("conn= is closed")


def server_error(error: BaseException, *, is_lost: bool) -> asyncpg.PostgresError | asyncpg.InterfaceError:
    """Return the exception of asyncpg for one of libpq's drivers: that of its SQLSTATE. Without one, the connection is
    lost, or the driver has refused the call."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    text = " ".join(str(error).split()) or type(error).__name__
    if state is None:
        return asyncpg.PostgresError.new({"C": "08006", "M": text}) if is_lost else asyncpg.InterfaceError(text)
    diag: Any = getattr(error, "diag", None)
    fields = {
        "S": getattr(diag, "severity", None),
        "C": state,
        "M": getattr(diag, "message_primary", None) or text,
        "D": getattr(diag, "message_detail", None),
        "H": getattr(diag, "message_hint", None),
        "W": getattr(diag, "context", None),
        "s": getattr(diag, "schema_name", None),
        "t": getattr(diag, "table_name", None),
        "c": getattr(diag, "column_name", None),
        "n": getattr(diag, "constraint_name", None),
        "R": getattr(diag, "source_function", None),
    }
    return asyncpg.PostgresError.new({name: value for name, value in fields.items() if value is not None})


def _as_id(cursor: Any, at: int, value: Any) -> Any:
    """Return a value as asyncpg does: some drivers return an id as text."""
    return UUID(value) if isinstance(value, str) and cursor.description[at][1] == _UUID_TYPE else value


class Door:
    """A connection of another driver, as our statements see one of asyncpg."""

    is_async = False
    """Whether it needs the event loop of its connection."""

    can_copy = True
    """Whether COPY is possible now."""

    def check(self) -> None:
        """Raise unless the connection can be used here and, as far as that is known without I/O, is in a
        transaction or begins one with its next statement."""

    async def begin(self) -> None:
        """Check the rest, once it may wait; still before anything is sent."""

    async def _fetch(self, query: str, args: Sequence[Any]) -> tuple[Any, Sequence[Sequence[Any]]]:
        """Run one statement. Returns what has a `description` of its columns, if they are asked for, and its rows."""
        raise NotImplementedError

    async def _copy(self, query: str, chunks: AsyncIterator[bytes]) -> int:
        """Run a COPY FROM STDIN, and return the count of rows."""
        raise NotImplementedError

    def is_closed(self) -> bool:
        """Return whether no statement can be sent any more."""
        raise NotImplementedError

    # --- as of an asyncpg connection

    def is_in_transaction(self) -> bool:
        return True  # it is, or its next statement begins one

    async def fetch(self, query: str, *args: Any) -> list[Row]:
        cursor, rows = await self._fetch(query, args)
        if not rows:
            return []
        names = [column[0] for column in cursor.description]
        return [Row(names, [_as_id(cursor, at, value) for at, value in enumerate(row)]) for row in rows]

    async def fetchrow(self, query: str, *args: Any) -> Row | None:
        return next(iter(await self.fetch(query, *args)), None)

    async def fetchval(self, query: str, *args: Any) -> Any:
        cursor, rows = await self._fetch(query, args)
        return _as_id(cursor, 0, rows[0][0]) if rows else None

    async def execute(self, query: str, *args: Any) -> None:
        for part in [query] if args else query.split("; "):
            await self._fetch(part, args)

    async def copy_to_table(
        self, table: str, *, source: AsyncIterator[bytes], columns: Sequence[str], format: str
    ) -> str:
        query = f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT {format})"
        return f"COPY {await self._copy(query, source)}"


async def whole_copies(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Make each chunk of a binary COPY, which holds whole rows, a COPY of its own: for a driver that reads a file, and
    cannot wait for the next chunk meanwhile."""
    header = last = b""
    async for chunk in chunks:
        if last:
            yield last + _COPY_TRAILER
            last = header + chunk
        else:
            header, last = chunk[:_COPY_HEADER_SIZE], chunk
    yield last  # it has the trailer
