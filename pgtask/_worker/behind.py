"""behind: make tasks due that wait behind another one with their key, once that has left the table.

Any session may end the other task: this worker, another one, a command, plain SQL. So workers look for such tasks: a
notification says that there are some, and while there are, they look often. An index has them, and nothing else.

Invariants: a look reads and changes a bounded number of tasks; the next one goes on behind it, so that tasks which
continue to wait do not hide others; a key that another session has not committed holds up its own task only.
"""

from __future__ import annotations

import time
from uuid import UUID

from pgtask._backoff import Backoff
from pgtask._postgres.store import Link
from pgtask.errors import DatabaseUnavailable, DataRefused, RowsLocked, StatementTimeout

__all__ = ["Behind"]

MAX_INTERVAL = 15.0  # seconds between two looks while there seem to be none; less without notifications
INITIAL_INTERVAL, MAX_BUSY_INTERVAL = 0.2, 1.0  # seconds between two looks while there are some
MIN_INTERVAL = 0.1  # seconds after a look
MAX_TASKS = 1000  # in one look
MAX_FAILURES = 12  # of statements in one look, enough to find one culprit; each may have waited for 20 ms
SKIP = 5.0  # seconds for which a task is passed over whose key another session has not committed
_START = "-infinity", UUID(int=0)


class Behind:
    """The looks of one worker, over the connection of its claims."""

    def __init__(self, link: Link, *, listens: bool) -> None:
        self._link = link
        self._max_interval = MAX_INTERVAL if listens else 1.0
        self._intervals = Backoff(INITIAL_INTERVAL, MAX_BUSY_INTERVAL)
        self._looked_at = float("-inf")
        self._place: tuple[str, UUID] = _START
        self._seen = 0  # since the start of the index
        self._skipped: dict[UUID, float] = {}  # and until when (monotonic seconds)
        self.waiting = 0
        """The tasks that wait, as far as this worker knows."""
        self.due_at = 0.0
        """The time of the next look (monotonic seconds)."""

    def look_soon(self) -> None:
        """Look again, since there may be such tasks, or the one before them may have ended."""
        self._intervals.reset()
        self.due_at = min(self.due_at, max(time.monotonic(), self._looked_at + MIN_INTERVAL))

    def note_outcomes(self) -> None:
        """Look again before long, if tasks wait, since this worker has ended some."""
        if self.waiting:
            self.due_at = min(self.due_at, self._looked_at + INITIAL_INTERVAL)

    async def promote(self) -> int:
        """Look at the next tasks, and make those due that may start. Return how many."""
        self._looked_at = now = time.monotonic()
        promoted, is_over = 0, True
        try:
            free, is_over = await self._find_free()
            self._skipped = {task: until for task, until in self._skipped.items() if until > now}
            promoted = await self._promote([task for task in free if task not in self._skipped])
        except (DatabaseUnavailable, DataRefused):  # it may know less than there is
            self.waiting = max(1, self.waiting)
        if promoted:
            self._intervals.reset()
        pause = self._intervals.next() if self.waiting else self._max_interval
        self.due_at = time.monotonic() + (pause if is_over else MIN_INTERVAL)
        return promoted

    async def promote_all(self) -> int:
        """Look from the start to the end of the index, or until tasks are due. Return how many."""
        self._place, self._seen = _START, 0
        while not (promoted := await self.promote()) and self._place != _START:
            pass
        return promoted

    async def _find_free(self) -> tuple[list[UUID], bool]:
        """Return the tasks of the next part of the index that may start, and whether it was the last part."""
        ((free, count, *last),) = await self._link.once("find_free", *self._place, MAX_TASKS)
        self._seen += count
        is_over = count < MAX_TASKS
        self.waiting = self._seen if is_over else max(self.waiting, self._seen)
        self._place, self._seen = (_START, 0) if is_over else ((last[0], last[1]), self._seen)
        return free, is_over

    async def _promote(self, tasks: list[UUID]) -> int:
        """Make tasks due, all at once; if that fails, in halves, until the culprit is alone, which is passed over."""
        promoted = failures = 0
        portions = [tasks] if tasks else []
        while portions and failures < MAX_FAILURES:
            portion = portions.pop(0)
            try:
                ((count,),) = await self._link.once("promote", portion)
                promoted += count
            except (DataRefused, RowsLocked, StatementTimeout):
                failures += 1
                if len(portion) == 1:
                    self._skipped[portion[0]] = time.monotonic() + SKIP
                else:
                    middle = len(portion) // 2
                    portions += [portion[:middle], portion[middle:]]
        return promoted
