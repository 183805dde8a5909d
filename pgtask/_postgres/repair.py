"""The repair of a schema that differs from what the migrations make.

Invariants: no row and no column is lost; an index is built beside the work of others (CONCURRENTLY); all else changes
in one transaction, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg

from pgtask._postgres.connection import connect, map_errors
from pgtask._postgres.migrate import migrate_again
from pgtask._postgres.verify import REPAIR, Difference, Thing
from pgtask.errors import SchemaError

__all__ = ["repair_schema"]

SWAP_LOCK_TIMEOUT = "500ms"  # for the exchange of an index


async def repair_schema(dsn: str, differences: Sequence[Difference]) -> None:
    """Repair the differences that can be repaired. Raises `SchemaError` and other `DatabaseError`s."""
    indexes = [one for one in differences if one.thing.kind == "index" and one.repair is not None]
    if indexes:
        await _build_indexes(dsn, indexes)
    others = [one for one in differences if one.thing.kind != "index" and one.repair is not None]
    if others:
        await migrate_again(dsn, [_drop(one.thing) for one in others if one.repair == "replace" and _drop(one.thing)])


def _drop(thing: Thing) -> str:
    """Return the statement after which the migrations make a thing again; empty for one that they replace."""
    match thing.kind:
        case "trigger":
            return f"DROP TRIGGER {thing.name} ON {thing.on_table}"
        case "default":
            return f"ALTER TABLE {thing.on_table} ALTER {thing.name} DROP DEFAULT"
    return ""


async def _build_indexes(dsn: str, differences: Sequence[Difference]) -> None:
    connection = await connect(dsn, name="pgtask verify", settings={"statement_timeout": "0"})
    try:
        with map_errors():
            for difference in differences:
                await _build_index(connection, difference)
    finally:
        await connection.close()


async def _build_index(connection: Any, difference: Difference) -> None:
    """Build an index. If that fails, what it has left is dropped. Raises `SchemaError` for keys that several tasks
    have."""
    thing = difference.thing
    left = {"rebuild": f"{thing.name}_ccnew", "build": thing.name, "replace": f"{thing.name}_new"}[
        str(difference.repair)
    ]
    try:
        await _send_build(connection, difference, left)
    except asyncpg.PostgresError as error:
        await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {left}")
        if not isinstance(error, asyncpg.UniqueViolationError):
            raise
        raise SchemaError(
            f"cannot build the index {thing.name}: {(error.detail or str(error)).rstrip('.')}; several tasks have one "
            f"key, see SELECT key, array_agg(id) FROM {thing.on_table} GROUP BY key HAVING count(*) > 1; cancel all "
            f"but one of each (pgtask cancel ID), then run: {REPAIR}"
        ) from error


async def _send_build(connection: Any, difference: Difference, new: str) -> None:
    """Build an index, which is called `new` until it is complete."""
    name, definition = difference.thing.name, difference.thing.definition
    match difference.repair:
        case "rebuild":
            await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {new}")  # of a try that was interrupted
            await connection.execute(f"REINDEX INDEX CONCURRENTLY {name}")
        case "build":
            await connection.execute(definition.replace(" INDEX ", " INDEX CONCURRENTLY ", 1))
        case "replace":
            await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {new}")
            await connection.execute(definition.replace(f" INDEX {name} ", f" INDEX CONCURRENTLY {new} ", 1))
            async with connection.transaction():
                # Behind our wait for readers that stay, all workers would wait too.
                await connection.execute(f"SET LOCAL lock_timeout = '{SWAP_LOCK_TIMEOUT}'")
                await connection.execute(f"DROP INDEX {name}")
                await connection.execute(f"ALTER INDEX {new} RENAME TO {name}")
