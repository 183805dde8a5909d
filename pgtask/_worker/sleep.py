"""sleep: say that this worker sleeps, so that a write that it waits for notifies, and others do not.

Invariants: a worker that waits for tasks is asleep for the writers, or about to look by itself; after it has said that
it sleeps it looks once more, and again whenever a transaction ends that was writing to the table at that time: it may
have written a task before, without a notification.

A writer locks the table before it asks whether a worker sleeps, and until all can see its rows. So one that asked too
early has either ended before this worker lists the locks, and the next look sees its tasks; or it is in the list.

A worker that is woken stays asleep for the writers for a moment, since it often has nothing to do soon again. Where
many writers wake it at once, notifying costs them more than it helps: it gets up, looks every 10 ms for a while, and
sleeps afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pgtask._backoff import Backoff
from pgtask._postgres.store import statement

__all__ = ["Sleep"]

BUSY_AFTER = 0.01  # seconds of work after which this worker is no longer asleep
CROWD = 4  # notifications within
CROWD_TIME = 0.02  # seconds: many writers
CALM_TIME = 1.0  # seconds without a crowd, after which the next one counts as the first
INITIAL_WATCH, MAX_WATCH = 0.5, 8.0  # seconds of looks after a crowd
INITIAL_LOOK, MAX_LOOK = 0.01, 0.05  # seconds between two of them
INITIAL_CHECK, MAX_CHECK = 0.01, 1.0  # seconds between two checks of those writers


class Sleep:
    """The sleep of one worker that serves `queues`, all if there are none.

    It calls `look` when there may be a task that no notification announces, and `advance_soon` when its owner is to
    call `advance`. Use it on one loop.
    """

    def __init__(self, queues: tuple[str, ...], *, look: Callable[[], None], advance_soon: Callable[[], None]) -> None:
        self._queues = list(queues)
        self._look, self._advance_soon = look, advance_soon
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # until it rings
        self._advance_at = 0.0
        self._waits = False  # for tasks: it has free slots, and knows of nothing due
        self._began = 0.0  # the time of its last claim that brought tasks
        self.is_asleep = False
        """Whether writers notify this worker."""
        self._writers: set[str] = set()  # open transactions that may have asked before it was
        self._heard: deque[float] = deque(maxlen=CROWD)
        self._watches_until = 0.0
        self._watch = Backoff(INITIAL_WATCH, MAX_WATCH)
        self._looks = Backoff(INITIAL_LOOK, MAX_LOOK)
        self._checks = Backoff(INITIAL_CHECK, MAX_CHECK)

    # --- what the worker does

    def set_waiting(self, waits: bool) -> None:
        """Note whether the worker waits for tasks; if not, it has tasks to do, or no room for more."""
        if waits is self._waits:
            return
        self._waits = waits
        if not waits:
            self._began = time.monotonic()
            self._looks.reset()
            if self.is_asleep:
                self._advance_in(BUSY_AFTER)
        elif not self.is_asleep:
            self._advance_soon()

    def count_notification(self) -> None:
        """Count a notification for this worker."""
        now = time.monotonic()
        self._heard.append(now)
        if self.is_asleep and self._is_crowded(now):
            self._advance_soon()

    def reset(self) -> None:
        """Begin on a new connection, on which the worker is not asleep."""
        self.is_asleep = False
        self._writers.clear()
        self._heard.clear()
        if self._waits:
            self._advance_soon()

    # --- what follows from it

    async def advance(self, connection: Any) -> None:
        """Fall asleep, get up or look, as it is time. An error of the connection passes through: `reset` follows."""
        now = time.monotonic()
        if self.is_asleep:
            busy = 0.0 if self._waits else now - self._began
            if (crowded := self._is_crowded(now)) or busy >= BUSY_AFTER:
                await connection.execute(statement("wake_up"))
                self.is_asleep = False
                self._writers.clear()
                if crowded:
                    self._begin_watch(now)
            elif not self._waits:
                self._advance_in(BUSY_AFTER - busy)
            elif self._writers:
                await self._check_writers(connection)
        if self._waits and not self.is_asleep:
            if now < self._watches_until:
                self._look()
                self._advance_in(self._looks.next())
            else:
                await self._fall_asleep(connection)

    def _is_crowded(self, now: float) -> bool:
        return len(self._heard) == CROWD and now - self._heard[0] < CROWD_TIME

    def _begin_watch(self, now: float) -> None:
        if now > self._watches_until + CALM_TIME:
            self._watch.reset()
        self._watches_until = now + self._watch.next()
        self._heard.clear()

    async def _fall_asleep(self, connection: Any) -> None:
        await connection.fetch(statement("sleep"), self._queues)
        self.is_asleep = True
        self._writers = await _writers(connection)
        self._look()
        if self._writers:
            self._checks.reset()
            self._advance_in(self._checks.next())

    async def _check_writers(self, connection: Any) -> None:
        still = self._writers & await _writers(connection)
        if still != self._writers:
            self._look()
        self._writers = still
        if still:
            self._advance_in(self._checks.next())

    def _advance_in(self, seconds: float) -> None:
        """Advance in some seconds; an earlier time that was set before stays."""
        at = time.monotonic() + seconds
        if self._timer is not None:
            if self._advance_at <= at:
                return
            self._timer.cancel()
        self._advance_at = at
        self._timer = self._loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._advance_soon()


async def _writers(connection: Any) -> set[str]:
    """Return the open transactions that have written to the table."""
    return {row[0] for row in await connection.fetch(statement("writers"))}
