"""groups: notice the end of groups of tasks, and keep members of cancelled groups from running.

Theory of operation. The statement that writes the outcome of a member says which groups it has changed; a look after
its commit ends those that are over (end.sql tells why that is exact). A group of which thousands are left is looked at
a few times a second only. Members may also leave the table by other hands, or their worker may die between its commit
and its look. So while there are groups that have not ended, which a look at the pauses tells (pauses.py), a *sweep*
lists them each second, and looks at those whose counts have stopped.

A group that is cancelled has a state, and the sweep that a notification brings forward finds it. From then on this
worker removes the members that it claims, in place of starting them; and one worker after the other removes some
thousand of those that wait.

Invariants: who uses no groups sends no statement for them; nothing here waits for a row that another session has
locked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from typing import Any
from uuid import UUID

import msgspec

from pgtask._fastpath import TaskLease
from pgtask._log import EventLog
from pgtask._postgres.groups import KINDS, MAX_AT_ONCE
from pgtask._postgres.held import HeldTransaction
from pgtask._postgres.store import Link
from pgtask.errors import DatabaseUnavailable, DataRefused

__all__ = ["Groups"]

log = EventLog("pgtask.groups")

MIN_INTERVAL = 0.02  # seconds between two looks at groups of which few members are left,
MANY = 10_000  # and of which more than that are left:
MAX_INTERVAL = 0.25
SWEEP_INTERVAL = 1.0  # seconds between two sweeps; after a failure too
MAX_PROBE_INTERVAL = 10.0  # seconds between two looks of a sweep at a group whose counts do not change
PURGE_INTERVAL = 0.03  # seconds between two purges, so that other tasks have their turn,
PURGE_PAUSE = 0.5  # and after one that has found nothing, or that another worker is at
_FIRST = UUID(int=0)


class _Sweep(msgspec.Struct):
    """A group as the last sweep has found it. `left` is None before the first look."""

    done: int
    left: int
    interval: float = SWEEP_INTERVAL
    probe_at: float = 0.0  # monotonic seconds


class _Purge(msgspec.Struct):
    """The removal of the members of a group: behind this id, of one kind after the other."""

    after: UUID = _FIRST
    kind: int = 0


class Groups:
    """The looks of one worker, or consumer, over the connection of its claims."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._changed: set[int] = set()
        self._many: set[int] = set()  # groups of which many members were left at the last look
        self._looked_at = self._looked_at_many = 0.0
        self._known: dict[int, _Sweep] = {}
        self._purges: dict[int, _Purge] = {}
        self._sweep_at = self._look_at = self._purge_at = float("inf")
        self.due_at = float("inf")
        """When there is something to do (monotonic seconds); never, while no group is known."""
        self.cancelled: frozenset[int] = frozenset()
        """The groups that are being cancelled."""

    def _plan(self) -> None:
        self.due_at = min(self._sweep_at, self._look_at, self._purge_at)

    def note_changed(self, groups: Collection[int]) -> None:
        """Look at these groups before long: members of them have left, in a transaction that is committed."""
        if not groups:
            return
        self._changed.update(groups)
        if self._many.issuperset(groups):
            look_at = self._looked_at_many + MAX_INTERVAL
        else:
            look_at = self._looked_at + MIN_INTERVAL
        self._look_at = min(self._look_at, look_at)
        self._sweep_at = min(self._sweep_at, time.monotonic() + SWEEP_INTERVAL)
        self._plan()

    def note_open(self, has_open: bool) -> None:
        """Note whether there are groups that have not ended: then sweep at once."""
        self._sweep_at = 0.0 if has_open else float("inf")
        if not has_open:
            self.cancelled, self._known, self._purges = frozenset(), {}, {}
        self._plan()

    async def work(self) -> bool:
        """Look, sweep and purge, as far as it is time. Return whether the members that wait to start in this worker are
        to be released, since their group may have been cancelled. If the database is unavailable, it tries again
        later."""
        now = time.monotonic()
        try:
            if now >= self._look_at:
                await self._look()
            if now >= self._sweep_at:
                return await self._sweep()
            if now >= self._purge_at:
                await self._purge()
        except DatabaseUnavailable:
            self._put_off()
        finally:
            self._plan()
        return False

    def _put_off(self) -> None:
        again = time.monotonic() + SWEEP_INTERVAL
        self._sweep_at, self._look_at = again, again if self._changed else float("inf")
        self._purge_at = again if self._purges else float("inf")

    async def end_all(self) -> bool:
        """Look at all groups that have not ended, for a worker that has nothing left to do. Return whether one has
        ended."""
        if self.due_at == float("inf"):
            return False
        try:
            rows = await self._link.once("groups/open", 0)
            return bool(await self._end([row[0] for row in rows], None)) if rows else False
        except DatabaseUnavailable:
            return False

    # --- the end

    async def _look(self) -> None:
        """Look at the groups that have changed."""
        now = time.monotonic()
        groups = self._changed if now >= self._looked_at_many + MAX_INTERVAL else self._changed - self._many
        self._looked_at = now
        if groups & self._many or groups == self._changed:
            self._looked_at_many = now
        self._changed = self._changed - groups
        self._look_at = self._looked_at_many + MAX_INTERVAL if self._changed else float("inf")
        try:
            await self._end(list(groups), MANY)
        except BaseException:
            self._changed |= groups
            raise

    async def _end(self, groups: list[int], max_left: int | None) -> list[int]:
        """End those of the groups that are over. Return them."""
        rows: list[Any] = []
        try:
            rows = await self._link.once("groups/end", groups, max_left) if groups else []
        except DataRefused as error:  # of one of them
            if len(groups) > 1:
                return [ended for group in groups for ended in await self._end([group], max_left)]
            hint = "the database refuses the step at its end; to end it without: cancel(then=False)"
            log.error("group.stuck", group=groups[0], error=str(error), hint=hint)
        ended = [row[0] for row in rows if row[2]]
        self._many.difference_update(groups)
        self._many.update(row[0] for row in rows if not row[2] and row[1] > MANY)
        for group in ended:
            self._known.pop(group, None)
            self._purges.pop(group, None)
        return ended

    async def _sweep(self) -> bool:
        """List the groups that have not ended, and look at those whose counts have not changed for a while."""
        now = time.monotonic()
        self._sweep_at = now + SWEEP_INTERVAL * random.uniform(0.8, 1.2)
        rows, after = [], 0
        while page := await self._link.once("groups/open", after):
            rows += page
            after = page[-1][0]
            if len(page) < 1000:
                break
        known, self._known, due = self._known, {}, []
        for group, left, done, _ in rows:
            before = known.get(group)
            if left <= 0:
                due.append(group)
            if before is None or (before.done, before.left) != (done, left):
                self._known[group] = _Sweep(done, left)
                continue
            self._known[group] = before
            if left > 0 and now >= before.probe_at:
                due.append(group)
                before.probe_at = now + before.interval
                before.interval = min(2 * before.interval, MAX_PROBE_INTERVAL)
        is_news = self._note_cancelled(frozenset(row[0] for row in rows if row[3]))
        if due:
            await self._end(due, None)
        if not rows:
            self._sweep_at = float("inf")
        return is_news

    # --- cancelled groups

    def _note_cancelled(self, cancelled: frozenset[int]) -> bool:
        is_news = not cancelled <= self.cancelled
        self.cancelled = cancelled
        self._purges = {group: self._purges.get(group, _Purge()) for group in cancelled}
        self._purge_at = min(self._purge_at, time.monotonic()) if cancelled else float("inf")
        return is_news

    async def remove_cancelled(self, leases: list[TaskLease]) -> set[UUID]:
        """Remove those of these leased tasks that are members of cancelled groups. Return their ids."""
        members = [lease for lease in leases if lease.is_member]
        if not members or not self.cancelled:
            return set()
        ids, tokens = [lease.id for lease in members], [lease.token for lease in members]
        rows = await self._link.run("groups/drop", ids, tokens, list(self.cancelled))
        return {row[0] for row in rows}

    async def remove_held(self, leases: list[TaskLease], transaction: HeldTransaction) -> list[TaskLease]:
        """Remove those of these tasks, whose rows a transaction holds, that are members of cancelled groups. Return the
        others. Raises as the transaction does."""
        if not self.cancelled or not (ids := [lease.id for lease in leases if lease.is_member]):
            return leases
        rows = await transaction.fetch("groups/drop_held", ids, transaction.mark, list(self.cancelled))
        gone = {row[0] for row in rows}
        return [lease for lease in leases if lease.id not in gone]

    async def _purge(self) -> None:
        """Remove some members of a cancelled group that wait."""
        if not self._purges:
            self._purge_at = float("inf")
            return
        group, purge = random.choice(list(self._purges.items()))
        rows = await self._link.once("groups/purge", group, MAX_AT_ONCE, purge.after, KINDS[purge.kind])
        self._purge_at = time.monotonic() + (PURGE_INTERVAL if rows and rows[0][1] else PURGE_PAUSE)
        if not rows:
            return
        _, read, last = rows[0]
        if read == MAX_AT_ONCE:
            purge.after = last
            return
        purge.after = _FIRST
        purge.kind = (purge.kind + 1) % len(KINDS)
        if purge.kind:
            self._purge_at = time.monotonic()
        else:
            self._purge_at = time.monotonic() + PURGE_PAUSE
            await self._end([group], None)
