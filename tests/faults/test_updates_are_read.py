"""No update is lost with on_conflict="after": a step that starts after an enqueue reads what was written before it.

Enqueues race claims, turns, ends and kills, on few keys, so that each key is nearly always under way. The environment
variable PGTASK_TEST_UPDATES makes the larger run longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from typing import Any

import asyncpg
import pytest
from fix_database import run
from fleet import Fleet, Rows
from mirrors import TABLES, BringUpToDate

from pgtask import Client

UPDATES = int(os.environ.get("PGTASK_TEST_UPDATES", "10000"))
NAMES = 40
WRITERS = 8
WORKERS = (
    "SELECT split_part(application_name, ' ', 3)::integer FROM pg_stat_activity"
    " WHERE application_name ~ '^pgtask worker [0-9]+ [0-9a-f]{8}'"
)
MOST = "SELECT max(tasks) FROM (SELECT count(*) AS tasks FROM pg_task GROUP BY ltrim(key, '/')) AS of_key"


async def write(dsn: str, updates: int, mosts: list[int]) -> None:
    """Update names at random, each in one transaction with its enqueue, and note the most tasks that a key has had."""

    async def writer(client: Client) -> None:
        db = await asyncpg.connect(dsn)
        try:
            for _ in range(updates // WRITERS):
                name = random.randrange(NAMES)
                async with db.transaction():
                    await db.execute("UPDATE original SET value = value + 1 WHERE name = $1", name)
                    await client.enqueue(
                        BringUpToDate(name), key=f"{name}", on_conflict="after", on_parked="revive", conn=db
                    )
                if random.random() < 0.01:
                    mosts.append(await db.fetchval(MOST) or 0)
        finally:
            await db.close()

    async with Client(dsn) as client:
        await asyncio.gather(*(writer(client) for _ in range(WRITERS)))


async def kill(dsn: str, kills: int) -> None:
    db = await asyncpg.connect(dsn)
    for _ in range(kills):
        await asyncio.sleep(random.uniform(0.1, 0.5))  # at any moment
        if pids := await db.fetch(WORKERS):
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice(pids)[0], signal.SIGKILL)
    await db.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("updates", "kills"), [(1000, 2), pytest.param(UPDATES, 10, marks=pytest.mark.faults)])
def test_no_update_is_lost_whatever_happens(dsn: str, rows: Rows, updates: int, kills: int) -> None:
    for table in TABLES:
        rows(table)
    rows(f"INSERT INTO original SELECT name, 0 FROM generate_series(0, {NAMES - 1}) AS name")
    mosts: list[int] = []

    async def main() -> None:
        await asyncio.gather(write(dsn, updates, mosts), kill(dsn, kills))

    with Fleet(dsn, app="mirrors:app", procs=3):
        run(main(), timeout=500)
        rows.until("SELECT count(*) FROM pg_task", holds=lambda value: value == 0, timeout=90)
    behind: list[Any] = rows("SELECT name FROM original LEFT JOIN copy USING (name) WHERE copy.value <> original.value")
    assert behind == []
    assert rows.value("SELECT sum(value) FROM original") == updates // WRITERS * WRITERS
    assert max(mosts, default=0) <= 2
