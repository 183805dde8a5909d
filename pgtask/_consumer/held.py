"""The leases of a consumer, from their claim until they were settled, lost, or given back.

Invariants: a lease is renewed exactly as long as it is in this table; one whose statement has been sent is not called
lost because its row is gone; `lost` is true before anybody here could learn it in another way.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pgtask import _fastpath
from pgtask._events import log_event
from pgtask.errors import ConsumeError, RowError
from pgtask.task import Task
from pgtask.workflow import STEP

__all__ = ["Held", "Lease"]

log = logging.getLogger("pgtask.consumer")

_RUN = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{\s*' + f'"{STEP}"\\s*:')  # as pg_task_workflow() in the database
_HEAD = 2000  # characters in which that looks


class Lease:
    """A task in the hands of a `Consumer`: what its row said when it was claimed.

    - `task_id`, `queue`, `priority`, `key`, `created_at`: as in the row.
    - `raw`: the step as the row has it, JSON text: `{"Task":{"Step":{fields}}}`.
    - `tried`: failed tries so far.
    - `claims`: claims since the last outcome, this one included; more than 1 says that whoever had it before died, or
      lost it.
    """

    __slots__ = (
        *("task_id", "queue", "priority", "key", "created_at", "raw", "tried", "claims"),
        *("held", "holder", "is_lost", "settled_by"),
    )

    def __init__(self, holder: Held, held: _fastpath.Lease, raw: str, described: Sequence[Any]) -> None:
        self.task_id = UUID(int=held.id.int)
        self.raw = raw
        self.tried = held.tried
        self.claims = held.claims
        self.queue: str = described[1]
        self.priority: int = described[2]
        self.key: str | None = described[3]
        self.created_at: datetime = described[4]
        self.held, self.holder = held, holder  # these and the rest are the engine's
        self.is_lost = False
        self.settled_by: str | None = None  # the verb, from when its statement is about to be sent

    def __repr__(self) -> str:
        return f"<Lease {self.task_id}{' lost' if self.is_lost else ''}>"

    @property
    def step(self) -> Task:
        """The step, decoded by the client's app, anew each time.

        Raises `DecodeError` or `UnknownStepError` for a row that is wrong, which harms no other (`fail` it), and
        `ConsumeError` if the client has no app.
        """
        if self.holder.table is None:
            raise ConsumeError("the client has no app to decode steps with: make it Client(app=app), or use lease.raw")
        return self.holder.table.decode(self.raw)[1]

    @property
    def lost(self) -> bool:
        """Whether somebody else may have the task by now, as far as we know; also while your code blocks the loop.

        Worth a look before an effect that should not happen twice. What `done` returns is certain.
        """
        return self.is_lost

    @property
    def expires_at(self) -> datetime:
        """When the lease ends unless it is renewed before, by the clock of this machine."""
        left = self.held.renewed + self.holder.lease_timeout - time.monotonic()
        return datetime.now(UTC) + timedelta(seconds=left)


class Held:
    """The table of a consumer's leases. All of it is called on the consumer's loop, but for `lose`. `archives`: whether
    the app keeps any of its tasks when they are done."""

    def __init__(self, table: _fastpath.Table | None, lease_timeout: float, *, archives: bool) -> None:
        self.table = table
        self._archives = archives
        self.lease_timeout = lease_timeout
        self.leases = _fastpath.Leases()
        """The same leases, as renewal knows them."""
        self._by_id: dict[UUID, Lease] = {}
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> list[Lease]:
        return list(self._by_id.values())

    def enter(self, rows: list[Any], token: UUID, sent: float) -> list[_fastpath.Lease]:
        """Rows that a claim has brought are renewed from now on."""
        leases, displaced = self.leases.claimed(rows, token, sent)
        self.leases.take_suspects()  # whoever consumes sees `claims`, and decides
        self.mark_lost([self._by_id[held.id] for held in displaced])
        return leases

    def hand_out(self, leases: list[_fastpath.Lease], rows: list[Any], described: list[Any]) -> list[Lease]:
        """Leases for the caller, of the claimed rows that are still there."""
        by_id = {row[0]: row for row in described}
        handed = []
        for held, row in zip(leases, rows, strict=True):
            if held.id in by_id:
                self._by_id[held.id] = lease = Lease(self, held, row[1], by_id[held.id])
                handed.append(lease)
            else:  # cancelled by force, or its lease has run out already
                self.leases.remove(held)
        return handed

    def is_archived(self, lease: Lease) -> bool:
        """Whether it is kept when it is done: what the app says of its step; what it cannot decode is not."""
        if not self._archives or self.table is None:
            return False  # without decoding the step once more
        try:
            return self.table.decode(lease.raw)[0].archive
        except RowError:
            return False

    def is_run(self, lease: Lease) -> bool:
        """Whether it is the run of a workflow: what looks like one, unless the app knows it as a task of that name."""
        head = lease.raw[:_HEAD]
        if f'"{STEP}"' not in head or not _RUN.match(head):
            return False  # nearly all
        try:
            return self.table is None or hasattr(type(self.table.decode(lease.raw)[1]), "workflow")
        except RowError:
            return True

    def choose(self, verb: str, leases: Lease | Iterable[Lease]) -> list[Lease]:
        """The leases that `verb` was given. Raises `ConsumeError` for one that it cannot be done to."""
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
        """As `choose`, of leases that are to be let go: from here on renewal may find their rows gone."""
        chosen = self.choose(verb, leases)
        for lease in chosen:
            lease.settled_by = verb
        return chosen

    def unsettle(self, leases: Iterable[Lease]) -> None:
        """Their statement was refused: they are held as before."""
        for lease in leases:
            lease.settled_by = None

    def forget(self, lease: Lease) -> None:
        """It is no longer ours to renew."""
        self.leases.remove(lease.held)
        if self._by_id.get(lease.held.id) is lease:
            del self._by_id[lease.held.id]

    def mark_lost(self, leases: list[Lease]) -> None:
        for lease in leases:
            lease.is_lost = True
            self.forget(lease)
            log_event(log, logging.WARNING, "lease.lost", task=lease.task_id, queue=lease.queue)

    def lose(self, leases: list[_fastpath.Lease]) -> None:
        """Called in the renewing thread. Marked there, so that code which blocks the loop can see it."""
        lost = []
        for held in leases:
            lease = self._by_id.get(held.id)
            if lease is not None and lease.held is held and lease.settled_by is None:
                lease.is_lost = True
                lost.append(lease)
        if lost and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.mark_lost, lost)
