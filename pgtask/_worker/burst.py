"""burst: whether there is anything left to do, for a worker that leaves when there is not.

Invariant: a burst is over when nobody holds a task, here or elsewhere, and nothing falls due within the horizon.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask._worker.status import MOST_PARKED

__all__ = ["Burst"]


class Burst:
    """To be asked when this worker holds nothing; shares the connection of the claims."""

    def __init__(self, link: Link, claim: Claim, *, queues: Sequence[str], horizon: float) -> None:
        self._link, self._claim = link, claim
        self._queues = list(queues) or None
        self._horizon = horizon
        self.is_over = False
        self.parked_left = 0
        """How many tasks with an error it has left, 1,000 for so many or more."""

    async def look(self) -> bool:
        """Find out whether it is over; false if others are at work, or something is still to come."""
        if self._claim.wanted or self._more_to_come():
            return False
        ((leased, some_parked),) = await self._link.run("burst_left", self._queues)
        if leased:
            return False
        await self._claim.look()  # for what came back from the last lease since we looked
        if not self._claim.wanted and not self._more_to_come():
            if some_parked:
                ((self.parked_left,),) = await self._link.run("parked_left", self._queues, MOST_PARKED)
            self.is_over = True
        return True

    def _more_to_come(self) -> bool:
        due = self._claim.next_due
        return due is not None and due - time.monotonic() <= self._horizon
