"""A limit for events that may come by the thousand: some lines, then the count of the rest.

Invariant: at most `limit` lines in each second and one with the count, and each event is in one of them.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pgtask._log import EventLog

__all__ = ["SparingLog"]


class SparingLog:
    """Logs `event` at `level`, at most `limit` lines a second. Use it on a running loop."""

    def __init__(self, log: EventLog, level: int, event: str, *, limit: int = 10) -> None:
        self._log, self._level, self._event, self._limit = log, level, event, limit
        self._until = float("-inf")  # the end of the second whose lines are counted
        self._left = 0
        self._more = 0
        self._timer: asyncio.TimerHandle | None = None

    def log_or_count(self, **fields: Any) -> None:
        now = time.monotonic()
        if now >= self._until:
            self._until, self._left = now + 1, self._limit
        if self._left:
            self._left -= 1
            self._log.log(self._level, self._event, **fields)
            return
        self._more += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._until - now, self.log_count)

    def log_count(self) -> None:
        """Log the number of events beyond the lines. Call it once more when no event can follow."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._more:
            more, self._more = self._more, 0
            self._log.log(self._level, self._event, more=more)
