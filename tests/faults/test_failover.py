"""The primary's host is cut off, and the standby promoted: real servers, on hosts behind a switch."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from failing_over import LEDGER, Write
from fix_database import run
from fleet import Fleet
from switch import Server, Switch, replicated, why_no_switch

from pgtask import Client
from pgtask._postgres.migrate import migrate

CONCURRENCY = 20

pytestmark = [pytest.mark.faults, pytest.mark.skipif(why_no_switch() is not None, reason=str(why_no_switch()))]


@pytest.fixture
def hosts() -> Iterator[tuple[Switch, Server, Server]]:
    """A primary and its synchronous standby, each on a host, and a host for workers."""
    with Switch("one", "two", "work") as switch, replicated(switch, "one", "two") as (primary, standby):
        yield switch, primary, standby


def both(primary: Server, standby: Server, options: str = "") -> str:
    return f"postgresql://postgres@{primary.address},{standby.address}/postgres?sslmode=disable{options}"


async def be_synchronous(db: Any) -> None:
    """Have each commit wait for the standby, so that none is lost with the primary."""
    await db.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await db.execute("SELECT pg_reload_conf()")
    while not await db.fetchval("SELECT bool_or(sync_state = 'sync') FROM pg_stat_replication"):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def fill(dsn: str, number: int) -> None:
    await migrate(dsn)
    db = await asyncpg.connect(dsn)
    await db.execute(LEDGER)
    async with Client(dsn) as client:
        await client.enqueue_many([Write(one) for one in range(number)])
    await be_synchronous(db)
    await db.close()


async def count(dsn: str) -> int:
    db = await asyncpg.connect(dsn)
    try:
        found: int = await db.fetchval("SELECT count(*) FROM ledger")
        return found
    finally:
        await db.close()


async def until_more(dsn: str, than: int, timeout: float = 60) -> float:
    """Wait until the ledger has more rows; return the monotonic time."""
    async with asyncio.timeout(timeout):
        while await count(dsn) <= than:  # noqa: ASYNC110  what changes it is another process
            await asyncio.sleep(0.05)
    return time.monotonic()


def seconds_of(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return time.monotonic() - began


@pytest.mark.timeout(180)
def test_commands_pass_a_host_that_swallows(hosts: tuple[Switch, Server, Server]) -> None:
    switch, primary, standby = hosts
    run(migrate(primary.local))
    switch.cut("one")
    standby.promote()
    listing = (sys.executable, "-m", "pgtask", "list", "--dsn")
    direct = f"postgresql://postgres@{standby.address}/postgres?sslmode=disable"
    alone = min(seconds_of(switch.command("work", *listing, direct)) for _ in range(3))
    together = min(seconds_of(switch.command("work", *listing, both(primary, standby))) for _ in range(3))
    print(f"list: {alone:.2f} s with the host that is there, {together:.2f} s with both")
    assert together < alone + 0.7


@pytest.mark.timeout(180)
def test_work_goes_on_after_the_primary_is_cut_off(hosts: tuple[Switch, Server, Server]) -> None:
    switch, primary, standby = hosts
    number = 8_000
    dsn = both(primary, standby)
    run(fill(primary.local, number))
    fleet = Fleet(dsn, "--concurrency", str(CONCURRENCY), app="failing_over:app", procs=2)
    fleet.on(switch.command("work"))

    async def main() -> tuple[float, float]:
        await until_more(standby.local, 400)
        switch.cut("one")
        cut = time.monotonic()
        await asyncio.sleep(2)
        await asyncio.to_thread(standby.promote)
        db = await asyncpg.connect(standby.local)
        await db.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await db.execute("SELECT pg_reload_conf()")
        await db.close()
        before = await count(standby.local)
        took = await until_more(standby.local, before) - cut
        full = await until_more(standby.local, before + 1_000) - cut
        async with asyncio.timeout(100):
            while await left(standby.local):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        return took, full

    with fleet:
        fleet.until("worker.ready", times=2)
        took, full = run(main(), timeout=150)
    rows, distinct = run(ledger(standby.local))
    repeats = rows - distinct
    print(f"goes on {took:.1f} s after the cut, 1,000 tasks are done {full:.1f} s after it; {repeats} ran again")
    assert full <= 15
    assert distinct == number
    assert repeats <= 2 * CONCURRENCY


async def left(dsn: str) -> int:
    db = await asyncpg.connect(dsn)
    try:
        found: int = await db.fetchval("SELECT count(*) FROM pg_task")
        return found
    finally:
        await db.close()


async def ledger(dsn: str) -> tuple[int, int]:
    db = await asyncpg.connect(dsn)
    try:
        row = await db.fetchrow("SELECT count(*), count(DISTINCT number) FROM ledger")
        return row[0], row[1]
    finally:
        await db.close()
