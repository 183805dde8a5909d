"""No statement keeps a plan that was right for a small table only.

A queue that is idle has a small table, and autovacuum tells the planner so: the cheapest plan is then to read all of an
index, and a session keeps it when the table grows. Each statement that a worker or a client sends often is planned on
a vacuumed table of a few rows, and then runs on a table of thousands, most of them under leases of other workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from fix_database import fresh_database, run
from grown import MANY, SIZES, Sender, be_small, grow, of_client, of_recovery, of_worker
from sessions import our_session

from pgtask._postgres.migrate import migrate
from pgtask._postgres.pools import client_pool
from pgtask._postgres.store import HOT_SETTINGS

OTHERS = 3000
KEPT = {"plan_cache_mode": "force_generic_plan"}  # as the session of a caller decides after five executions
Excess = dict[str, tuple[int, int]]  # the statements that read too many rows: how many, and how many they may


@pytest.fixture(params=["cluster", "installed_cluster"], ids=["embedded", "installed"])
def small(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database on the newest server that we have, and one on the oldest: their planners differ."""
    yield from fresh_database(request.getfixturevalue(request.param), "template0")


@pytest.mark.parametrize("size", SIZES)
def test_plan_of_a_small_table_is_right_for_a_large_one(small: str, size: int) -> None:
    async def main() -> dict[str, Excess]:
        await migrate(small)
        async with AsyncExitStack() as stack:
            db, *sessions = [
                await stack.enter_async_context(our_session(small, **settings))
                for settings in ({}, HOT_SETTINGS, HOT_SETTINGS, KEPT, {})
            ]
            worker, late_worker, caller, pooled_client = map(Sender, sessions)
            pool = await stack.enter_async_context(await client_pool(small, size=1))
            client = Sender(await stack.enter_async_context(pool.acquire()))
            caller.is_callers = True
            await be_small(db, size)
            await worker.prepare(of_worker([]) | of_recovery([]))
            await client.prepare(of_client([]))
            await caller.prepare(of_client([]))
            held, some = await grow(db, OTHERS)
            await late_worker.prepare(of_worker(held))
            await pooled_client.prepare(of_client(some))
            return {
                "worker": await worker.excess(of_worker(held)),
                "late worker": await late_worker.excess(of_worker(held)),
                "client": await client.excess(of_client(some)),
                "caller": await caller.excess(of_client(some)),
                "recovery": await worker.excess(of_recovery(held), more=OTHERS + 2 * MANY + 100),
                # It plans each statement anew, for the size of the tables: it may read a table, but once.
                "pooled client": await pooled_client.excess(of_client(some), more=5 * OTHERS),
            }

    found = run(main())
    assert found == {sender: {} for sender in found}
