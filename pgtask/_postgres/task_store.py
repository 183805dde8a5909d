"""The tasks of a client in Postgres: one that is named, those that a filter chooses, and the statistics.

Invariants: without a connection of the caller each page and each portion takes one of the pool and gives it back, so
that a slow reader holds none; no page is larger than `PAGE`. A change of those that a filter chooses leaves a row of
who did it, as a command does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

from pgtask._operator import operator_name
from pgtask._postgres.actions import ActionState, begin_action, note_action
from pgtask._postgres.connection import map_errors
from pgtask._postgres.listing import Cursor, TaskFilter, find_tasks, list_tasks
from pgtask._postgres.statistics import Statistics, gather_statistics
from pgtask._postgres.task_changes import PORTION, Change, apply_change, begin_bulk, change_portion
from pgtask._postgres.task_status import TaskStatus, status_of
from pgtask._postgres.tasks import TaskChange, show_tasks
from pgtask.errors import PgtaskError

__all__ = ["PostgresTasks"]

PAGE = 200  # tasks that are read at once
COUNTED = 10_000  # tasks that are counted at once
NOTE_TIMEOUT = 5.0  # seconds


class PostgresTasks:
    """The statements on the tasks of one client, whose store opens the connections."""

    def __init__(self, connection: Callable[[Any], AbstractAsyncContextManager[Any]]) -> None:
        self._connection = connection

    async def read_task(self, task: UUID) -> TaskStatus | None:
        async with self._connection(None) as connection:
            with map_errors():
                rows = await show_tasks(connection, [task])
        return status_of(rows[0]) if rows else None

    async def change_task(self, task: UUID, change: Change, conn: Any) -> TaskChange:
        async with self._connection(conn) as connection:
            with map_errors():
                (changed,) = await apply_change(connection, [task], change)
        return changed

    async def list_page(self, wanted: TaskFilter, after: Cursor | None) -> tuple[list[TaskStatus], Cursor | None]:
        async with self._connection(None) as connection:
            with map_errors():
                page = await list_tasks(connection, wanted, limit=PAGE, after=after)
        return list(map(status_of, page.rows)), page.following

    async def count_tasks(self, wanted: TaskFilter) -> int:
        total, after, is_first = 0, None, True
        while is_first or after is not None:
            is_first = False
            async with self._connection(None) as connection:
                with map_errors():
                    ids, after = await find_tasks(connection, wanted, limit=COUNTED, after=after)
            total += len(ids)
        return total

    async def change_tasks(self, wanted: TaskFilter, change: Change) -> int:
        async with self._connection(None) as connection:
            with map_errors():
                number = await begin_action(connection, operator_name(), change.action, wanted.words)
                wanted, change = await begin_bulk(connection, wanted, change)
        total, after = 0, None
        state: ActionState = "running"
        try:
            while state == "running":
                async with self._connection(None) as connection:
                    with map_errors():
                        done, after = await change_portion(connection, wanted, change, limit=PORTION, after=after)
                        total += done
                        state = "running" if after is not None else "done"
                        await note_action(connection, number, total, state)
        except BaseException as error:
            await self._note_end(number, total, "stopped" if isinstance(error, asyncio.CancelledError) else "failed")
            raise
        return total

    async def _note_end(self, number: int, tasks: int, state: ActionState) -> None:
        """Record the end of a change that has not come to its own, if the database can be asked."""
        with contextlib.suppress(PgtaskError, OSError, TimeoutError):
            async with asyncio.timeout(NOTE_TIMEOUT), self._connection(None) as connection:
                with map_errors():
                    await note_action(connection, number, tasks, state)

    async def read_statistics(self) -> Statistics:
        async with self._connection(None) as connection:
            with map_errors():
                return await gather_statistics(connection)
