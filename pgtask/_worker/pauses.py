"""pauses: learn what people have paused, and claim none of it.

Theory of operation. The pauses are rows, which this stage reads at the start, when a notification says that they have
changed, after each new connection of the listener, and every ten seconds; each second without a listener. A paused
queue has no lanes for the claims. Tasks of a paused task, step or key are passed over as those of other apps
are (foreign.py). A worker does not know the key of a task: while a key is paused, each next step is claimed anew.

Invariant: no claim is sent before the pauses were read once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pgtask._fastpath import Table
from pgtask._log import EventLog
from pgtask._postgres.pauses import GROUPS, Paused
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask._worker.groups import Groups
from pgtask.errors import DatabaseUnavailable, RowsLocked, StatementTimeout

__all__ = ["Pauses"]

log = EventLog("pgtask.pauses")

MAX_LABELS = 10
INTERVAL = 1.0  # seconds between two looks without notifications, and after one that failed
MAX_INTERVAL = 10.0  # the same with notifications, for a listener that has lost its connection and does not know


class Pauses:
    """What is paused, as of the last look over `link`; `claim` and `table` obey it. Calls `limited` with the names of
    the limits, if there are any."""

    def __init__(
        self,
        link: Link,
        claim: Claim,
        table: Table | None,
        *,
        listens: bool,
        limited: Callable[[Iterable[str]], None] = lambda names: None,
        groups: Groups | None = None,
    ) -> None:
        self._link = link
        self.groups = groups
        """Learns from each look whether there are groups that have not ended."""
        self._claim = claim
        self._table = table
        self._limited = limited
        self._limits: frozenset[str] = frozenset()
        self._interval = MAX_INTERVAL if listens else INTERVAL
        self._all: frozenset[Paused] = frozenset()
        self.was_read = False
        """Whether it has read the pauses at all."""
        self.due_at = 0.0
        """When to look again (monotonic seconds)."""

    def look_soon(self) -> None:
        """Look at once, since something may have been paused or resumed."""
        self.due_at = 0.0

    async def look(self, *, waits: bool = False) -> bool:
        """Read the pauses. Return whether something is paused that was not before. If they cannot be read, look again
        later; with `waits`, wait for a database that is unavailable."""
        self.due_at = time.monotonic() + self._interval
        try:
            if waits:
                rows = await self._link.run("obeyed", raises=(RowsLocked, StatementTimeout))
            else:
                rows = await self._link.once("obeyed")
        except DatabaseUnavailable:
            self.due_at = time.monotonic() + INTERVAL
            return False
        self.was_read = True
        if (limits := frozenset(row[1] for row in rows if row[0] == "limit")) != self._limits or limits:
            self._limits = limits
            self._limited(limits)
        if self.groups is not None:
            self.groups.note_open(any(row[0] == GROUPS for row in rows))
        before, self._all = self._all, frozenset(Paused(*row[:2]) for row in rows if row[0] not in ("limit", GROUPS))
        if self._all == before:
            return False
        tasks, steps = self._names("task"), self._names("step")
        queues, keys = self._names("queue"), self._names("key")
        self._claim.obey_pauses(queues, tasks, steps, keys)
        if self._table is not None:
            self._table.pause(tasks, steps, bool(queues or keys))
        if paused := self._all - before:
            log.info("work.paused", what=_list(paused))
        if resumed := before - self._all:
            log.info("work.resumed", what=_list(resumed))
        return not self._all <= before

    @property
    def labels(self) -> tuple[str, ...]:
        """Some of what is paused, for people."""
        return tuple(map(str, sorted(self._all)[:MAX_LABELS]))

    def _names(self, kind: str) -> frozenset[str]:
        return frozenset(thing.name for thing in self._all if thing.kind == kind)


def _list(things: frozenset[Paused]) -> str:
    return ", ".join(map(str, sorted(things)))[:500]
