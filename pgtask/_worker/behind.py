"""behind: make tasks due that wait behind another one with their key, once that has left the table.

Any session may end the other task: this worker, another one, a command, plain SQL. So workers look for such tasks: a
notification says that there are some, and while there are, they look often. An index has them, and nothing else.

Invariant: a task that may start does so within `MAX_INTERVAL` of the end of the other one, if a worker lives.
"""

from __future__ import annotations

import time

from pgtask._postgres.store import Link
from pgtask.errors import DatabaseUnavailable, DataRefused, RowsLocked, StatementTimeout

__all__ = ["Behind"]

MAX_INTERVAL = 15.0  # seconds between two looks while there seem to be none; less without notifications
INTERVAL = 0.2  # seconds between two looks while there are some
MIN_INTERVAL = 0.02  # seconds after a look, and after outcomes of this worker
MAX_TASKS = 1000  # in one look


class Behind:
    """The looks of one worker, over the connection of its claims."""

    def __init__(self, link: Link, *, listens: bool) -> None:
        self._link = link
        self._max_interval = MAX_INTERVAL if listens else 1.0
        self._looked_at = float("-inf")
        self._limit = MAX_TASKS
        self.waiting = 0
        """The tasks that wait, as of the last look."""
        self.due_at = 0.0
        """The time of the next look (monotonic seconds)."""

    def look_soon(self) -> None:
        """Look again, since there may be such tasks, or the one before them may have ended."""
        self.due_at = min(self.due_at, max(time.monotonic(), self._looked_at + MIN_INTERVAL))

    async def promote(self) -> int:
        """Make tasks due. Return how many."""
        promoted = 0
        self._looked_at = time.monotonic()
        try:
            ((promoted, self.waiting),) = await self._link.once("promote", self._limit)
            self._limit = min(MAX_TASKS, 2 * self._limit)
        except (DataRefused, RowsLocked, StatementTimeout):  # a task with that key was enqueued meanwhile
            self._limit = max(1, self._limit // 2)
        except DatabaseUnavailable:
            pass
        self.due_at = time.monotonic() + (INTERVAL if self.waiting else self._max_interval)
        return promoted
