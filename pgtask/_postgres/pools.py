"""The two pools: the one that steps use for their own queries, and that of a client.

Invariants: neither opens a connection before it is needed, save the client's first; all have keepalives.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from pgtask._postgres.connection import CONNECT_TIMEOUT, keep_alive, map_errors
from pgtask._postgres.migrate import check_schema
from pgtask.errors import DatabaseUnavailable

__all__ = ["client_pool", "user_pool"]


@asynccontextmanager
async def user_pool(dsn: str, *, size: int, pooled: bool = False) -> AsyncIterator[Any]:
    """The asyncpg pool that steps reach as `ctx.db`: no connection until one is used, `size` at most.

    A step that needs a connection while the database is away waits for it, as the engine does.
    Closing it waits a second for steps that were abandoned with a connection in their hands, then cuts them off.
    """
    pool = await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size,
        statement_cache_size=0 if pooled else 100,
        server_settings=None if pooled else {"application_name": "pgtask step"},
        connect=_connect_when_there,
    )
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(1.0):
                await pool.close()
        except TimeoutError:
            pool.terminate()


async def _connect_when_there(*args: Any, **options: Any) -> Any:
    """`asyncpg.connect`, again and again for as long as the server is away or full."""
    delay = 0.1
    while True:
        try:
            with map_errors():
                return await _connect(*args, **options)
        except DatabaseUnavailable:
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)


async def _connect(*args: Any, **options: Any) -> Any:
    connection = await asyncpg.connect(*args, **options)
    keep_alive(connection)
    return connection


async def client_pool(dsn: str, *, size: int, pooled: bool = False) -> Any:
    """The pool of a `Client`; connects once, so that a wrong DSN, and a schema that is not ours, are found now.

    The caller closes it. Raises `SchemaError` and other `DatabaseError`s.
    """
    with map_errors(dsn):
        pool = await asyncpg.create_pool(
            dsn,
            min_size=1,
            max_size=size,
            timeout=CONNECT_TIMEOUT,
            connect=_connect,
            statement_cache_size=0 if pooled else 100,
            server_settings=None if pooled else {"application_name": "pgtask client"},
        )
    try:
        async with pool.acquire() as connection:
            await check_schema(connection)
    except BaseException:
        pool.terminate()
        raise
    return pool
