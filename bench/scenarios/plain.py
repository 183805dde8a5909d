"""The hot path in plain Python: msgspec for the JSON, a dict of leases, an asyncio Task for each step.

The scenario `stages` measures it beside `pgtask._fastpath`. So it is written to be fast, and does only what a no-op
task needs: no retries, no timeouts, no parking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import msgspec

from pgtask import App, Context, Done, Task

__all__ = ["PlainDispatcher", "PlainTable"]


class PlainTable:
    """Decoders of all steps, by the names in an envelope."""

    def __init__(self, app: App) -> None:
        self._outer = msgspec.json.Decoder(dict[str, dict[str, msgspec.Raw]])
        self._decoders = {
            (definition.task, definition.name): msgspec.json.Decoder(definition.cls) for definition in app
        }

    def decode(self, text: str) -> Task:
        ((task, rest),) = self._outer.decode(text).items()
        ((step, payload),) = rest.items()
        found: Task = self._decoders[task, step].decode(payload)
        return found


class PlainLease:
    """A claimed row."""

    __slots__ = ("id", "state", "text", "token", "tried")

    def __init__(self, id: UUID, token: UUID, text: str, tried: int) -> None:
        self.id = id
        self.token = token
        self.text = text
        self.tried = tried
        self.state = "ready"


class PlainDispatcher:
    """Runner of each step in an asyncio Task of its own, and collector of the finished leases."""

    def __init__(self, table: PlainTable) -> None:
        self._table = table
        self.leases: dict[UUID, PlainLease] = {}
        self.done: list[PlainLease] = []

    def claimed(self, rows: list[Any], token: UUID) -> list[PlainLease]:
        leases = [PlainLease(row[0], token, row[1], row[2]) for row in rows]
        for lease in leases:
            self.leases[lease.id] = lease
        return leases

    async def run(self, leases: list[PlainLease]) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[loop.create_task(self._run(lease)) for lease in leases])

    async def _run(self, lease: PlainLease) -> None:
        step: Any = self._table.decode(lease.text)
        outcome = await step.run(Context(lease.id, lease.tried + 1, None, None))
        if type(outcome) is not Done:
            raise TypeError(outcome)
        lease.state = "ended"
        self.done.append(lease)

    def take(self) -> Iterator[list[Any]]:
        """Yield the columns of the finished leases, and remove these leases."""
        done, self.done = self.done, []
        yield [lease.id for lease in done]
        yield [lease.token for lease in done]
        for lease in done:
            del self.leases[lease.id]
