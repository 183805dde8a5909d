"""A row that another session has locked, or its open transaction, delays the task that it concerns, and no other.

Without that promise, each wait here lasts as long as the lock: to the end of the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import lockable
import pytest
from fix_database import run
from fleet import SHORT_LEASE, Fleet, ready
from lockable import Forever, Held, Noop
from sessions import connected, opened, until

from pgtask import Client

pytestmark = pytest.mark.faults

BOUND = 3.0
"""Seconds in which others must end. They take less than one on a machine that does nothing else."""

LISTENS = {"listening": (), "pooled": ("--no-listen",)}
LEASED = "SELECT locked_by IS NOT NULL FROM pg_task WHERE id = $1"


async def others_end(client: Client, db: Any) -> None:
    """Ten tasks and a run that the lock does not concern: they come to their end."""
    async with asyncio.timeout(BOUND):
        ids = await client.enqueue_many([Noop(number) for number in range(10)])
        assert await (await client.trigger(lockable.quick, 1)).result() == 2
        await until(db, "SELECT count(*) = 0 FROM pg_task WHERE id = ANY ($1)", ids)


Scenario = Callable[[Fleet, Client, Any], Awaitable[None]]


def play(dsn: str, scenario: Scenario, *arguments: str) -> None:
    """Run a scenario with a fleet of one worker, a client, and the session that locks."""

    async def main(fleet: Fleet) -> None:
        async with opened(dsn, app=lockable.app) as (client, db):
            await scenario(fleet, client, db)

    with ready(dsn, *arguments, app="lockable:app") as fleet:
        run(main(fleet))


@pytest.mark.parametrize("how", LISTENS)
def test_outcome_of_a_locked_row_delays_no_other(dsn: str, tmp_path: Path, how: str) -> None:
    async def scenario(fleet: Fleet, client: Client, db: Any) -> None:
        go = tmp_path / "go"
        task = await client.enqueue(Held(str(go)))
        await until(db, LEASED, task)
        async with db.transaction():
            await db.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", task)
            go.touch()
            while go.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await others_end(client, db)
            await others_end(client, db)
        await until(db, "SELECT count(*) = 0 FROM pg_task")

    play(dsn, scenario, *LISTENS[how])


@pytest.mark.parametrize("how", LISTENS)
def test_lost_lease_of_a_locked_row_delays_no_other(dsn: str, how: str) -> None:
    async def scenario(fleet: Fleet, client: Client, db: Any) -> None:
        task = await client.enqueue(Forever())
        await until(db, LEASED, task)
        async with db.transaction(), connected(dsn) as other:
            await db.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", task)
            await asyncio.to_thread(fleet.until, "lease.lost")
            await until(other, "SELECT lock_expires_at < now() FROM pg_task WHERE id = $1", task)
            await others_end(client, db)
            await others_end(client, db)

    play(dsn, scenario, *SHORT_LEASE, *LISTENS[how])


@pytest.mark.parametrize("how", LISTENS)
def test_open_cancel_of_a_child_delays_no_other_run(dsn: str, how: str) -> None:
    """It holds the record of the parent, for which the end of the other child has to wait."""

    async def scenario(fleet: Fleet, client: Client, db: Any) -> None:
        parent = await client.trigger(lockable.pair)
        await until(db, "SELECT waits_for = 2 FROM pg_task_runs WHERE id = $1", parent.id)
        await until(db, "SELECT count(*) = 2 FROM pg_task_runs WHERE parent = $1 AND waits_on IS NOT NULL", parent.id)
        rows = await db.fetch("SELECT id FROM pg_task_runs WHERE parent = $1", parent.id)
        cancelled, other = (UUID(int=row["id"].int) for row in rows)
        async with db.transaction(), connected(dsn) as looking:
            assert await client.run(cancelled).cancel(conn=db)
            await client.signal(other, "go", 7)
            await until(looking, LEASED, other)
            await others_end(client, db)
            await others_end(client, db)
        assert await parent.result(timeout=BOUND) == "a member was cancelled"

    play(dsn, scenario, *LISTENS[how])


FAMILY = """
    WITH runs AS (
        INSERT INTO pg_task_runs (id, name, parent, waits_on, paused_until, waits_for, awaited)
        VALUES ($1, 'pair', NULL, '1 children of c', 'infinity', 1, false), ($2, 'member', $1, NULL, NULL, 0, true)
    )
    INSERT INTO pg_task (id, step, wakeup_at)
    VALUES ($1, '{"pair":{"Run":null}}', 'infinity'), ($2, '{"Lockable":{"Held":{"path":1}}}', 'infinity')
"""
"""A parent that waits, and a child whose step a worker parks, since it cannot decode it."""


@pytest.mark.parametrize("row", ["pg_task", "pg_task_runs"])
@pytest.mark.parametrize("how", LISTENS)
def test_parking_beside_a_locked_parent_delays_no_other(dsn: str, how: str, row: str) -> None:
    async def scenario(fleet: Fleet, client: Client, db: Any) -> None:
        parent, child = UUID(int=1), UUID(int=2)
        await db.execute(FAMILY, parent, child)
        async with db.transaction(), connected(dsn) as other:
            await db.execute(f"SELECT FROM {row} WHERE id = $1 FOR UPDATE", parent)
            await other.execute("UPDATE pg_task SET wakeup_at = now() WHERE id = $1", child)
            await until(other, LEASED, child)
            await others_end(client, db)
            await others_end(client, db)
        await until(db, "SELECT error IS NOT NULL FROM pg_task WHERE id = $1", child)
        assert await db.fetchval("SELECT waits_for FROM pg_task_runs WHERE id = $1", parent) == 0

    play(dsn, scenario, *LISTENS[how])
