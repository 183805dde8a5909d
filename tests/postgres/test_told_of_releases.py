"""Statements that free leases notify the workers of the queues concerned, and no worker if they free nothing."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from schema_kit import payloads, play

from pgtask._postgres.store import statement

pytestmark = pytest.mark.one_database("TRUNCATE pg_task_runs, pg_task_checkpoints, pg_task_signals")

TOKEN = UUID(int=1)
IDS = [UUID(int=number) for number in range(2, 7)]
LONG = "c" * 5000
FILL = """
    INSERT INTO pg_task (id, step, queue, locked_by, lock_expires_at, claims)
    SELECT id, '{"flow":{"Run":null}}', queue, $3, now() + $4::text::interval, 1
    FROM unnest($1::uuid[], $2::text[]) AS task (id, queue)"""
LEASES = (IDS, [TOKEN] * len(IDS))
FREES = {"release": ("release", (*LEASES, [])), "recovery of a claim": ("claim_recover", (TOKEN,))}


@pytest.mark.parametrize("how", FREES)
def test_statement_that_frees_leases_notifies_by_queue(dsn: str, how: str) -> None:
    name, args = FREES[how]

    async def scenario(db: Any) -> None:
        async def free() -> None:
            await db.fetch(statement(name), *args)

        oid = await db.fetchval(statement("table_oid"))
        await db.execute(FILL, IDS, ["a", "b", "a", LONG, "b"], TOKEN, "1 hour")
        assert sorted(await payloads(dsn, free, sleeps=["other"])) == ["", f"{oid}+ a", f"{oid}+ b"]
        assert await db.fetchval("SELECT count(*) FROM pg_task WHERE locked_by IS NULL AND claims = 0") == len(IDS)
        assert await payloads(dsn, free, sleeps=[]) == [], "it has freed nothing"

    play(dsn, scenario)


def test_release_of_nothing_notifies_no_worker(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        assert await payloads(dsn, lambda: db.fetch(statement("release"), [], [], []), sleeps=[]) == []

    play(dsn, scenario)


@pytest.mark.parametrize("lease", ["expired", "none"])
def test_resumed_run_wakes_workers_that_sleep(dsn: str, lease: str) -> None:
    """Also if its expired lease is still there, of which the triggers say nothing."""

    async def scenario(db: Any) -> None:
        async def resume() -> None:
            assert [row[0] for row in await db.fetch(statement("runs/resume"), [IDS[0]])] == IDS[:1]

        await db.execute(FILL, IDS[:1], ["a"], TOKEN, "-1 hour")
        await db.execute("INSERT INTO pg_task_runs (id, name) VALUES ($1, 'flow')", IDS[0])
        await db.execute("UPDATE pg_task SET tried = 1, wakeup_at = now() + interval '1 hour'")
        if lease == "none":
            await db.execute("UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL")
        assert await payloads(dsn, resume, sleeps=[])
        assert await db.fetchval("SELECT wakeup_at <= now() AND locked_by IS NULL FROM pg_task")

    play(dsn, scenario)


def test_resume_of_nothing_notifies_no_worker(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        assert await payloads(dsn, lambda: db.fetch(statement("runs/resume"), IDS), sleeps=[]) == []

    play(dsn, scenario)
