"""flush: write outcomes in batches, one statement each.

Invariants: an outcome is written under the token of its lease or not at all; this worker keeps it until the database
has answered, however long that takes; an outcome that the database refuses does not delay the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from pgtask._fastpath import CounterPage, Leases, Outcomes, TaskLease
from pgtask._log import EventLog
from pgtask._postgres.store import Link
from pgtask._postgres.writer import Aside, WriteBatch, Writer
from pgtask._sparing import SparingLog
from pgtask._worker.new_tasks import seconds_until_due
from pgtask.errors import DataRefused

__all__ = ["WITHOUT_GROUPS", "WITHOUT_NEW", "Flush"]

log = EventLog("pgtask.flush")

LOCKED_RETRY = 1.0  # seconds between two tries to release leases whose rows another session has locked
WITHOUT_GROUPS = 4  # columns in the answer to outcomes without members of groups; else the groups come behind them
WITHOUT_NEW = 16  # parameters of the statement of outcomes that enqueue nothing
MAX_REASON = 2000  # characters of the error that parks a task


class _FlushBatch(WriteBatch):
    """Leases that a flush ends or keeps. It counts as blocked from the time that it was set aside."""

    def __init__(self, flush: Flush) -> None:
        self._flush = flush
        self._is_aside = False

    def inherit(self, whole: WriteBatch) -> None:
        super().inherit(whole)
        assert isinstance(whole, _FlushBatch)
        self._is_aside = whole._is_aside

    def go_aside(self) -> None:
        self._is_aside = True
        self._flush.blocked += len(self)

    def _come_back(self) -> None:
        if self._is_aside:
            self._flush.blocked -= len(self)
            self._flush.wake()


class _OutcomeBatch(_FlushBatch):
    """Outcomes of one flush, or a part of them."""

    def __init__(self, flush: Flush, outcomes: Outcomes, position: int) -> None:
        super().__init__(flush)
        self._outcomes = outcomes
        self._position = position  # a batch that is sent again, or in parts, keeps its own
        self._is_rejection = False

    def _of(self, outcomes: Outcomes) -> _OutcomeBatch:
        part = _OutcomeBatch(self._flush, outcomes, self._position)
        part.inherit(self)
        part._is_rejection = self._is_rejection
        return part

    @property
    def statement(self) -> str:
        return self._outcomes.statement

    def __len__(self) -> int:
        return len(self._outcomes)

    @property
    def rows(self) -> int:
        return self._outcomes.rows

    @property
    def size(self) -> int:
        return self._outcomes.size

    def parameters(self) -> tuple[Any, ...]:
        return self._outcomes.parameters(self._position)

    def task_ids(self) -> list[UUID]:
        return [lease.id for lease in self._outcomes.leases()]

    def halves(self) -> tuple[_OutcomeBatch, _OutcomeBatch]:
        first, second = self._outcomes.halves()
        return self._of(first), self._of(second)

    def divide(self, ids: set[UUID]) -> tuple[_OutcomeBatch, _OutcomeBatch]:
        among, others = self._outcomes.divide(ids)
        return self._of(among), self._of(others)

    async def answer(self, rows: list[Any], link: Link) -> None:
        going_on = self._flush.end_written(self._outcomes, *rows[0][:3], is_certain=self.is_certain)
        (self._flush.returned if self._is_aside else self._flush.continuing).extend(going_on)
        if len(rows[0]) > WITHOUT_GROUPS:
            self._flush.changed(rows[0][WITHOUT_GROUPS])
        if self._outcomes.new_tasks:
            self._flush.due_in(min(seconds_until_due(self._outcomes)))
        self._come_back()

    def reject(self, error: DataRefused) -> _OutcomeBatch | None:
        (lease,) = self._outcomes.leases()
        log.error("outcome.refused", task=lease.id, step=lease.label, error=str(error))
        if self._is_rejection:  # the task cannot even be parked: let its lease expire
            self._flush.give_up(lease)
            self._come_back()
            return None
        reason = f"the outcome of {lease.label} was refused by the database: {error}"
        reason = reason.encode("ascii", "replace").decode()[:MAX_REASON]
        parked = Outcomes()
        parked.add_rescheduled(lease, None, lease.tried + 1, reason, 0.0)
        rejection = self._of(parked)
        rejection._is_rejection = True
        return rejection


class _ReleaseBatch(_FlushBatch):
    """Leases that are released untouched."""

    statement = "release"
    size = 0

    def __init__(self, flush: Flush, leases: list[TaskLease]) -> None:
        super().__init__(flush)
        self._leases = leases

    def _of(self, leases: list[TaskLease]) -> _ReleaseBatch:
        part = _ReleaseBatch(self._flush, leases)
        part.inherit(self)
        return part

    def __len__(self) -> int:
        return len(self._leases)

    def parameters(self) -> tuple[Any, ...]:
        begun = [lease.id for lease in self._leases if lease.was_stopped]
        return [lease.id for lease in self._leases], [lease.token for lease in self._leases], begun

    def task_ids(self) -> list[UUID]:
        return [lease.id for lease in self._leases]

    def halves(self) -> tuple[_ReleaseBatch, _ReleaseBatch]:
        middle = len(self._leases) // 2
        return self._of(self._leases[:middle]), self._of(self._leases[middle:])

    def divide(self, ids: set[UUID]) -> tuple[_ReleaseBatch, _ReleaseBatch]:
        return (
            self._of([lease for lease in self._leases if lease.id in ids]),
            self._of([lease for lease in self._leases if lease.id not in ids]),
        )

    async def answer(self, rows: list[Any], link: Link) -> None:
        self._flush.end_released(self._leases, set(rows[0][3] or ()))
        self._come_back()

    def reject(self, error: DataRefused) -> None:
        log.warning("leases.abandoned", leases=1, error=str(error))
        self._flush.give_up(self._leases[0])
        self._come_back()


class _WaitBatch(_ReleaseBatch):
    """Leases whose tasks have to wait for the limits of their steps, with the keys and costs of these."""

    statement = "limits/wait"

    def __init__(self, flush: Flush, leases: list[TaskLease], keys: dict[TaskLease, tuple[str, float]]) -> None:
        super().__init__(flush, leases)
        self._keys = keys

    def _of(self, leases: list[TaskLease]) -> _WaitBatch:
        part = _WaitBatch(self._flush, leases, self._keys)
        part.inherit(self)
        return part

    def parameters(self) -> tuple[Any, ...]:
        ids, tokens, _ = super().parameters()
        keys = [self._keys[lease] for lease in self._leases]
        return ids, tokens, [key for key, _ in keys], [cost for _, cost in keys]


class Flush:
    """The writer of `Outcomes` over `link`. It removes written leases from `leases`, and calls `wake` when an outcome
    that was set aside is written, `due_in` with the seconds until the first new task of written outcomes is due, and
    `changed` with the groups whose members they are. `page` counts by step what the totals count."""

    def __init__(
        self,
        link: Link,
        leases: Leases,
        aside: Aside,
        wake: Callable[[], None],
        due_in: Callable[[float], None] = lambda seconds: None,
        changed: Callable[[list[int]], None] = lambda groups: None,
        page: CounterPage | None = None,
    ) -> None:
        self._link = link
        self._leases = leases
        self._page = page
        self._writer = Writer(link, aside)
        self.wake = wake
        self.due_in = due_in
        self.changed = changed
        self.done = 0
        """Tasks that are finished, in the database."""
        self.parked = 0
        """Tasks that are parked with an error, in the database."""
        self.blocked = 0
        """Outcomes that were set aside, as their rows are locked for one, and are not written yet."""
        self._lost_log = SparingLog(log, logging.WARNING, "lease.lost")
        self.lost = 0
        """Leases that were lost; the outcomes of their steps were dropped."""
        self.continuing: list[TaskLease] = []
        self.returned: list[TaskLease] = []
        self._lost: list[tuple[float, TaskLease]] = []  # and when each lease expires in the database
        self._locked: list[TaskLease] = []  # to be released once no other session locks their rows
        self._retry_locked_at = 0.0
        self._position = 0  # of the last flush

    async def flush(self, outcomes: Outcomes) -> None:
        """Write a batch. What would hold up the others is set aside. Waits while the database is unavailable.

        Raises `DatabaseRefused`. If it is cancelled the batch may or may not be written; the leases then expire.
        """
        for part in outcomes.parts():
            await self._writer.write(_OutcomeBatch(self, part, self.next_position()))

    def next_position(self) -> int:
        """Return the number of the next flush, or of a transaction that writes outcomes."""
        self._position += 1
        return self._position

    def take_continuing(self) -> list[TaskLease]:
        """Return the leases that a flush has written since the last call, and whose next step may run now."""
        continuing, self.continuing = self.continuing, []
        return continuing

    def take_returned(self) -> list[TaskLease]:
        """Return the same of the outcomes that had been set aside."""
        returned, self.returned = self.returned, []
        return returned

    def end_written(
        self,
        outcomes: Outcomes,
        done: list[UUID] | None,
        continued: list[UUID] | None,
        rescheduled: list[UUID] | None,
        *,
        is_certain: bool,
    ) -> list[TaskLease]:
        """Count outcomes that a statement has written, and end their leases, but those whose next step may run, which
        it returns. `done`, `continued` and `rescheduled` are the tasks that the statement found; None is all."""
        if self._page is not None:
            self._page.count_written(
                outcomes, done if is_certain else None, continued, rescheduled if is_certain else None
            )
        finished = outcomes.done + outcomes.archived
        self.done += len(finished) - self._remove_ended(finished, done, is_certain)
        gone = [row.lease for row in outcomes.rescheduled]
        parked = [row.lease for row in outcomes.rescheduled if row.error is not None]
        if self._remove_ended(gone, rescheduled, is_certain) and rescheduled is not None:
            written = set(rescheduled)
            parked = [lease for lease in parked if lease.id in written]
        self.parked += len(parked)
        going_on = [lease for lease, _ in outcomes.continued]
        if continued is not None:
            written = set(continued)
            self._remove_ended([lease for lease in going_on if lease.id not in written], [], True)
            going_on = [lease for lease in going_on if lease.id in written]
        return going_on

    def find_lost(
        self,
        outcomes: Outcomes,
        done: list[UUID] | None,
        continued: list[UUID] | None,
        rescheduled: list[UUID] | None,
    ) -> list[TaskLease]:
        """Return the leases that a statement did not find, from its answer as in `end_written`."""
        kinds = (
            (outcomes.done + outcomes.archived, done),
            ([lease for lease, _ in outcomes.continued], continued),
            ([row.lease for row in outcomes.rescheduled], rescheduled),
        )
        return [lease for leases, found in kinds if found is not None for lease in leases if lease.id not in set(found)]

    def count_held(self, outcomes: Outcomes, *, done: int, rescheduled: int) -> None:
        """Count outcomes that the transaction which held their rows has written: so many are done, and so many were
        rescheduled. It misses those whose write a trigger has suppressed."""
        self.done += done
        self.lost += len(outcomes.done) - done + len(outcomes.rescheduled) - rescheduled
        if rescheduled == len(outcomes.rescheduled):
            self.parked += sum(row.error is not None for row in outcomes.rescheduled)
        if self._page is not None:
            self._page.count_held(outcomes, done, rescheduled)

    def drop(self, leases: list[TaskLease]) -> None:
        """Count leases whose outcomes are not written."""
        self.lost += len(leases)
        if self._page is not None:
            self._page.count_lost(leases)

    def count_done(self, leases: list[TaskLease]) -> None:
        """Count tasks that are done, since their rows are gone."""
        self.done += len(leases)
        if self._page is not None:
            self._page.count_done(leases)

    def _remove_ended(self, leases: list[TaskLease], written: list[UUID] | None, is_certain: bool) -> int:
        """Remove leases that have ended. Return how many were lost before: `written`, if not None, lacks those.

        An outcome that a repeated statement does not find was probably written by the first one."""
        self._leases.remove_all(leases)
        if written is None or not is_certain:
            return 0
        found = set(written)
        lost = 0
        for lease in leases:
            if lease.id not in found:
                lost += 1
                self._lost_log.log_or_count(task=lease.id, step=lease.label, outcome="dropped")
        self.lost += lost
        return lost

    def give_up(self, lease: TaskLease) -> None:
        """Let a lease expire whose outcome the database takes in no form."""
        self._leases.remove(lease)
        self.drop([lease])

    def log_suppressed(self) -> None:
        """Log how many leases were lost without a line of their own."""
        self._lost_log.log_count()

    def seconds_to_wait(self) -> float:
        """Return the seconds until there is something to release of which no event tells the pump."""
        retry = LOCKED_RETRY if self._locked else float("inf")
        return min(retry, self._lost[0][0] - time.monotonic()) if self._lost else retry

    def add_lost(self, lease: TaskLease, *, ends_in: float) -> None:
        """Count a lost lease. Another worker may have its task now, or in `ends_in` seconds at the latest."""
        self._lost_log.log_or_count(task=lease.id, step=lease.label, outcome="cancelled")
        self.drop([lease])
        self._lost.append((time.monotonic() + ends_in, lease))

    def take_releasable(self, *, before: float | None = None) -> list[TaskLease]:
        """Return the lost leases that have expired, and those whose row was locked when they were to be released.

        If no worker could claim a lost task, as while the database is unavailable, it is released like others: this
        worker lives, so the task is no suspect."""
        if not self._lost and not self._locked:
            return []
        now = time.monotonic() if before is None else before
        leases = [lease for ends_at, lease in self._lost if ends_at <= now]
        self._lost = [lost for lost in self._lost if lost[0] > now]
        if self._locked and self._retry_locked_at <= now:
            leases += self._locked
            self._locked = []
        return leases

    @property
    def locked(self) -> int:
        """The number of leases that are released once another session unlocks their rows."""
        return len({lease.id for lease in self._locked if self._leases.get(lease.id) is lease})

    async def release(self, leases: list[TaskLease]) -> None:
        """Release leases untouched, as if never claimed, and tell other workers. Does not wait for a row that another
        session has locked: its lease is kept, and `take_releasable` returns it later."""
        if leases:
            await self._writer.write(_ReleaseBatch(self, leases))

    async def let_wait(self, unlimited: list[tuple[TaskLease, str, float]]) -> None:
        """Have tasks wait for the limits of their steps, under these keys and with these costs, since they were claimed
        without."""
        if unlimited:
            keys = {lease: (key, cost) for lease, key, cost in unlimited}
            await self._writer.write(_WaitBatch(self, list(keys), keys))

    def end_released(self, leases: list[TaskLease], locked: set[UUID]) -> None:
        """Remove leases that a statement has released, but those whose rows are locked."""
        self._leases.remove_all([lease for lease in leases if lease.id not in locked])
        if locked:
            self._locked += [lease for lease in leases if lease.id in locked]
            self._retry_locked_at = time.monotonic() + LOCKED_RETRY
