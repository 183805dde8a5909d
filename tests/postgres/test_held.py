"""The transaction that holds rows: nothing is written outside of it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from claim_kit import play, put
from sessions import linked

from pgtask._postgres.held import HeldTransaction
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask._worker.limits import Limits
from pgtask.errors import DatabaseUnavailable
from pgtask.limits import Limit

ALL = "default", 0, 100, 1000, float("-inf")


async def hold(transaction: HeldTransaction) -> list[UUID]:
    await transaction.begin()
    return [row[0] for row in await transaction.fetch("turn_lock", *ALL)]


async def left(db: Any) -> int:
    return int(await db.fetchval("SELECT count(*) FROM pg_task"))


def test_held_rows_are_locked_until_the_commit(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 5)
        transaction = HeldTransaction(link, idle_timeout=30)
        assert await hold(transaction) == ids
        async with linked(dsn) as (other, _):
            assert await hold(HeldTransaction(other, idle_timeout=30)) == []
        assert await transaction.execute("turn_done", ids[:2], transaction.mark) == 2
        assert await left(db) == 5
        await transaction.commit()
        assert await left(db) == 3

    play(dsn, scenario)


@pytest.mark.parametrize("ends", ["ROLLBACK", "COMMIT", "ROLLBACK; BEGIN"])
def test_write_outside_of_its_transaction_changes_nothing(dsn: str, ends: str) -> None:
    """As behind a pooler that gives a client another session in the middle."""

    async def scenario(link: Link, db: Any) -> None:
        await put(db, 3)
        transaction = HeldTransaction(link, idle_timeout=30)
        ids = await hold(transaction)
        await link.connection.execute(ends)
        assert await transaction.execute("turn_done", ids, transaction.mark) == 0
        columns: tuple[list[Any], ...] = ([],) * 7
        ((done, leased, rescheduled, _),) = await transaction.fetch(
            "turn_end", ids, ids, [None] * 3, ids[0], 60.0, ids, *[[None] * 3] * len(columns), False, transaction.mark
        )
        assert (done, leased, rescheduled) == (0, 0, 0)
        await transaction.commit()
        assert await left(db) == 3

    play(dsn, scenario)


def test_transaction_does_not_go_on_over_another_connection(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 3)
        transaction = HeldTransaction(link, idle_timeout=30)
        ids = await hold(transaction)
        link.drop()
        await link.open()
        with pytest.raises(DatabaseUnavailable):
            await transaction.execute("turn_done", ids, transaction.mark)
        assert await hold(transaction) == ids
        await transaction.roll_back()

    play(dsn, scenario)


def test_other_statement_ends_a_transaction_that_was_begun(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 3)
        transaction = HeldTransaction(link, idle_timeout=30)
        await hold(transaction)
        await transaction.commit(begins=True)
        assert transaction.is_open
        await link.once("release", ids, ids, [])
        assert not transaction.is_open
        assert await db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'") == 0

    play(dsn, scenario)


def test_server_ends_a_turn_that_is_idle_for_too_long(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 3)
        transaction = HeldTransaction(link, idle_timeout=0.3)
        ids = await hold(transaction)
        assert await link.connection.fetchval("SHOW idle_in_transaction_session_timeout") == "300ms"
        await db.execute("SELECT FROM pg_task FOR UPDATE")  # waits for the end of the turn
        with pytest.raises(DatabaseUnavailable):
            await transaction.execute("turn_done", ids, transaction.mark)

    play(dsn, scenario)


def test_notes_of_a_turn_outlive_its_rollback(dsn: str) -> None:
    """They may be those of a step under a lease, which has ended meanwhile."""
    limit = Limit("host", concurrency=2)

    async def scenario(link: Link, db: Any) -> None:
        options: dict[str, Any] = {"worker": b"worker", "queues": (), "lease_timeout": 60, "max_step_bytes": 1000}
        limits = Limits(link, Claim(link, min_poll=1, max_poll=1, **options), [limit], **options)
        transaction = HeldTransaction(link, idle_timeout=30)
        await transaction.begin()
        await limits.write_held_notes([("host a", "paused", 30.0)], transaction)
        await transaction.roll_back()
        limits.keep_held_notes()
        await limits.write_notes([])
        paused = (
            "SELECT paused_until > now() + interval '20 seconds' FROM pg_task_limit_keys WHERE limit_key = 'host a'"
        )
        assert await db.fetchval(paused)

    play(dsn, scenario)
