"""What the database knows of a fleet: its queues, its leases, its workers, and the traffic of the table.

Invariant: a database that does not answer is a part of the answer, never an exception; no question takes longer than
`PATIENCE`.
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import msgspec

from pgtask._observe.database import PATIENCE, QueueDepth
from pgtask._postgres.store import Link
from pgtask._postgres.task_status import step_label
from pgtask.errors import DatabaseError

__all__ = ["MAX_LEASES", "DatabaseSample", "FleetDatabase", "LeasedTask", "Session", "Traffic"]

MAX_LEASES = 5000
MAX_TASKS = 20


class LeasedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task that a worker has leased, for so many seconds: since its claim, or its last outcome. `worker` is the first
    half of its token."""

    id: UUID
    queue: str
    step: str
    worker: str
    seconds: float


class Session(msgspec.Struct, frozen=True):
    """The connection of a worker: its pid on its host, its part of tokens, and its address if the server shows one."""

    pid: int
    worker: str
    address: str | None


class Traffic(msgspec.Struct, frozen=True):
    """The rows of the table that were ever inserted and deleted, at a time in seconds."""

    inserted: int = 0
    deleted: int = 0
    seen_at: float = 0.0


class DatabaseSample(msgspec.Struct, frozen=True, kw_only=True):
    """What the database has answered; with an `error` it has not. `sessions` is None behind a pooler, which hides them,
    and on a standby. `leases`: the leased tasks of each worker, by its part of tokens."""

    error: str | None = None
    depth: tuple[QueueDepth, ...] = ()
    leases: dict[str, int] = {}
    longest: tuple[LeasedTask, ...] = ()
    sessions: tuple[Session, ...] | None = None
    traffic: Traffic = Traffic()


class FleetDatabase:
    """The database of a fleet, over a connection of its own, which is opened again after a loss."""

    def __init__(self, dsn: str, *, pooled: bool) -> None:
        settings = {"statement_timeout": f"{1000 * PATIENCE:.0f}ms", "default_transaction_read_only": "on"}
        self._pooled = pooled
        self._link = Link(dsn, "pgtask top", pooled=pooled, settings=settings, reads=True)

    async def sample(self) -> DatabaseSample:
        """Return what the database knows now."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._read()
        except TimeoutError:
            return DatabaseSample(error=f"no answer within {PATIENCE:g} s")
        except DatabaseError as error:
            return DatabaseSample(error=str(error))

    async def close(self) -> None:
        await self._link.close()

    async def _read(self) -> DatabaseSample:
        depth = [QueueDepth(*row) for row in await self._link.once("depth")]
        held = await self._link.once("top/leases", MAX_LEASES, MAX_TASKS)
        traffic = [Traffic(*row) for row in await self._link.once("top/traffic")]
        has_sessions = bool(traffic) and not self._pooled
        sessions = [Session(*row) for row in await self._link.once("top/workers")] if has_sessions else None
        return DatabaseSample(
            depth=tuple(depth),
            leases={row["worker"]: row["tasks"] for row in held if row["id"] is None},
            longest=tuple(_leased_task(row) for row in held if row["id"] is not None),
            sessions=None if sessions is None else tuple(sessions),
            traffic=traffic[0] if traffic else Traffic(),
        )


def _leased_task(row: Any) -> LeasedTask:
    return LeasedTask(
        id=row["id"], queue=row["queue"], step=step_label(row["step"]), worker=row["worker"], seconds=row["seconds"]
    )
