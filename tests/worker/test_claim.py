"""claim: the choice, order and number of tasks."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from claim_kit import (
    ALL_LEASES,
    MIN_POLL,
    NEVER,
    WORKER,
    claim_over,
    drain,
    ids_of,
    lease,
    play,
    put,
    seconds_to,
    wait_of,
)
from fix_database import run

from pgtask._postgres.connection import connect
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.store import Link, statement
from pgtask._worker import claim as module
from pgtask._worker.claim import Claim

pytestmark = [pytest.mark.one_database, pytest.mark.usefixtures("without_debounce")]


def test_claim_takes_highest_priority_then_oldest(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        low = await put(db, priority=-5, due=-9000)
        young = await put(db, queue="a", due=-10)
        old = await put(db, queue="b", due=-20)
        older = await put(db, queue="c", due=-30)
        high = await put(db, queue="z", priority=5, due=-1)
        await put(db, queue="z", priority=9, due=NEVER)
        assert await drain(claim_over(link)) == high + older + old + young + low

    play(dsn, scenario)


def test_queues_of_one_priority_do_not_starve_each_other(dsn: str) -> None:
    """While one queue never runs dry, the tasks of another that are older still get their turn."""

    async def scenario(link: Link, db: Any) -> None:
        await put(db, 50, queue="busy", due=-10)
        waiting = await put(db, queue="quiet", due=-100)
        claim = claim_over(link)
        for _ in range(3):
            claim.next_poll = 0.0
            rows, _, _ = await claim.claim_batch(5)
            if ids_of(rows) == waiting:
                return
            await put(db, 5, queue="busy", due=-1)
        pytest.fail("the oldest task was passed over")

    play(dsn, scenario)


def test_lane_is_claimed_in_order_and_within_the_limit(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 25)
        claim = claim_over(link)
        batches = [ids_of((await claim.claim_batch(limit))[0]) for limit in (1, 2, 10, 100)]
        assert [len(batch) for batch in batches] == [1, 2, 10, 12]
        assert sum(batches, []) == ids  # noqa: RUF017
        assert (await claim.claim_batch(100))[0] == []

    play(dsn, scenario)


def test_claim_takes_only_due_free_and_unparked_tasks(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 3)
        await put(db, due=NEVER)
        await lease(db, await put(db), ends=60)
        parked = await put(db)
        await db.execute("UPDATE pg_task SET error = 'broken' WHERE id = $1", parked[0])
        both = await put(db)
        await lease(db, both, ends=60)
        await db.execute("UPDATE pg_task SET error = 'broken' WHERE id = $1", both[0])
        assert await drain(claim_over(link)) == ids

    play(dsn, scenario)


def test_claim_takes_only_from_served_queues(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        a = await put(db, 3, queue="a")
        b = await put(db, 3, queue="b", priority=1)
        c = await put(db, 3, queue="c", priority=2)
        assert await drain(claim_over(link, "a", "b", "none")) == b + a
        assert await drain(claim_over(link, "none")) == []
        assert await drain(claim_over(link, "c", "c")) == c

    play(dsn, scenario)


def test_claim_writes_lease_and_returns_row(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 3)
        await db.execute("UPDATE pg_task SET tried = 2, claims = 4")
        before = await db.fetch("SELECT step, wakeup_at, tried, error, created_at, updated_at FROM pg_task ORDER BY id")
        claim = claim_over(link, lease_timeout=77.0)
        started = time.monotonic()
        rows, token, sent = await claim.claim_batch(2)
        assert started <= sent <= time.monotonic()
        assert [tuple(row)[1:5] for row in rows] == [("{}", 2, 5, None)] * 2
        held = await db.fetch("SELECT *, clock_timestamp() AS clock FROM pg_task WHERE locked_by IS NOT NULL")
        assert {row["id"] for row in held} == set(ids_of(rows))
        for row in held:
            assert (row["locked_by"], row["claims"]) == (token, 5)
            # Counted from when it was sent, so that the worker never believes in a lease that has ended.
            rest = (row["lock_expires_at"] - row["clock"]).total_seconds()
            assert 76 - (time.monotonic() - sent) <= rest <= 77
            assert sent + 77 <= time.monotonic() + rest
        after = await db.fetch("SELECT step, wakeup_at, tried, error, created_at, updated_at FROM pg_task ORDER BY id")
        assert after == before

    play(dsn, scenario)


def test_each_claim_has_its_own_token(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 5)
        claim = claim_over(link)
        tokens = [(await claim.claim_batch(1))[1] for _ in range(8)]
        assert len(set(tokens)) == len(tokens)
        assert {token.bytes[:8] for token in tokens} == {WORKER}
        assert len({token.bytes[8:] for token in tokens}) == len(tokens)

    play(dsn, scenario)


def test_oversized_step_is_not_sent(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        for step in ("x" * 100, "x" * 101, "ü" * 50, "ü" * 51):
            await db.execute("INSERT INTO pg_task (step) VALUES ($1)", step)
        claim = claim_over(link, max_step_bytes=100)
        rows, _, _ = await claim.claim_batch(10)
        sizes = [(row[1], row[4]) for row in rows]
        assert sizes == [("x" * 100, None), (None, 101), ("ü" * 50, None), (None, 102)]

    play(dsn, scenario)


def test_large_steps_shrink_the_claim(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLAIM_BYTES", 1000)

    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 60)
        await db.execute("UPDATE pg_task SET step = repeat('x', 500)")
        claim = claim_over(link)
        batches = [(await claim.claim_batch(10))[0] for _ in range(12)]
        sizes = [len(batch) for batch in batches]
        assert sizes[0] == 10
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == 2, "a thousand bytes are two such steps"
        assert [id for batch in batches for id in ids_of(batch)] == ids[: sum(sizes)]
        await db.execute("UPDATE pg_task SET step = repeat('x', 5000)")
        claim = claim_over(link, max_step_bytes=10_000)
        assert [len((await claim.claim_batch(5))[0]) for _ in range(3)] == [5, 1, 1], "at least one"

    play(dsn, scenario)


def test_concurrent_claims_do_not_overlap(dsn: str) -> None:
    async def main() -> None:
        db = await asyncpg.connect(dsn)
        ids = await put(db, 300)
        links = [Link(dsn, "claimer") for _ in range(20)]
        for link in links:
            await link.open()

        async def work(claim: Claim) -> list[list[UUID]]:
            batches = []
            while rows := (await claim.claim_batch(7))[0]:
                batches.append(ids_of(rows))
            return batches

        found = await asyncio.gather(*(work(claim_over(link)) for link in links))
        batches = [batch for mine in found for batch in mine]
        assert all(len(batch) <= 7 for batch in batches)
        everything = [id for batch in batches for id in batch]
        assert len(everything) == len(set(everything))
        held = await db.fetch("SELECT id FROM pg_task WHERE locked_by IS NOT NULL AND claims = 1")
        assert {row["id"] for row in held} == set(everything) == set(ids)
        for link in links:
            await link.close()
        await db.close()

    run(main())


JOINS = ("enable_hashjoin", "enable_mergejoin", "enable_nestloop", "enable_material")


@pytest.mark.parametrize("off", [off for n in range(5) for off in itertools.combinations(JOINS, n)], ids=" ".join)
def test_claim_stays_within_limit_under_any_plan(dsn: str, off: tuple[str, ...]) -> None:
    """A LIMIT below a join may be run again for each outer row, and SKIP LOCKED then finds more; statistics that are
    stale make the planner want that."""

    async def main() -> None:
        for mode in ("force_generic_plan", "force_custom_plan"):
            db = await connect(dsn, name="claimer", settings={"plan_cache_mode": mode} | dict.fromkeys(off, "off"))
            await db.execute("DELETE FROM pg_task")
            await put(db, 500)
            await lease(db, (await put(db, 500))[:400], ends=-60)
            rows = await db.fetch(statement("claim"), "default", 0, 5, uuid4(), 60.0, 100, 0.0)
            assert len(rows) == 5
            assert await db.fetchval("SELECT count(*) FROM pg_task WHERE lock_expires_at > now()") == 5
            ((count, *_),) = await db.fetch(statement("expire"), 5, *ALL_LEASES)
            assert count == 5
            assert await db.fetchval("SELECT count(*) FROM pg_task WHERE lock_expires_at < now()") == 395
            await db.close()

    run(main())


def test_task_is_due_at_its_very_time(dsn: str) -> None:
    """Within a transaction the clock of `now()` stands still."""

    async def scenario(_: Link, db: Any) -> None:
        async with db.transaction():
            await put(db, 1, due=-0.001)
            assert await db.fetchval("SELECT wakeup_at = now() FROM pg_task")
            assert [row[2] for row in await db.fetch(statement("lanes"), *lane_parameters(None))] == [0.0]
            assert len(await db.fetch(statement("claim"), "default", 0, 5, uuid4(), 60.0, 100, 0.0)) == 1
            await db.execute("UPDATE pg_task SET lock_expires_at = now()")
            assert tuple((await db.fetch(statement("expire"), 5, *ALL_LEASES))[0])[:2] == (0, 0.0)
            await db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 us'")
            assert tuple((await db.fetch(statement("expire"), 5, *ALL_LEASES))[0])[:2] == (1, None)

    play(dsn, scenario)


def test_claim_can_continue_in_the_last_lane(dsn: str, unhurried: None) -> None:
    """From a time on, independent of tasks that fell due before it, or in another lane."""

    async def scenario(link: Link, db: Any) -> None:
        group = await put(db, 5, due=-500)
        await db.execute("UPDATE pg_task SET wakeup_at = (SELECT min(wakeup_at) FROM pg_task)")
        claim = claim_over(link)
        first, _, _ = await claim.claim_batch(2)
        assert claim.requested == 2
        await put(db, 3, due=-2000, priority=5)
        await put(db, 3, due=-2000)
        await db.execute("INSERT INTO pg_task (step, wakeup_at) SELECT '', wakeup_at - interval '1 us' FROM pg_task")
        later = await put(db, 1, due=-100)
        await claim.poll_lanes()
        second, _, _ = await claim.claim_batch(2, same_lane_from=first[0][5])
        third, _, _ = await claim.claim_batch(2, same_lane_from=first[0][5])
        assert {*ids_of(first + second)} < {*group}
        assert {*ids_of(third)} == {*group, *later} - {*ids_of(first + second)}
        assert [row[3] for row in first + second + third] == [1] * 6

    play(dsn, scenario)


def test_claim_can_skip_suspects(dsn: str, unhurried: None) -> None:
    """Suspects that are due earlier hold up no other task, in their lane or in the next."""

    async def scenario(link: Link, db: Any) -> None:
        await put(db, 3, due=-2000, priority=5)
        await put(db, 3, due=-2000)
        await db.execute("UPDATE pg_task SET claims = 1")
        others = await put(db, 2)
        claim = claim_over(link)
        assert (await claim.claim_batch(10, suspects=False))[0] == []
        assert claim.has_more
        rows, _, _ = await claim.claim_batch(10, suspects=False)
        assert [row[0] for row in rows] == others
        assert not claim.has_more
        claim.next_poll = 0.0
        assert [row[3] for row in (await claim.claim_batch(10))[0]] == [2, 2, 2]

    play(dsn, scenario)


def test_task_on_hold_at_infinity_is_never_claimed(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 3)
        await db.execute("UPDATE pg_task SET wakeup_at = 'infinity' WHERE id = $1", ids[0])
        await db.execute("UPDATE pg_task SET wakeup_at = '-infinity' WHERE id = $1", ids[2])
        claim = claim_over(link)
        assert await drain(claim) == [ids[2], ids[1]]
        assert wait_of(claim) >= 2 * MIN_POLL
        await db.execute("UPDATE pg_task SET lock_expires_at = 'infinity' WHERE locked_by IS NOT NULL")
        claim = claim_over(link, "default", lease_timeout=1)
        assert await drain(claim) == []
        assert seconds_to(claim.next_poll) <= 0.5

    play(dsn, scenario)


def test_claim_does_not_wait_for_disk_but_later_commits_do(dsn: str) -> None:
    async def scenario(_: Link, db: Any) -> None:
        ids, token = await put(db), uuid4()
        statements: list[tuple[str, tuple[Any, ...]]] = [
            ("claim", ("default", 0, 5, token, 60.0, 100, 0.0)),
            ("renew", (ids, [token], 60.0)),
        ]
        for name, args in statements:
            async with db.transaction():
                assert len(await db.fetch(statement(name), *args)) == 1
                assert await db.fetchval("SHOW synchronous_commit") == "off"
            assert await db.fetchval("SHOW synchronous_commit") == "on"

    play(dsn, scenario)
