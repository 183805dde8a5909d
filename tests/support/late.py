"""A statement that has its snapshot and goes on later: it cannot see what happens in between, but its locks meet it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sessions import until_waiting

from pgtask._postgres.store import statement

GATE = 4711  # an advisory lock
HELD_BACK = f"(SELECT CASE WHEN pg_advisory_xact_lock_shared({GATE})::text IS NOT NULL THEN $1::uuid[] END)"


def held_back(name: str) -> str:
    """Return the text of a statement that waits, after its snapshot, before it looks at its first parameter."""
    text = statement(name)
    assert "unnest($1::uuid[]" in text or "unnest(\n        $1::uuid[]" in text, name
    return text.replace("$1::uuid[]", HELD_BACK, 1)


@asynccontextmanager
async def begun(db: Any, late: Any, name: str, *args: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """Yield the task of the statement `name`, sent by `late`, which goes on at the end of the block."""
    await db.execute("SELECT pg_advisory_lock($1)", GATE)
    under_way = asyncio.create_task(late.fetch(held_back(name), *args))
    try:
        await until_waiting(db)
        yield under_way
    finally:
        await db.execute("SELECT pg_advisory_unlock($1)", GATE)
