"""A statement that has its snapshot and goes on later: it cannot see what happens in between, but its locks meet it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sessions import until_waiting

from pgtask._postgres.store import statement

GATE = 4711  # an advisory lock


def held_back(name: str, number: int = 1) -> str:
    """Return the text of a statement that waits, after its snapshot, before it looks at this parameter."""
    ids = f"${number}::uuid[]"
    before, unnest, after = re.split(rf"(unnest\(\s*){re.escape(ids)}", statement(name), maxsplit=1)
    waits = f"pg_advisory_xact_lock_shared({GATE})::text IS NOT NULL"
    return f"{before}{unnest}(SELECT CASE WHEN {waits} THEN {ids} END){after}"


@asynccontextmanager
async def begun(db: Any, late: Any, name: str, *args: Any, number: int = 1) -> AsyncIterator[asyncio.Task[Any]]:
    """Yield the task of the statement `name`, sent by `late`, which goes on at the end of the block. It waits before it
    looks at the parameter of this number."""
    await db.execute("SELECT pg_advisory_lock($1)", GATE)
    under_way = asyncio.create_task(late.fetch(held_back(name, number), *args))
    try:
        await until_waiting(db)
        yield under_way
    finally:
        await db.execute("SELECT pg_advisory_unlock($1)", GATE)
