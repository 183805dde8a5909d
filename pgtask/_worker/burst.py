"""burst: the end of a burst, for a worker that leaves when no work is left.

Invariant: a burst is over when no task of this app is leased, here or elsewhere, and none falls due within the horizon.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence

import msgspec

from pgtask._postgres.store import Link
from pgtask._status import MAX_PARKED
from pgtask._worker.claim import Claim
from pgtask._worker.limits import Limits

__all__ = ["Burst"]


class Burst:
    """The check for the end, made while this worker holds no lease. It shares the connection of the claims.

    `names` are the tasks that this app answers for (None: all). `foreign` matches the envelopes of other apps' tasks
    (None: no such tasks): a burst does not wait for their leases.
    """

    def __init__(
        self,
        link: Link,
        claim: Claim,
        *,
        names: Collection[str] | None,
        foreign: str | None,
        queues: Sequence[str],
        horizon: float,
        limits: Limits | None = None,
    ) -> None:
        self._link, self._claim = link, claim
        self._foreign = foreign
        self._names = names
        self._queues = list(queues) or None
        self._horizon = horizon
        self._limits = limits
        self.is_over = False
        self.parked_left = 0
        """The number of tasks of this app that it has left parked, `MAX_PARKED` for so many or more."""
        self.parked_others = 0
        """The same for tasks that this app does not know."""

    async def check_end(self) -> bool:
        """Set `is_over` if the burst is over. Return False if a task is leased, or one falls due within the horizon."""
        if self._claim.may_find_tasks or self._expects_more():
            return False
        ((leased, some_parked),) = await self._link.run("burst_left", self._queues, self._foreign)
        if leased:
            return False
        if await self._waits_for_limits():
            return False
        await self._claim.poll_lanes(is_complete=True)  # a task of the last lease may have been released since
        if not self._claim.may_find_tasks and not self._expects_more():
            if some_parked:
                self._count_parked(await self._link.run("parked_left", self._queues, MAX_PARKED))
            self.is_over = True
        return True

    def _count_parked(self, rows: Iterable[tuple[str | None, int]]) -> None:
        """Count a row without an envelope as ours: a worker of this app may have parked it for that."""
        for name, tasks in rows:
            if name is None or self._names is None or _unescape(name) in self._names:
                self.parked_left += tasks
            else:
                self.parked_others += tasks

    async def _waits_for_limits(self) -> bool:
        """Return whether a task of this app waits for a limit and would be due without it."""
        if self._limits is None or not self._limits.is_used:
            return False
        names = self._limits.names
        ((waits,),) = await self._link.run("limits/left", names, self._horizon, self._queues, self._foreign)
        return bool(waits)

    def _expects_more(self) -> bool:
        due = self._claim.next_due
        return due is not None and due - time.monotonic() <= self._horizon


def _unescape(name: str) -> str:
    try:
        return msgspec.json.decode(f'"{name}"', type=str)
    except msgspec.DecodeError:
        return name
