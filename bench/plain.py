"""The hot path as one would write it in plain Python: msgspec for the JSON, a dict of leases, a Task for each step.

It exists to be measured beside `pgtask._fastpath`, so it is written to be fast, and does only what a no-op task needs:
no retries, no timeouts, no parking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import msgspec

from pgtask import App, Context, Done, Task

__all__ = ["Dispatcher", "Lease", "Table"]


class Table:
    """From the names in an envelope to the decoder of the step."""

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


class Lease:
    __slots__ = ("id", "state", "text", "token", "tried")

    def __init__(self, id: UUID, token: UUID, text: str, tried: int) -> None:
        self.id = id
        self.token = token
        self.text = text
        self.tried = tried
        self.state = "ready"


class Dispatcher:
    """Runs each step in a Task of its own, and gathers what is done."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.leases: dict[UUID, Lease] = {}
        self.done: list[Lease] = []

    def claimed(self, rows: list[Any], token: UUID) -> list[Lease]:
        leases = [Lease(row[0], token, row[1], row[2]) for row in rows]
        for lease in leases:
            self.leases[lease.id] = lease
        return leases

    async def run(self, leases: list[Lease]) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[loop.create_task(self._run(lease)) for lease in leases])

    async def _run(self, lease: Lease) -> None:
        step: Any = self._table.decode(lease.text)
        outcome = await step.run(Context(lease.id, lease.tried + 1, None, None))
        if type(outcome) is not Done:
            raise TypeError(outcome)
        lease.state = "ended"
        self.done.append(lease)

    def take(self) -> Iterator[list[Any]]:
        """The columns of what is done, whose leases end."""
        done, self.done = self.done, []
        yield [lease.id for lease in done]
        yield [lease.token for lease in done]
        for lease in done:
            del self.leases[lease.id]
