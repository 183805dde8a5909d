"""The leases of a consumer, from their claim until they are settled, lost or released.

Invariants: a lease is renewed exactly as long as it is in this table; a lease whose statement has been sent does not
become lost because its row is gone; `lost` is true before this process can learn of the loss in another way.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any
from uuid import UUID

from pgtask import _fastpath
from pgtask._consumer.spans import processing
from pgtask._lease_clock import lease_clock
from pgtask._log import EventLog
from pgtask._placement import shown_key
from pgtask._sparing import SparingLog
from pgtask.errors import ConsumeError, RowError
from pgtask.task import Task
from pgtask.workflow import STEP

__all__ = ["ConsumerLeases", "Lease"]

log = EventLog("pgtask.consumer")

_RUN = re.compile(
    r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{\s*' + f'"{STEP}"\\s*:'
)  # as pg_task_workflow() does in the database
_HEAD = 2000  # characters that it reads


class Lease:
    """A task that a `Consumer` has claimed, with the values of its row at the time of the claim.

    - `task_id`, `queue`, `priority`, `key`, `created_at`: as in the row.
    - `raw`: the step as the row has it, JSON text: `{"Task":{"Step":{fields}}}`.
    - `tried`: failed tries so far.
    - `trace`: the trace context of the producer, if there is one and this process traces.
    - `claims`: claims since the last outcome, this one included; more than 1 says that a worker or consumer died with
      this task, or lost its lease.
    """

    __slots__ = (
        *("task_id", "queue", "priority", "key", "created_at", "raw", "tried", "claims", "trace"),
        *("held", "holder", "is_lost", "settled_by", "done_at", "done_on"),
    )

    def __init__(self, holder: ConsumerLeases, held: _fastpath.TaskLease, raw: str, described: Sequence[Any]) -> None:
        self.task_id = UUID(int=held.id.int)
        self.raw = raw
        self.tried = held.tried
        self.claims = held.claims
        self.queue: str = described[1]
        self.priority: int = described[2]
        self.key = shown_key(raw, described[3])
        self.created_at: datetime = described[4]
        self.trace: str | None = described[5] if len(described) > 5 else None
        self.held, self.holder = held, holder  # these and the rest are the engine's
        self.is_lost = False
        self.done_at, self.done_on = inf, None  # the time on the lease clock, and the connection, of `done(conn=)`
        self.settled_by: str | None = None  # the verb, from when its statement is about to be sent

    def __repr__(self) -> str:
        return f"<Lease {self.task_id}{' lost' if self.is_lost else ''}>"

    @property
    def step(self) -> Task:
        """The step, decoded by the client's app; each access decodes it again.

        Raises `DecodeError` or `UnknownStepError` for an invalid row, which harms no other row (`fail` it), and
        `ConsumeError` if the client has no app.
        """
        if self.holder.table is None:
            raise ConsumeError("the client has no app to decode steps with: make it Client(app=app), or use lease.raw")
        return self.holder.table.decode(self.raw)[1]

    def span(self) -> AbstractContextManager[Any]:
        """Make the span of this try the current one inside: `with lease.span(): ...`. Yields it; None if this process
        does not trace, or the producer did not."""
        return processing(self)

    @property
    def lost(self) -> bool:
        """Return whether a worker or another consumer may have the task by now, as far as this process knows; it is up
        to date also while your code blocks the loop.

        Check it before an effect that should not happen twice. Only the answer of `done` is certain.
        """
        return self.is_lost

    @property
    def expires_at(self) -> datetime:
        """The time at which the lease ends unless it is renewed before, by the clock of this machine."""
        left = self.held.renewed + self.holder.lease_timeout - lease_clock()
        return datetime.now(UTC) + timedelta(seconds=left)


def _may_be_done(lease: Lease) -> bool:
    """Return whether a transaction of the caller has deleted the row, and no renewal has found it since."""
    return lease.held.renewed <= lease.done_at < inf


def _is_open(conn: Any) -> bool:
    """Return whether a connection of the caller is in a transaction."""
    try:
        return conn is not None and not conn.is_closed() and bool(conn.is_in_transaction())
    except Exception:  # it is back in its pool
        return False


class ConsumerLeases:
    """The table of a consumer's leases. Call its methods on the consumer's loop, except `lose`. `archives`: whether the
    app keeps any of its tasks when they are done."""

    def __init__(self, table: _fastpath.Table | None, lease_timeout: float, *, archives: bool) -> None:
        self.table = table
        self._archives = archives
        self.lease_timeout = lease_timeout
        self.leases = _fastpath.Leases()
        """The same leases, as renewal knows them."""
        self._by_id: dict[UUID, Lease] = {}
        self._loop = asyncio.get_running_loop()
        self._lost_log = SparingLog(log, logging.WARNING, "lease.lost")

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> list[Lease]:
        return list(self._by_id.values())

    def unused(self) -> list[Lease]:
        """Return the leases but those that a transaction of the caller is about to end."""
        return [lease for lease in self.all() if not (_may_be_done(lease) and _is_open(lease.done_on))]

    def add_claimed(self, rows: list[Any], token: UUID, sent: float) -> list[_fastpath.TaskLease]:
        """Add the rows of a claim, which are renewed from now on."""
        leases, displaced = self.leases.add_claimed(rows, token, sent)
        self.leases.take_suspects()  # the caller sees `claims`, and decides
        self.mark_lost([self._by_id[held.id] for held in displaced])
        return leases

    def hand_out(self, leases: list[_fastpath.TaskLease], rows: list[Any], described: list[Any]) -> list[Lease]:
        """Return leases for the caller, of the claimed rows that still exist."""
        by_id = {row[0]: row for row in described}
        handed = []
        for held, row in zip(leases, rows, strict=True):
            if held.id in by_id:
                self._by_id[held.id] = lease = Lease(self, held, row[1], by_id[held.id])
                handed.append(lease)
            else:  # cancelled by force, or its lease has already expired
                self.leases.remove(held)
        return handed

    def is_archived(self, lease: Lease) -> bool:
        """Return whether the task is kept when it is done: the app decides by its step; a step that it cannot decode is
        not kept."""
        if not self._archives or self.table is None:
            return False  # without decoding the step once more
        try:
            return self.table.decode(lease.raw)[0].archive
        except RowError:
            return False

    def is_parked_when_expired(self, lease: Lease) -> bool:
        """Return whether an expired task is parked: the app decides by the policy of its step."""
        if self.table is None:
            return False
        try:
            return bool(self.table.decode(lease.raw)[0].policy.on_expired == "park")
        except RowError:
            return False

    def is_run(self, lease: Lease) -> bool:
        """Return whether the task is the run of a workflow: its step looks like one, and the app has no task of that
        name."""
        head = lease.raw[:_HEAD]
        if f'"{STEP}"' not in head or not _RUN.match(head):
            return False  # nearly all
        try:
            return self.table is None or hasattr(type(self.table.decode(lease.raw)[1]), "workflow")
        except RowError:
            return True

    def check(self, verb: str, leases: Lease | Iterable[Lease]) -> list[Lease]:
        """Return the leases that `verb` was given. Raises `ConsumeError` for a lease that it cannot apply to."""
        if isinstance(leases, Lease) or not isinstance(leases, Iterable):
            leases = [leases]
        chosen = list(dict.fromkeys(leases))
        for lease in chosen:
            if not isinstance(lease, Lease) or lease.holder is not self:
                raise ConsumeError(f"{verb}() takes leases of this consumer, not {lease!r:.100}")
            if lease.settled_by is not None:
                raise ConsumeError(f"{verb}() of {lease!r}, which {lease.settled_by}() has already settled")
            if verb == "done" and self.is_run(lease):
                raise ConsumeError(
                    f"done() of {lease!r}, the run of a workflow, which only a worker finishes; release() or fail() it"
                )
        return chosen

    def settle(self, verb: str, leases: Lease | Iterable[Lease]) -> list[Lease]:
        """Choose leases that a statement will end: from here on renewal may find their rows gone. Raises as `check`."""
        chosen = self.check(verb, leases)
        for lease in chosen:
            lease.settled_by = verb
        return chosen

    def unsettle(self, leases: Iterable[Lease]) -> None:
        """Hold leases as before, since the database has refused their statement."""
        for lease in leases:
            lease.settled_by = None

    def forget(self, lease: Lease) -> None:
        """Stop renewing a lease, which is no longer ours."""
        self.leases.remove(lease.held)
        if self._by_id.get(lease.held.id) is lease:
            del self._by_id[lease.held.id]

    def mark_done(self, leases: Iterable[Lease], conn: Any) -> None:
        """Note that a transaction of the caller has deleted the rows of leases. If it is rolled back, we still hold
        them, and the next renewal finds the rows."""
        now = lease_clock()
        for lease in leases:
            lease.done_at, lease.done_on = now, conn

    def mark_lost(self, leases: list[Lease]) -> None:
        for lease in leases:
            if _may_be_done(lease):
                self.forget(lease)
                continue
            lease.is_lost = True
            self.forget(lease)
            self._lost_log.log_or_count(task=lease.task_id, queue=lease.queue)

    def log_count(self) -> None:
        """Log how many more leases were lost, without a line of their own."""
        self._lost_log.log_count()

    def lose(self, leases: list[_fastpath.TaskLease]) -> None:
        """Mark leases as lost; the renewing thread calls it, so that code that blocks the loop can see it."""
        lost = []
        for held in leases:
            lease = self._by_id.get(held.id)
            if lease is not None and lease.held is held and lease.settled_by is None:
                lease.is_lost = not _may_be_done(lease)
                lost.append(lease)
        if lost and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.mark_lost, lost)
