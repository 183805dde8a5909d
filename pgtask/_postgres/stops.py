"""The orders to stop the workers of a schema, for the workers that read them."""

from __future__ import annotations

from typing import Any

import asyncpg

from pgtask._log import EventLog
from pgtask._postgres.store import statement

__all__ = ["read_last_stop"]

log = EventLog("pgtask.wake")


async def read_last_stop(connection: Any, before: int | None) -> int:
    """Return the number of the last order, 0 if there is none; `before` where the role may no longer read it."""
    try:
        last: int = await connection.fetchval(statement("last_stop"))
        return last
    except asyncpg.UndefinedTableError:
        return 0  # as for an empty table: the check at the start reports what the schema lacks
    except asyncpg.InsufficientPrivilegeError as error:
        if before is None:
            raise
        remedy = "grant the role of the workers SELECT on pg_task_stops"
        log.warning("stop.unreadable", error=str(error), remedy=remedy)
        return before
