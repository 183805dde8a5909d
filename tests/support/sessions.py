"""Sessions beside that of a client or a worker, to look and to meddle with, and what they wait for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from pgtask import Client
from pgtask._postgres.connection import connect
from pgtask._postgres.store import Link


@asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncIterator[Any]:
    """Yield a connection of asyncpg."""
    db = await asyncpg.connect(dsn, **options)
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def our_session(dsn: str, **settings: str) -> AsyncIterator[Any]:
    """Yield a connection with the settings that all our sessions have, and these."""
    db = await connect(dsn, name="test", settings=settings)
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def opened(dsn: str, **options: Any) -> AsyncIterator[tuple[Client, Any]]:
    """Yield a client, and a connection."""
    async with Client(dsn, **options) as client, connected(dsn) as db:
        yield client, db


@asynccontextmanager
async def linked(dsn: str, **options: Any) -> AsyncIterator[tuple[Link, Any]]:
    """Yield a link, and a connection."""
    link = Link(dsn, "test link", **options)
    async with connected(dsn) as db:
        try:
            yield link, db
        finally:
            await link.close()


async def until(db: Any, condition: str, *args: Any) -> None:
    """Wait until a query gives true. Bounded by `run`."""
    while not await db.fetchval(condition, *args):  # noqa: ASYNC110  what changes it is another process
        await asyncio.sleep(0)


async def until_blocked(db: Any, pid: int) -> None:
    """Wait until another session blocks the session `pid`."""
    await until(db, "SELECT cardinality(pg_blocking_pids($1)) > 0", pid)


async def until_waiting(db: Any, number: int = 1) -> None:
    """Wait until this many sessions wait for a lock."""
    waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(20):
        while len(await db.fetch(waiting)) < number:
            await db.execute("SELECT pg_stat_clear_snapshot()")
            await asyncio.sleep(0)
