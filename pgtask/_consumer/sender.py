"""What a consumer sends: claims, and what became of the leases. The statements are the worker's.

Invariants: one statement at a time; what was begun is carried through, whatever becomes of its caller, so that its
result is known; a write is fenced by the token of each lease, and says which did not match.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from pgtask._consumer.held import Held, Lease
from pgtask._fastpath import Outcomes
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim

__all__ = ["Sender"]

P = ParamSpec("P")
T = TypeVar("T")
Add = Callable[[Outcomes, Lease], None]
Send = Callable[[list[Lease], Callable[[], None]], Coroutine[Any, Any, list[UUID] | None]]

CHUNK = 5000  # tasks in one statement


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

    async def write(self, leases: list[Lease], add: Add) -> list[Lease]:
        """Write the outcome that `add` puts into the buffer for each lease; those that were lost."""

        async def send(chunk: list[Lease], uncertain: Callable[[], None]) -> list[UUID] | None:
            outcomes = Outcomes()
            for lease in chunk:
                add(outcomes, lease)
            ((done, _, moved, _),) = await self._link.run("flush", *outcomes.parameters(), on_loss=uncertain)
            written: list[UUID] | None = done if outcomes.done else moved
            return written

        return await self._in_chunks(leases, send)

    async def release(self, leases: list[Lease]) -> list[Lease]:
        """Give them back untouched; those that were lost."""

        async def send(chunk: list[Lease], uncertain: Callable[[], None]) -> list[UUID] | None:
            ((count, _, ids),) = await self._link.run("release", *_ids_and_tokens(chunk), on_loss=uncertain)
            return None if count == len(chunk) else ids or []

        return await self._in_chunks(leases, send)

    async def _in_chunks(self, leases: list[Lease], send: Send) -> list[Lease]:
        """Let go of leases; `send` returns the ids that were written, None if all were. Those that were lost."""
        lost: list[Lease] = []
        waiting = leases
        try:
            while waiting:
                chunk = waiting[:CHUNK]
                lost += await self._send_chunk(chunk, send)
                waiting = waiting[CHUNK:]
        finally:
            self._held.unsettle(waiting)
        return lost

    async def _send_chunk(self, chunk: list[Lease], send: Send) -> list[Lease]:
        attempts = 0

        def again() -> None:
            nonlocal attempts
            attempts += 1

        written = await send(chunk, again)
        # Sent twice, what is not found was probably written by the first attempt.
        found = None if written is None or attempts else set(written)
        for lease in chunk:
            lease.is_lost = False
            self._held.forget(lease)
        lost = [] if found is None else [lease for lease in chunk if lease.held.id not in found]
        self._held.mark_lost(lost)
        return lost

    async def renew(self, leases: list[Lease], seconds: float) -> list[Lease]:
        """Prolong leases by so many seconds from now; those that were lost."""
        lost = []
        for chunk in (leases[at : at + CHUNK] for at in range(0, len(leases), CHUNK)):
            sent = time.monotonic()
            rows = await self._link.run("renew", *_ids_and_tokens(chunk), seconds)
            ours = {row[0]: row[1] for row in rows}
            lost += [lease for lease in chunk if lease.held.id not in ours]
            renewed = [lease.held for lease in chunk if ours.get(lease.held.id)]
            # As if renewed so late that the usual time is what is left of it: it is not cut short in the background.
            self._held.leases.renewed(renewed, sent + seconds - self._held.lease_timeout)
        self._held.mark_lost(lost)
        return lost


def _ids_and_tokens(leases: Iterable[Lease]) -> tuple[list[UUID], list[UUID]]:
    return [lease.held.id for lease in leases], [lease.held.token for lease in leases]
