"""claim: the price of a lost reply."""

from __future__ import annotations

import asyncio
import logging
from math import inf
from typing import Any

import pytest
from claim_kit import claim_over, drain, ids_of, lease, play, put
from fix_database import run
from proxy import Line
from sessions import linked, until_blocked

from pgtask._postgres.store import Link

pytestmark = [pytest.mark.one_database, pytest.mark.usefixtures("without_debounce")]


def test_claim_with_lost_reply_is_released_first(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            ids = await put(db, 6)
            claim = claim_over(link)
            assert ids_of((await claim.claim_batch(1))[0]) == ids[:1]
            claim.next_poll = inf
            line.swallow()
            rows, lost, _ = await claim.claim_batch(3)
            assert (rows, line.cut) == ([], 1)
            held = await db.fetch("SELECT id FROM pg_task WHERE locked_by = $1", lost)
            assert {row["id"] for row in held} == set(ids[1:4])
            assert claim.may_find_tasks
            rows, token, _ = await claim.claim_batch(10)
            assert [(row[0], row[3]) for row in rows] == [(id, 1) for id in ids[1:]]
            assert token != lost
            assert await db.fetchval("SELECT count(*) FROM pg_task WHERE locked_by = $1", lost) == 0

    with caplog.at_level(logging.WARNING, "pgtask.claim"):
        run(main())
    said = [str(record.msg) for record in caplog.records if record.name == "pgtask.claim"]
    assert said == ["claim.recovered tasks=3"]


def test_claim_of_a_killed_backend_takes_nothing(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 3)
        claim = claim_over(link)
        assert len((await claim.claim_batch(1))[0]) == 1
        async with db.transaction():
            await db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
            claiming = asyncio.create_task(claim.claim_batch(10))
            await until_blocked(db, link.connection.get_server_pid())
            await db.execute("SELECT pg_terminate_backend($1, 5000)", link.connection.get_server_pid())
            assert (await claiming)[0] == []
        rows, _, _ = await claim.claim_batch(10)
        assert [(row[0], row[3]) for row in rows] == [(id, 1) for id in ids[1:]]

    with caplog.at_level(logging.WARNING, "pgtask.claim"):
        play(dsn, scenario)
    assert [record for record in caplog.records if record.name == "pgtask.claim"] == []


def test_lost_claim_leaves_tasks_of_other_workers_alone(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            ids = await put(db, 4)
            claim = claim_over(link)
            await claim.claim_batch(1)
            claim.next_poll = inf
            line.swallow()
            _, lost, _ = await claim.claim_batch(3)
            await lease(db, ids[1:2], ends=60)
            await db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 s' WHERE id = $1", ids[2])
            rows, _, _ = await claim.claim_batch(10)
            assert ids_of(rows) == ids[3:]
            left = await db.fetchrow("SELECT locked_by, claims FROM pg_task WHERE id = $1", ids[2])
            assert tuple(left) == (lost, 1), "it has ended: to free it is for expire, and counts"

    run(main())


@pytest.mark.parametrize("times", [2, 3])
def test_claim_survives_several_lost_replies(dsn: str, times: int) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            ids = await put(db, 10)
            claim = claim_over(link)
            await claim.claim_batch(1)
            for _ in range(times):
                claim.next_poll = inf  # the next statement is a claim, even if this test is slow
                line.swallow()
                rows, _, _ = await claim.claim_batch(2)
                assert rows == []
                await claim.claim_batch(1)
            await drain(claim)
            held = await db.fetch("SELECT claims, locked_by FROM pg_task")
            assert [row["claims"] for row in held] == [1] * len(ids)
            assert all(row["locked_by"] for row in held)

    run(main())


def test_abandoned_claim_returns_and_holds_nothing(dsn: str) -> None:
    """Its answer comes after the renewing thread has released its tasks, or before."""

    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 5)
        claim = claim_over(link)
        assert claim.abandon_stalled(0.0) is None
        once = link.once

        async def answered_late(name: str, *args: Any, **options: Any) -> list[Any]:
            rows = await once(name, *args, **options)
            if name == "claim":
                assert claim.abandon_stalled(60.0) is None, "it has just been sent"
                assert claim.abandon_stalled(-1.0) == args[3]
                assert claim.abandon_stalled(-1.0) is None
            return rows

        link.once = answered_late  # type: ignore[method-assign]
        assert (await claim.claim_batch(3))[0] == []
        link.once = once  # type: ignore[method-assign]
        rows, _, _ = await claim.claim_batch(10)
        assert ids_of(rows) == ids
        assert {row[3] for row in rows} == {1}, "as if never claimed"

    play(dsn, scenario)
