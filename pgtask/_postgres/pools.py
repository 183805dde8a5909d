"""The two pools: one for the queries of steps, and one for a client.

Invariant: neither opens a connection before it is needed, except the client's first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from pgtask._backoff import Backoff
from pgtask._postgres.connection import PLAN_SETTINGS, SESSION_SETTINGS, map_errors, valid_dsn
from pgtask._postgres.dial import dial
from pgtask._postgres.migrate import check_schema
from pgtask._postgres.step_pool import StepPool
from pgtask._postgres.times import allow_far_times
from pgtask.errors import DatabaseUnavailable

__all__ = ["client_pool", "release_quietly", "user_pool"]

_CLIENT_SETTINGS = {"application_name": "pgtask client", **SESSION_SETTINGS, **PLAN_SETTINGS}

INITIAL_PAUSE, MAX_PAUSE = 0.1, 5.0  # seconds between two tries to connect for a step


@asynccontextmanager
async def user_pool(dsn: str, *, size: int, pooled: bool = False) -> AsyncIterator[Any]:
    """The asyncpg pool that steps use as `ctx.db`: no connection until a step needs one, `size` at most.

    A step that needs a connection while the database is unavailable waits for it, as the engine does. Closing the pool
    waits a second for abandoned steps that still hold a connection, then cuts them off.
    """
    pool = StepPool(
        valid_dsn(dsn),
        size=size,
        statement_cache_size=0 if pooled else 100,
        server_settings=None if pooled else {"application_name": "pgtask step"},
        connect=_connect_with_retries,
    )
    await pool
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(1.0):
                await pool.close()
        except TimeoutError:
            pool.terminate()


async def _connect_with_retries(*args: Any, **options: Any) -> Any:
    """Dial as `dial` does, again and again for as long as the server is unavailable or full."""
    backoff = Backoff(INITIAL_PAUSE, MAX_PAUSE)
    while True:
        try:
            with map_errors():
                return await dial(*args, **options)
        except DatabaseUnavailable:
            await asyncio.sleep(backoff.next())


async def client_pool(dsn: str, *, size: int, pooled: bool = False) -> Any:
    """Make the pool of a `Client`. It connects once, to find a wrong DSN or a schema that is not ours now.

    The caller closes it. Raises `SchemaError` and other `DatabaseError`s.
    """
    with map_errors(dsn):
        pool = await asyncpg.create_pool(
            valid_dsn(dsn),
            min_size=1,
            max_size=size,
            connect=dial,
            init=allow_far_times,
            reset=_keep_session,
            statement_cache_size=0 if pooled else 100,
            server_settings=None if pooled else _CLIENT_SETTINGS,
        )
    try:
        async with pool.acquire() as connection:
            await check_schema(connection)
    except BaseException:
        pool.terminate()
        raise
    return pool


async def _keep_session(_connection: Any) -> None:
    """Reset nothing: our statements leave nothing in a session, and asyncpg itself ends a transaction that is open. Its
    default sends a statement after each of ours."""


async def release_quietly(pool: Any, connection: Any) -> None:
    """Release a connection to its pool. The caller has its answer, so a loss at this point is not its concern."""
    with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
        await pool.release(connection)
