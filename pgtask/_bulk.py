"""What `enqueue_many` reads, and how it inserts tasks that have keys."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any
from uuid import UUID

from pgtask._ids import first_id
from pgtask._postgres.store import statement
from pgtask.errors import EnqueueError
from pgtask.task import Task

__all__ = ["Source", "insert_chunk"]


class Source:
    """The caller's iterable, plain or async, with the key of each step. What the caller's code raises is kept in
    `error`, since on its way through a COPY it would be taken for an error of the database."""

    def __init__(self, steps: Iterable[Task] | AsyncIterable[Task], key: Callable[[Any], str] | None) -> None:
        if not isinstance(steps, (Iterable, AsyncIterable)):
            raise EnqueueError(f"enqueue_many() takes an iterable of steps, not {steps!r:.80}")
        self._steps = steps
        self._key = key
        self.error: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[tuple[Task, str | None]]:
        try:
            if isinstance(self._steps, AsyncIterable):
                async for step in self._steps:
                    yield step, self._key and self._key(step)
            else:
                for step in self._steps:
                    yield step, self._key and self._key(step)
        except Exception as error:
            self.error = error
            raise


async def insert_chunk(connection: Any, keys: list[str], chunk: dict[str, tuple[str, str, int]]) -> list[UUID]:
    found: dict[str, UUID] = {}
    # In one order for all: two batches that share keys wait for each other's rows.
    while missing := sorted(key for key in chunk if key not in found):
        first = first_id()
        ids = [UUID(int=first + at) for at in range(len(missing))]
        columns = [list(column) for column in zip(*(chunk[key] for key in missing), strict=True)]
        rows = await connection.fetch(statement("enqueue_keyed"), ids, *columns, missing)
        rows += await connection.fetch(statement("find_keys"), missing)
        found.update((row[0], UUID(int=row[1].int)) for row in rows)
    return [found[key] for key in keys]
