"""The plans of small tables on millions of rows, and their time: a batch of 500 beside 30,000 leases of others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fix_database import fresh_database, run
from grown import SIZES, TOKEN, Sender, be_small, fill, fill_tasks, grow, of_client, of_recovery, of_worker
from sessions import our_session

from pgtask._postgres.connection import PLAN_SETTINGS
from pgtask._postgres.migrate import migrate
from pgtask._postgres.store import HOT_SETTINGS, statement

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
ROWS = 3_000_000
RUNS = 100_000  # the first of these rows
FIRST, CHUNK = 1_000_001, 200_000
BATCH, LEASES = 500, 30_000
WRITES = ("flush", "archive", "renew", "release")
MAX_SECONDS = 0.015
TRIES = 10


@pytest.fixture(params=["cluster", "installed_cluster"], ids=["embedded", "installed"])
def small(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from fresh_database(request.getfixturevalue(request.param), "template0")


def test_plan_of_an_empty_table_is_right_for_millions(small: str) -> None:
    async def main() -> dict[str, Any]:
        await migrate(small)
        async with AsyncExitStack() as stack:
            db, *sessions = [
                await stack.enter_async_context(our_session(small, **settings))
                for settings in ({}, HOT_SETTINGS, PLAN_SETTINGS)
            ]
            worker, client = map(Sender, sessions)
            await db.execute("SET synchronous_commit = off")
            await be_small(db, 0)
            await worker.prepare(of_worker([]) | of_recovery([]))
            await client.prepare(of_client([]))
            await fill(db, FIRST, FIRST + RUNS)
            for first in range(FIRST + RUNS + 1, FIRST + ROWS, CHUNK):
                await fill_tasks(db, first, first + CHUNK - 1)
            held, some = await grow(db, 3000)
            return {
                "worker": await worker.excess(of_worker(held)),
                "client": await client.excess(of_client(some)),
                # It reads all leases, once, and never a pair of rows.
                "recovery": await worker.excess(of_recovery(held), more=ROWS),
            }

    found = run(main(), timeout=800)
    assert found == {sender: {} for sender in found}


async def time_of(db: Any, name: str, args: tuple[Any, ...]) -> float:
    """Return the seconds that a statement takes at best, in a transaction that is rolled back."""
    found = []
    for _ in range(TRIES):
        transaction = db.transaction()
        await transaction.start()
        start = time.perf_counter()
        await db.fetch(statement(name.partition(" ")[0]), *args)
        found.append(time.perf_counter() - start)
        await transaction.rollback()
    return min(found)


@pytest.mark.parametrize("size", SIZES)
def test_batch_beside_the_leases_of_others_is_fast(small: str, size: int) -> None:
    """At most 15 ms; on a busy machine three times what a plan of this moment takes."""

    async def main() -> dict[str, tuple[float, float]]:
        await migrate(small)
        async with AsyncExitStack() as stack:
            db, old, new = [
                await stack.enter_async_context(our_session(small, **settings))
                for settings in ({}, HOT_SETTINGS, HOT_SETTINGS)
            ]
            await be_small(db, size)
            for name, call in of_worker([]).items():
                await old.fetch(statement(name.partition(" ")[0]), *call.args)
            held, _ = await grow(db, LEASES * 10 // 8, BATCH)
            assert await db.fetchval("SELECT count(*) FROM pg_task WHERE locked_by <> $1", TOKEN) >= LEASES
            calls = {name: call.args for name, call in of_worker(held).items() if name.startswith(WRITES)}
            return {
                name: (await time_of(old, name, args), max(MAX_SECONDS, 3 * await time_of(new, name, args)))
                for name, args in calls.items()
            }

    found = run(main())
    assert {name: times for name, times in found.items() if times[0] > times[1]} == {}, found
