"""flush: write outcomes in batches, one statement each.

Invariants: an outcome is written under the token of its lease or not at all; it stays in this worker's hands until the
database has answered, however long that takes; one outcome that the database refuses does not hold up the others.
"""

from __future__ import annotations

import logging
import time

from pgtask._events import log_event
from pgtask._fastpath import Lease, Leases, Outcomes
from pgtask._postgres.store import Link
from pgtask.errors import DataRefused, RowsLocked

__all__ = ["Flush"]

log = logging.getLogger("pgtask.flush")

RETRY_LOCKED = 1.0  # seconds between two looks at rows that somebody else has locked


class Flush:
    """Writes `Outcomes` over `link` and strikes what is written off `leases`."""

    def __init__(self, link: Link, leases: Leases) -> None:
        self._link = link
        self._leases = leases
        self.done = 0
        """Tasks that are finished, in the database."""
        self.parked = 0
        """Tasks that are parked with an error, in the database."""
        self.waiting = Outcomes()
        """Outcomes whose row somebody else has locked: they hold up no other, and are tried again every second."""
        self._try_waiting_at = 0.0
        self.lost = 0
        """Leases that were lost; what came of their steps was dropped."""
        self._lost: list[tuple[float, Lease]] = []  # and when each of them ends for the others as well

    async def flush(self, outcomes: Outcomes, *, waits_for_rows: bool = False) -> list[Lease]:
        """Write a batch and return the leases whose next step may now run. Waits out a database that is away.

        Raises `DatabaseRefused`. If it is cancelled the batch may or may not be written; the leases then run out.
        """
        if outcomes.archived and len(outcomes) > len(outcomes.archived):
            await self.flush(outcomes.take_archived(), waits_for_rows=waits_for_rows)
        attempts = 0

        def again() -> None:
            nonlocal attempts
            attempts += 1

        try:
            ((done, kept, moved, _),) = await self._link.run(
                outcomes.statement, *outcomes.parameters(), on_loss=again, waits_for_rows=waits_for_rows
            )
        except RowsLocked:
            return await self._flush_unlocked(outcomes)
        except DataRefused as error:
            return await self._isolate(outcomes, error)
        # Sent twice, an outcome that is no longer there was probably written by the first attempt.
        certain = attempts == 0
        finished = outcomes.done + outcomes.archived
        self.done += len(finished) - self._strike(finished, done, certain)
        parked = [
            lease for lease, error in zip(outcomes.moved, outcomes.moved_errors, strict=True) if error is not None
        ]
        if self._strike(outcomes.moved, moved, certain) and moved is not None:
            written = set(moved)
            parked = [lease for lease in parked if lease.id in written]
        self.parked += len(parked)
        if kept is None:
            return outcomes.kept
        written = set(kept)
        self._strike([lease for lease in outcomes.kept if lease.id not in written], [], certain=True)
        return [lease for lease in outcomes.kept if lease.id in written]

    async def flush_waiting(self) -> list[Lease]:
        """Write what waits for its row and can be written now; the leases whose next step may run."""
        if not len(self.waiting) or time.monotonic() < self._try_waiting_at:
            return []
        outcomes, self.waiting = self.waiting, Outcomes()
        return await self._flush_unlocked(outcomes)

    async def _flush_unlocked(self, outcomes: Outcomes) -> list[Lease]:
        """Write all but the outcomes whose row is locked; those wait."""
        locked = {row[0] for row in await self._link.run("locked", outcomes.ids())}
        waiting, ready = outcomes.divide(locked)
        if len(waiting):
            log_event(log, logging.WARNING, "outcome.waits", tasks=len(waiting), reason="somebody has locked the row")
            self.waiting.extend(waiting, set(), among=False)
            self._try_waiting_at = time.monotonic() + RETRY_LOCKED
        # If no row is locked, the whole table was: that is waited for.
        return await self.flush(ready, waits_for_rows=not len(waiting)) if len(ready) else []

    def _strike(self, leases: list[Lease], written: list[object] | None, certain: bool) -> int:
        """Forget leases that have ended; those not among `written` (None: all were) were lost before. How many."""
        self._leases.remove_all(leases)
        if written is None or not certain:
            return 0
        found = set(written)
        lost = 0
        for lease in leases:
            if lease.id not in found:
                lost += 1
                log_event(log, logging.WARNING, "lease.lost", task=lease.id, step=lease.label, outcome="dropped")
        self.lost += lost
        return lost

    async def _isolate(self, outcomes: Outcomes, error: DataRefused) -> list[Lease]:
        """The database refuses the batch for its data: find the culprit by halves; park it with what was said."""
        if len(outcomes) > 1:
            first, second = outcomes.halves()
            return await self.flush(first) + await self.flush(second)
        (lease,) = outcomes.done + outcomes.archived + outcomes.kept + outcomes.moved
        log_event(log, logging.ERROR, "outcome.refused", task=lease.id, step=lease.label, error=str(error))
        refused = Outcomes()
        reason = f"the outcome of {lease.label} was refused by the database: {error}"
        refused.add_moved(lease, None, lease.tried + 1, reason.encode("ascii", "replace").decode()[:2000], 0.0)
        try:
            ((_, _, moved, _),) = await self._link.run("flush", *refused.parameters())
        except DataRefused as again:  # not even that: let go of it, its lease runs out
            log_event(log, logging.ERROR, "outcome.refused", task=lease.id, step=lease.label, error=str(again))
            self._leases.remove(lease)
            self.lost += 1
            return []
        self.parked += 1 - self._strike([lease], moved, certain=True)
        return []

    def wait(self) -> float:
        """Seconds until there is something to write or to give back that nobody will bring up."""
        retry = RETRY_LOCKED if len(self.waiting) else float("inf")
        return min(retry, self._lost[0][0] - time.monotonic()) if self._lost else retry

    def lose(self, lease: Lease, *, ends_in: float) -> None:
        """Somebody else may have this task, in `ends_in` seconds at the latest."""
        self.lost += 1
        self._lost.append((time.monotonic() + ends_in, lease))

    def take_lost(self, *, before: float | None = None) -> list[Lease]:
        """The lost leases that have ended by now. If nobody was there to take their tasks, as while the database is
        away, they are released like others: this worker lives, so these tasks are under no suspicion."""
        if not self._lost:
            return []
        now = time.monotonic() if before is None else before
        ended = [lease for ends, lease in self._lost if ends <= now]
        self._lost = [entry for entry in self._lost if entry[0] > now]
        return ended

    async def release(self, leases: list[Lease]) -> None:
        """Give leases back untouched, as if they had never been claimed; other workers are told."""
        if not leases:
            return
        await self._link.run("release", [lease.id for lease in leases], [lease.token for lease in leases])
        self._leases.remove_all(leases)
