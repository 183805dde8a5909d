"""What waits in the table, for a reader that changes nothing: each task, and the runs of workflows by their ids.

Invariants: each transaction is READ ONLY, so that a replica will do; a part of the table is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from pgtask._postgres.store import statement
from pgtask._postgres.tasks import transaction

__all__ = ["WaitingRun", "copy_rows", "find_empty_queues", "read_once", "read_tasks"]


class WaitingRun(NamedTuple):
    """The task of a run."""

    id: UUID
    step: str
    tried: int
    error: str | None


async def copy_rows(
    connection: Any,
    take: Callable[[bytes], None],
    *,
    max_bytes: int,
    queues: Sequence[str] | None,
    sample: int | None = None,
) -> None:
    """Give the columns id, step and error of all tasks, or of so many chosen at random, to `take`, in the binary format
    of COPY, portion by portion."""

    async def take_chunk(chunk: bytes) -> None:
        take(bytes(chunk))

    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("SET LOCAL statement_timeout = 0")
        given = None if queues is None else list(queues)
        name, more = ("check/rows", ()) if sample is None else ("check/sample", (sample,))
        values = max_bytes, given, *more
        await connection.copy_from_query(statement(name), *values, output=take_chunk, format="binary")


async def read_tasks(connection: Any, ids: Sequence[UUID]) -> list[WaitingRun]:
    """Return the tasks of those runs that still wait."""
    rows = await read_once(connection, "check/runs", ids)
    return [WaitingRun(UUID(int=row["id"].int), row["step"], row["tried"], row["error"]) for row in rows]


async def find_empty_queues(connection: Any, queues: Sequence[str]) -> list[str]:
    """Return those of the queues that have no task."""
    rows = await read_once(connection, "check/empty_queues", list(queues))
    return [row["queue"] for row in rows]


async def read_once(connection: Any, name: str, *parameters: Any) -> list[Any]:
    """Run a statement that only reads, in a transaction of its own."""
    async with transaction(connection, readonly=True):
        rows: list[Any] = await connection.fetch(statement(name), *parameters)
        return rows
