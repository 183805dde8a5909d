"""Bulk inserts: plain steps by COPY; new tasks that have a time, a key or an expiry of their own by arrays.

Invariants: all rows are inserted or none; memory stays constant, but for the rows with keys, which are inserted at the
end in the order of their keys, and for the ids, unless all steps are plain.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID

from pgtask._copy import Source
from pgtask._fastpath import CopyRows
from pgtask._ids import TaskId, TaskIds, first_id, ids_of_keys
from pgtask._postgres.many_inserts import CHUNK_BYTES, CHUNK_TASKS, copy_rows, insert_keyed, insert_keyless, is_plain
from pgtask._postgres.refusals import refusals
from pgtask._postgres.transactions import atomically
from pgtask._traces import trace_to_write
from pgtask._validate import ItemEncoder, NewRow
from pgtask.outcome import Enqueue

__all__ = ["insert_many"]


async def insert_many(
    connection: Any, source: Source, encode: ItemEncoder, group: int | None = None, first: int | None = None
) -> Sequence[UUID]:
    """Insert the tasks of a source, as members of a group if there is one, and return their ids in order. In the
    caller's transaction it is a savepoint: a refusal does not spoil that."""
    with refusals():
        async with atomically(connection):
            return await _Bulk(connection, source, encode, group, first or first_id()).insert()


class _Bulk:
    """The inserts of one call."""

    def __init__(self, connection: Any, source: Source, encode: ItemEncoder, group: int | None, first: int) -> None:
        self._connection = connection
        self._group = group
        self._others_group = None if group is None else -group
        self._steps = aiter(source)
        self._encode = encode
        self._first = first
        self._copied = 0
        self._others = 0  # items that were not copied
        self._is_over = False
        self._chunk: list[NewRow] = []  # without keys, to be inserted together,
        self._places: list[int] = []  # and their places among all items
        self._placed: dict[int, TaskId] = {}  # by place: the ids of all but the copied ones
        self._keyed: dict[str, NewRow] = {}
        self._key_places: list[tuple[int, str]] = []

    async def insert(self) -> Sequence[UUID]:
        while not self._is_over:
            await self._copy()
            if self._chunk:
                ids = await insert_keyless(self._connection, self._chunk, self._others_group)
                self._placed.update(zip(self._places, ids, strict=True))
                self._chunk, self._places = [], []
        if self._keyed:
            found = await insert_keyed(self._connection, self._keyed, self._others_group)
            ids = ids_of_keys(found, (key for _, key in self._key_places))
            self._placed.update(zip((place for place, _ in self._key_places), ids, strict=True))
        if not self._placed:
            return TaskIds(UUID(int=self._first), self._copied)
        copied = iter(range(self._first, self._first + self._copied))
        return [self._placed.get(place) or TaskId(next(copied), "new") for place in range(self._copied + self._others)]

    async def _copy(self) -> None:
        """Copy plain steps until the source is over, or a chunk of others is full."""
        rows = CopyRows(self._first + self._copied, trace=trace_to_write(), group=self._group)
        await copy_rows(self._connection, rows, self._build(rows))
        self._copied += rows.count

    async def _build(self, rows: CopyRows) -> AsyncIterator[bytes]:
        encode_plain = self._encode.plain
        async for item, _ in self._steps:
            if encode_plain is not None and not isinstance(item, Enqueue):
                codec, payload, (queue, priority) = encode_plain(item)
            else:
                codec, payload, place = row = self._encode(item)
                queue, priority = place[:2]
                if place.key is not None or not is_plain(place):
                    self._set_aside(row, self._copied + rows.count + self._others)
                    if len(self._chunk) >= CHUNK_TASKS:
                        break
                    continue
            if rows.add(codec, payload, queue, priority) >= CHUNK_BYTES:
                yield rows.take()
        else:
            self._is_over = True
        yield rows.take() + CopyRows.TRAILER

    def _set_aside(self, row: NewRow, number: int) -> None:
        """Keep a row that is not copied, the item of this number."""
        self._others += 1
        if row.place.key is None:
            self._chunk.append(row)
            self._places.append(number)
        else:
            self._keyed.setdefault(row.place.key, row)
            self._key_places.append((number, row.place.key))
