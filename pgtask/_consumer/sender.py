"""What a consumer sends: claims, and what became of the leases. The statements are the worker's.

Invariants: one statement at a time; what was begun is carried through, whatever becomes of its caller, so that its
result is known; a write is fenced by the token of each lease, and says which did not match.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

from pgtask import _fastpath
from pgtask._consumer.held import Held, Lease
from pgtask._events import log_event
from pgtask._fastpath import Outcomes
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask.errors import DatabaseError

__all__ = ["Sender"]

log = logging.getLogger("pgtask.consumer")

P = ParamSpec("P")
T = TypeVar("T")
CHUNK = 5000  # tasks in one statement


class _Lot(NamedTuple):
    """Leases, and the statement that lets go of them. Of its columns one is a list if some were lost: of those that
    were not."""

    leases: list[Lease]
    statement: str
    parameters: tuple[Any, ...]


class Sender:
    """Sends for one consumer, over `link`."""

    def __init__(self, link: Link, claim: Claim, held: Held) -> None:
        self._link = link
        self._claim = claim
        self._held = held
        self._sending = asyncio.Lock()
        self.running: set[asyncio.Task[Any]] = set()
        """What is being carried through."""

    def begin(self, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **options: P.kwargs) -> asyncio.Task[T]:
        """Carry it through, after what was begun before."""

        async def in_turn() -> T:
            async with self._sending:
                return await work(*args, **options)

        task = asyncio.create_task(in_turn())
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    # --- claim

    async def take(self, limit: int, *, look: bool) -> list[Lease]:
        """Claim lane by lane until there are enough or nothing more is known to be due; with `look`, not before the
        table was looked at in vain."""
        taken = await self._drain(limit)
        if look and not taken:
            self._claim.look_at = 0.0
            taken = await self._drain(limit)
        return taken

    async def _drain(self, limit: int) -> list[Lease]:
        taken: list[Lease] = []
        try:
            while len(taken) < limit and self._claim.wanted:
                rows, token, sent = await self._claim.claim(min(limit - len(taken), CHUNK))
                if rows:
                    taken += await self._enter(rows, token, sent)
        except BaseException:
            for lease in taken:  # nobody will hear of it: the lease runs out
                self._held.forget(lease)
            raise
        return taken

    async def _enter(self, rows: list[Any], token: UUID, sent: float) -> list[Lease]:
        leases = self._held.enter(rows, token, sent)
        try:
            described = await self._link.run("claimed", [held.id for held in leases], token)
        except BaseException:
            self._held.leases.remove_all(leases)
            raise
        return self._held.hand_out(leases, rows, described)

    # --- what became of them

    async def finish(self, leases: list[Lease]) -> list[Lease]:
        """Write that they are done; those that were lost."""
        kept = {lease for lease in leases if self._held.is_archived(lease)}
        lots = _lots([lease for lease in leases if lease in kept], lambda outcomes, held: outcomes.add_archived(held))
        lots += _lots([lease for lease in leases if lease not in kept], lambda outcomes, held: outcomes.add_done(held))
        return await self._send(lots)

    async def move(self, leases: list[Lease], error: str | None, delay: float) -> list[Lease]:
        """Write that a try has failed: parked with an error, or due again after some seconds; those that were lost."""
        lots = _lots(leases, lambda outcomes, held: outcomes.add_moved(held, None, held.tried + 1, error, delay))
        return await self._send(lots)

    async def release(self, leases: list[Lease]) -> list[Lease]:
        """Give them back untouched; those that were lost."""
        return await self._send([_Lot(chunk, "release", _ids_and_tokens(chunk)) for chunk in _chunks(leases)])

    async def give_back(self, leases: list[Lease]) -> None:
        """As `release`, of what nobody has in his hands any more. What the database refuses is let run out."""
        try:
            await self.release(leases)
        except DatabaseError as error:
            left = [lease for lease in leases if lease.settled_by is None]
            for lease in left:
                self._held.forget(lease)
            log_event(log, logging.WARNING, "leases.abandoned", leases=len(left), error=str(error))

    async def _send(self, lots: list[_Lot]) -> list[Lease]:
        """Let go of leases; those that were lost."""
        lost: list[Lease] = []
        waiting = list(lots)
        try:
            while waiting:
                lost += await self._send_lot(waiting[0])
                del waiting[0]
        finally:
            for lot in waiting:
                self._held.unsettle(lot.leases)
        return lost

    async def _send_lot(self, lot: _Lot) -> list[Lease]:
        attempts = 0

        def again() -> None:
            nonlocal attempts
            attempts += 1

        (row,) = await self._link.run(lot.statement, *lot.parameters, on_loss=again)
        written = next((set(column) for column in row if isinstance(column, list)), None)  # None: all
        for lease in lot.leases:
            lease.is_lost = False
            self._held.forget(lease)
        if written is None or attempts:  # sent twice, what is not found was probably written by the first attempt
            return []
        lost = [lease for lease in lot.leases if lease.held.id not in written]
        self._held.mark_lost(lost)
        return lost

    async def renew(self, leases: list[Lease], seconds: float) -> list[Lease]:
        """Prolong leases by so many seconds from now; those that were lost."""
        lost = []
        for chunk in _chunks(leases):
            sent = time.monotonic()
            rows = await self._link.run("renew", *_ids_and_tokens(chunk), seconds)
            ours = {row[0]: row[1] for row in rows}
            lost += [lease for lease in chunk if lease.held.id not in ours]
            renewed = [lease.held for lease in chunk if ours.get(lease.held.id)]
            # As if renewed so late that the usual time is what is left of it: it is not cut short in the background.
            self._held.leases.renewed(renewed, sent + seconds - self._held.lease_timeout)
        self._held.mark_lost(lost)
        return lost


def _chunks(leases: list[Lease]) -> list[list[Lease]]:
    return [leases[at : at + CHUNK] for at in range(0, len(leases), CHUNK)]


def _lots(leases: list[Lease], add: Callable[[Outcomes, _fastpath.Lease], None]) -> list[_Lot]:
    """Lots of one kind of outcome, which `add` puts into the buffer."""
    lots = []
    for chunk in _chunks(leases):
        outcomes = Outcomes()
        for lease in chunk:
            add(outcomes, lease.held)
        lots.append(_Lot(chunk, outcomes.statement, outcomes.parameters()))
    return lots


def _ids_and_tokens(leases: Iterable[Lease]) -> tuple[list[UUID], list[UUID]]:
    return [lease.held.id for lease in leases], [lease.held.token for lease in leases]
