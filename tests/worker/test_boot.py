"""The boot of a worker: its schema is checked, and on an embedded server created, for as long as that takes."""

from __future__ import annotations

import asyncio
import functools

import asyncpg
import pytest
from fix_database import run

from pgtask._postgres.migrate import check_schema, migrate
from pgtask._postgres.store import Link
from pgtask._worker import process


def test_schema_is_created_when_the_lock_of_others_ends(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try gives up after a while, and that is an outage like any other."""
    hasty = functools.partial(migrate, lock_timeout=0.01, patience=0)
    monkeypatch.setattr(process, "migrate", hasty)

    async def main() -> None:
        other, link = await asyncpg.connect(empty_dsn), Link(empty_dsn, "pgtask test")
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock(1885828193, 1)")
            boot = asyncio.create_task(link.connected(functools.partial(process.check_or_create, empty_dsn)))
            while not link.is_unavailable:
                assert not boot.done()
                await other.fetchval("SELECT 1")
        await check_schema(await boot)
        await link.close()
        await other.close()

    run(main())
