"""A client and a connection for a scenario, and the rows that it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any
from uuid import UUID

import msgspec
from fix_database import run
from post import Numbered
from sessions import opened

from pgtask import Client

Scenario = Callable[[Client, Any], Awaitable[None]]


def play(dsn: str, scenario: Scenario, **options: Any) -> None:
    async def main() -> None:
        async with opened(dsn, **options) as (client, db):
            await scenario(client, db)

    run(main())


async def count(db: Any) -> int:
    return int(await db.fetchval("SELECT count(*) FROM pg_task"))


def numbered(n: int) -> Iterator[Numbered]:
    return (Numbered(i) for i in range(n))


async def slowly(steps: Iterator[Numbered]) -> AsyncIterator[Numbered]:
    for step in steps:
        if step.n % 100 == 0:
            await asyncio.sleep(0)
        yield step


def numbers_in(rows: list[Any]) -> list[int]:
    return [msgspec.json.decode(row["step"])["Post"]["Numbered"]["n"] for row in rows]


async def in_order(db: Any, ids: Sequence[UUID]) -> list[Any]:
    """The rows of these ids, in their order."""
    rows: list[Any] = await db.fetch(
        "SELECT pg_task.* FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (id, place) JOIN pg_task USING (id)"
        " ORDER BY place",
        ids,
    )
    return rows
