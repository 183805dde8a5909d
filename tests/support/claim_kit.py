"""A claim over a link, and tasks for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

from fix_database import run
from sessions import linked

from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim

WORKER = bytes(range(8))
MIN_POLL, MAX_POLL = 0.25, 15.0
SOON = 0.1  # seconds; less than any wait but that between two polls in a row
NEVER = 1e6
ALL_LEASES = float("-inf"), 0.0, float("-inf"), float("-inf")  # the bounds of expire.sql, for all leases


def claim_over(
    link: Link,
    *queues: str,
    lease_timeout: float = 60.0,
    max_step_bytes: int = 1000,
    poll: float = MIN_POLL,
    families: tuple[str, ...] | None = None,
) -> Claim:
    return Claim(
        link,
        worker=WORKER,
        queues=queues,
        lease_timeout=lease_timeout,
        max_step_bytes=max_step_bytes,
        min_poll=poll,
        max_poll=max(poll, MAX_POLL),
        families=families,
    )


def play(dsn: str, scenario: Callable[[Link, Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await scenario(link, db)

    run(main())


async def put(db: Any, n: int = 1, *, due: float = -1000.0, queue: str = "default", priority: int = 0) -> list[UUID]:
    """Tasks due in so many seconds, a millisecond apart; their ids, the oldest first."""
    rows = await db.fetch(
        "INSERT INTO pg_task (step, wakeup_at, queue, priority)"
        " SELECT '{}', now() + make_interval(secs => $2 + n / 1e3), $3, $4"
        " FROM generate_series(1, $1) AS n RETURNING id",
        n, due, queue, priority,
    )  # fmt: skip
    return [UUID(int=row["id"].int) for row in rows]


async def lease(db: Any, ids: list[UUID], ends: float) -> None:
    """Lease these tasks to another worker, for so many seconds more."""
    query = "UPDATE pg_task SET locked_by = $2, lock_expires_at = now() + make_interval(secs => $3), claims = 1"
    await db.execute(f"{query} WHERE id = ANY ($1)", ids, uuid4(), ends)


def ids_of(rows: list[Any]) -> list[UUID]:
    return [row[0] for row in rows]


async def drain(claim: Claim, limit: int = 100) -> list[UUID]:
    """Claim until nothing is due."""
    ids: list[UUID] = []
    while claim.may_find_tasks or seconds_to(claim.next_poll) < SOON:
        await asyncio.sleep(max(0.0, 0.0 if claim.may_find_tasks else seconds_to(claim.next_poll)))
        ids += ids_of((await claim.claim_batch(limit))[0])
    return ids


def wait_of(claim: Claim) -> float:
    """Return the seconds from its last poll to the next one."""
    return claim.next_poll - claim._polled


def seconds_to(monotonic: float | None) -> float:
    assert monotonic is not None
    return monotonic - time.monotonic()
