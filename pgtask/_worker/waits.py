"""What the branches of a run wait for, and when all of them do.

Invariant: as long as one branch is at work nothing is decided; when the last one begins to wait, the run as a whole is
let go until the first of the waits may be over. Beside a branch at work, what comes from outside (signals, the ends of
children) is looked for now and then: the row of a run that is leased wakes nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

__all__ = ["Wait", "Waits"]

LOOK = 1.0  # seconds until a branch that waits for something from outside looks again, while others are at work,
LOOK_AT_CHILD = 0.01  # and so much more for each child, so that waiting for a thousand costs no more than for a few
VAIN, LONGEST_VAIN = 0.002, 0.25  # seconds before all that waits is told again, after a look that has found nothing new


class Wait(NamedTuple):
    """What a branch waits for. `due_at`: when it looks again in any case; `seen_at`: the task's wakeup_at when it last
    looked for a signal."""

    what: str
    due_at: datetime | None = None
    seen_at: datetime | None = None
    children: tuple[UUID, ...] = ()


class Waits:
    """The waits of one run. `all_wait` is awaited when no branch is at work any more: when it returns all look again,
    and what it raises is raised in each of them."""

    def __init__(self, all_wait: Callable[[list[Wait]], Awaitable[None]], now: Callable[[], datetime]) -> None:
        self._all_wait = all_wait
        self._now = now
        self._at_work = 1
        self._is_deciding = False
        self._refused: list[Wait] = []  # what all waited for when the run was not let go, and looked once more
        self._vain = 0.0
        self._waiting: dict[asyncio.Future[None], Wait] = {}

    def begin(self, branches: int) -> None:
        """So many branches begin to work, beside those that do."""
        self._at_work += branches

    async def end(self) -> None:
        """A branch has ended."""
        self._at_work -= 1
        await self._decide()

    async def wait(self, wait: Wait) -> None:
        """Until it may be over. Raises what `all_wait` raises, and what `stop` is given."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        self._waiting[over] = wait
        self._at_work -= 1
        timer = None
        try:
            await self._decide()
            if not over.done() and (seconds := self._look_in(wait)) is not None:
                timer = loop.call_later(seconds, self._look, over)
            await over
        finally:
            if self._waiting.pop(over, None) is not None:  # cancelled
                self._at_work += 1
            if timer is not None:
                timer.cancel()

    def _look_in(self, wait: Wait) -> float | None:
        """In how many seconds a branch looks again while others are at work; None: not before they wait too."""
        look = None
        if wait.seen_at is not None or wait.children:
            look = LOOK + LOOK_AT_CHILD * len(wait.children)
        if wait.due_at is None:
            return look
        seconds = max(0.0, (wait.due_at - self._now()).total_seconds())
        return seconds if look is None else min(look, seconds)

    def _look(self, over: asyncio.Future[None]) -> None:
        """Let a branch look again; not while it is decided about all of them."""
        if not self._is_deciding and self._waiting.pop(over, None) is not None:
            self._at_work += 1
            over.set_result(None)

    def stop(self, error: BaseException) -> None:
        """Raise an error in all branches that wait."""
        while self._waiting:
            over, _ = self._waiting.popitem()
            self._at_work += 1
            if not over.done():
                over.set_exception(error)

    async def _decide(self) -> None:
        if self._at_work or not self._waiting or self._is_deciding:
            return
        self._is_deciding = True
        try:
            await self._hold_back()
            if not self._at_work:
                await self._all_wait(list(self._waiting.values()))
        except BaseException as error:
            self.stop(error)
            return
        finally:
            self._is_deciding = False
        for over in list(self._waiting):
            self._look(over)

    async def _hold_back(self) -> None:
        """What refuses to let go of a run, and what the run sees, should agree. Where they do not (somebody has meddled
        with the rows), looking again at once would be a storm."""
        waits = [wait._replace(seen_at=None) for wait in self._waiting.values()]
        self._vain = min(max(VAIN, 2 * self._vain), LONGEST_VAIN) if waits == self._refused else 0.0
        self._refused = waits
        if self._vain:
            await asyncio.sleep(self._vain)
