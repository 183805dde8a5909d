"""claim: which tasks, in which order, how many, when to look again; and what a lost reply costs."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from math import inf
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from conftest import _fresh_database, run
from test_connection import Line, until_blocked

from pgtask._postgres.connection import connect
from pgtask._postgres.store import Link, statement
from pgtask._worker import claim as module
from pgtask._worker.claim import Claim

WORKER = bytes(range(8))
SHORTEST, LONGEST = 0.25, 15.0
SOON = 0.1  # less than any wait but that between two looks in a row
NEVER = 1e6


# --- tools ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(cluster: str, template: str) -> Iterator[str]:
    yield from _fresh_database(cluster, template)


@pytest.fixture
def dsn(database: str) -> str:
    """One database for this module, emptied before each test."""

    async def empty() -> None:
        db = await asyncpg.connect(database)
        await db.execute("DELETE FROM pg_task")
        await db.close()

    asyncio.run(empty())
    return database


@pytest.fixture(autouse=True)
def without_debounce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint is heeded at once."""
    monkeypatch.setattr(module, "DEBOUNCE", 0.0)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time to look at what a claim knows before it looks again by itself."""
    monkeypatch.setattr(module, "REFRESH", 10.0)


def claim_over(
    link: Link, *queues: str, lease_timeout: float = 60.0, max_step_bytes: int = 1000, poll: float = SHORTEST
) -> Claim:
    return Claim(
        link,
        worker=WORKER,
        queues=queues,
        lease_timeout=lease_timeout,
        max_step_bytes=max_step_bytes,
        shortest_poll=poll,
        longest_poll=max(poll, LONGEST),
    )


@asynccontextmanager
async def linked(dsn: str) -> AsyncIterator[tuple[Link, Any]]:
    link = Link(dsn, "claimer")
    db = await asyncpg.connect(dsn)
    try:
        yield link, db
    finally:
        await link.close()
        await db.close()


def play(dsn: str, scenario: Callable[[Link, Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await scenario(link, db)

    run(main())


async def put(db: Any, n: int = 1, *, due: float = -1000.0, queue: str = "default", priority: int = 0) -> list[UUID]:
    """Tasks due in so many seconds, a millisecond apart; their ids, the oldest first."""
    rows = await db.fetch(
        "INSERT INTO pg_task (step, wakeup_at, queue, priority)"
        " SELECT '{}', now() + make_interval(secs => $2 + n / 1e3), $3, $4"
        " FROM generate_series(1, $1) AS n RETURNING id",
        n, due, queue, priority,
    )  # fmt: skip
    return [UUID(int=row["id"].int) for row in rows]


async def lease(db: Any, ids: list[UUID], ends: float) -> None:
    """Somebody else holds these tasks, for so many seconds more."""
    query = "UPDATE pg_task SET locked_by = $2, lock_expires_at = now() + make_interval(secs => $3), claims = 1"
    await db.execute(f"{query} WHERE id = ANY ($1)", ids, uuid4(), ends)


def ids_of(rows: list[Any]) -> list[UUID]:
    return [row[0] for row in rows]


async def drain(claim: Claim, limit: int = 100) -> list[UUID]:
    """Claim until nothing is due."""
    ids: list[UUID] = []
    while claim.wanted or seconds_to(claim.look_at) < SOON:
        await asyncio.sleep(max(0.0, 0.0 if claim.wanted else seconds_to(claim.look_at)))
        ids += ids_of((await claim.claim(limit))[0])
    return ids


def seconds_to(monotonic: float | None) -> float:
    assert monotonic is not None
    return monotonic - time.monotonic()


# --- which, and how many -------------------------------------------------------------------------------------


def test_higher_priority_first_and_the_oldest_first_within_it(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        low = await put(db, priority=-5, due=-9000)
        young = await put(db, queue="a", due=-10)
        old = await put(db, queue="b", due=-20)
        older = await put(db, queue="c", due=-30)
        high = await put(db, queue="z", priority=5, due=-1)
        await put(db, queue="z", priority=9, due=NEVER)
        assert await drain(claim_over(link)) == high + older + old + young + low

    play(dsn, scenario)


def test_no_queue_starves_another_of_the_same_priority(dsn: str) -> None:
    """While one queue never runs dry, the tasks of another that are older still get their turn."""

    async def scenario(link: Link, db: Any) -> None:
        await put(db, 50, queue="busy", due=-10)
        waiting = await put(db, queue="quiet", due=-100)
        claim = claim_over(link)
        for _ in range(3):
            claim.look_at = 0.0
            rows, _, _ = await claim.claim(5)
            if ids_of(rows) == waiting:
                return
            await put(db, 5, queue="busy", due=-1)
        pytest.fail("the oldest task was passed over")

    play(dsn, scenario)


def test_a_lane_is_claimed_in_order_and_never_more_than_asked_for(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 25)
        claim = claim_over(link)
        batches = [ids_of((await claim.claim(limit))[0]) for limit in (1, 2, 10, 100)]
        assert [len(batch) for batch in batches] == [1, 2, 10, 12]
        assert sum(batches, []) == ids  # noqa: RUF017
        assert (await claim.claim(100))[0] == []

    play(dsn, scenario)


def test_only_due_free_and_unparked_tasks_are_claimed(dsn: str) -> None:
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


def test_only_the_queues_that_are_served(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        a = await put(db, 3, queue="a")
        b = await put(db, 3, queue="b", priority=1)
        c = await put(db, 3, queue="c", priority=2)
        assert await drain(claim_over(link, "a", "b", "none")) == b + a
        assert await drain(claim_over(link, "none")) == []
        assert await drain(claim_over(link, "c", "c")) == c

    play(dsn, scenario)


def test_what_a_claim_writes_and_returns(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 3)
        await db.execute("UPDATE pg_task SET tried = 2, claims = 4")
        before = await db.fetch("SELECT step, wakeup_at, tried, error, created_at, updated_at FROM pg_task ORDER BY id")
        claim = claim_over(link, lease_timeout=77.0)
        started = time.monotonic()
        rows, token, sent = await claim.claim(2)
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


def test_each_claim_has_a_token_of_its_own(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 5)
        claim = claim_over(link)
        tokens = [(await claim.claim(1))[1] for _ in range(8)]
        assert len(set(tokens)) == len(tokens)
        assert {token.bytes[:8] for token in tokens} == {WORKER}
        assert len({token.bytes[8:] for token in tokens}) == len(tokens)

    play(dsn, scenario)


def test_a_step_that_is_too_large_stays_in_the_database(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        for step in ("x" * 100, "x" * 101, "ü" * 50, "ü" * 51):
            await db.execute("INSERT INTO pg_task (step) VALUES ($1)", step)
        claim = claim_over(link, max_step_bytes=100)
        rows, _, _ = await claim.claim(10)
        sizes = [(row[1], row[4]) for row in rows]
        assert sizes == [("x" * 100, None), (None, 101), ("ü" * 50, None), (None, 102)]

    play(dsn, scenario)


def test_large_steps_are_claimed_fewer_at_a_time(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CLAIM_BYTES", 1000)

    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 60)
        await db.execute("UPDATE pg_task SET step = repeat('x', 500)")
        claim = claim_over(link)
        batches = [(await claim.claim(10))[0] for _ in range(12)]
        sizes = [len(batch) for batch in batches]
        assert sizes[0] == 10
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == 2, "a thousand bytes are two such steps"
        assert [id for batch in batches for id in ids_of(batch)] == ids[: sum(sizes)]
        await db.execute("UPDATE pg_task SET step = repeat('x', 5000)")
        claim = claim_over(link, max_step_bytes=10_000)
        assert [len((await claim.claim(5))[0]) for _ in range(3)] == [5, 1, 1], "at least one"

    play(dsn, scenario)


def test_twenty_claimers_share_without_overlap(dsn: str) -> None:
    async def main() -> None:
        db = await asyncpg.connect(dsn)
        ids = await put(db, 300)
        links = [Link(dsn, "claimer") for _ in range(20)]
        for link in links:
            await link.open()

        async def work(claim: Claim) -> list[list[UUID]]:
            batches = []
            while rows := (await claim.claim(7))[0]:
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
def test_no_plan_makes_a_claim_take_more(dsn: str, off: tuple[str, ...]) -> None:
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
            ((count, _),) = await db.fetch(statement("expire"), 5)
            assert count == 5
            assert await db.fetchval("SELECT count(*) FROM pg_task WHERE lock_expires_at < now()") == 395
            await db.close()

    run(main())


def test_the_moment_itself_is_due_but_not_yet_over(dsn: str) -> None:
    """Within a transaction the clock of `now()` stands still."""

    async def scenario(_: Link, db: Any) -> None:
        async with db.transaction():
            await put(db, 1, due=-0.001)
            assert await db.fetchval("SELECT wakeup_at = now() FROM pg_task")
            assert [row[2] for row in await db.fetch(statement("lanes"))] == [0.0]
            assert len(await db.fetch(statement("claim"), "default", 0, 5, uuid4(), 60.0, 100, 0.0)) == 1
            await db.execute("UPDATE pg_task SET lock_expires_at = now()")
            assert tuple((await db.fetch(statement("expire"), 5))[0]) == (0, 0.0)
            await db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 us'")
            assert tuple((await db.fetch(statement("expire"), 5))[0]) == (1, None)

    play(dsn, scenario)


def test_a_task_may_be_put_on_hold_for_ever(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 3)
        await db.execute("UPDATE pg_task SET wakeup_at = 'infinity' WHERE id = $1", ids[0])
        await db.execute("UPDATE pg_task SET wakeup_at = '-infinity' WHERE id = $1", ids[2])
        claim = claim_over(link)
        assert await drain(claim) == [ids[2], ids[1]]
        assert seconds_to(claim.look_at) == pytest.approx(2 * SHORTEST, abs=0.2)
        await db.execute("UPDATE pg_task SET lock_expires_at = 'infinity' WHERE locked_by IS NOT NULL")
        claim = claim_over(link, "default", lease_timeout=1)
        assert await drain(claim) == []
        assert seconds_to(claim.look_at) <= 0.5

    play(dsn, scenario)


def test_a_claim_does_not_wait_for_the_disk_and_what_follows_does(dsn: str) -> None:
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


# --- when to look --------------------------------------------------------------------------------------------


def test_nothing_to_do_is_looked_for_less_and_less_often(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        claim = claim_over(link)
        assert claim.wanted
        waits: list[float] = []
        for _ in range(8):
            claim.look_at = 0.0
            assert (await claim.claim(10))[0] == []
            assert not claim.wanted
            assert claim.next_due is None
            waits.append(seconds_to(claim.look_at))
        assert waits == pytest.approx([0.5, 1, 2, 4, 8, 15, 15, 15], abs=0.2)
        claim.hint()
        assert seconds_to(claim.look_at) < SOON
        claim.look_at = 0.0
        await claim.claim(10)
        assert seconds_to(claim.look_at) == pytest.approx(0.5, abs=0.2)

    play(dsn, scenario)


def test_a_task_of_the_future_is_looked_for_when_it_falls_due(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, due=25)
        await put(db, due=15, queue="other")
        await put(db, due=100, queue="far")
        claim, some, far = (claim_over(link, *queues, poll=20) for queues in ((), ("default", "far"), ("far",)))
        for who, look_in, due_in in ((claim, 15, 15), (some, 20, 25), (far, 20, 100)):
            await who.claim(10)
            assert seconds_to(who.look_at) == pytest.approx(look_in, abs=3)
            assert seconds_to(who.next_due) == pytest.approx(due_in, abs=3)

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_a_task_that_is_due_is_claimed_until_its_lane_is_dry(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 5)
        claim = claim_over(link)
        await claim.claim(2)
        assert claim.wanted
        assert seconds_to(claim.next_due) <= 0
        await claim.claim(3)
        assert claim.wanted, "a full batch may not have been the last"
        assert (await claim.claim(3))[0] == []
        await claim.claim(3)
        assert not claim.wanted
        assert claim.next_due is None

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_after_the_last_of_a_lane_the_others_are_looked_for_at_once(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db)
        claim = claim_over(link)
        assert len((await claim.claim(10))[0]) == 1
        later = await put(db, queue="new")
        assert seconds_to(claim.look_at) < SOON
        assert await drain(claim) == later

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_a_hint_costs_nothing_while_there_is_work_anyway(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 50)
        claim = claim_over(link)
        await claim.claim(5)
        assert link.statements == 3, "expire, lanes, claim"
        look_at = claim.look_at
        for _ in range(3):
            claim.hint()
            await claim.claim(5)
        assert (link.statements, claim.look_at) == (6, look_at)

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_a_higher_priority_does_not_wait_for_the_lane_to_run_dry(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 50)
        claim = claim_over(link)
        await claim.claim(5)
        assert seconds_to(claim.look_at) == pytest.approx(10, abs=3)
        urgent = await put(db, priority=1)
        claim.look_at = time.monotonic()  # that much later
        assert ids_of((await claim.claim(5))[0]) == urgent

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_what_falls_due_behind_a_claim_waits_for_the_next_look(dsn: str) -> None:
    """Claims start at the floor of their lane: what lies before it is mostly dead, and read again by looks only."""

    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 6)
        claim = claim_over(link)
        assert ids_of((await claim.claim(2))[0]) == ids[:2]
        older = await put(db, due=-5000)
        assert ids_of((await claim.claim(2))[0]) == ids[2:4]
        claim.look_at = time.monotonic()
        assert ids_of((await claim.claim(2))[0]) == [*older, ids[4]]

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_tasks_of_one_moment_are_all_claimed(dsn: str) -> None:
    """The floor is a time, and includes it."""

    async def scenario(link: Link, db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step, wakeup_at) SELECT '{}', now() FROM generate_series(1, 9)")
        claim = claim_over(link)
        claimed = [ids_of((await claim.claim(4))[0]) for _ in range(3)]
        assert [len(ids) for ids in claimed] == [4, 4, 1]

    play(dsn, scenario)


class Slow(Link):
    """A link to a server that says that its looks took `took` seconds, one after the other."""

    took: list[float]

    async def once(self, name: str, *args: Any, deadline: float = 35.0) -> list[Any]:
        rows = await super().once(name, *args, deadline=deadline)
        return [(*row[:4], self.took.pop(0)) for row in rows] if name == "lanes" else rows


def test_looks_that_are_slow_get_rarer(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (_, db):
            await put(db, 5)
            link = Slow(dsn, "claimer")
            link.took = [0.5, 0.6, 0.005]
            claim = claim_over(link)
            try:
                await claim.look()
                assert seconds_to(claim.look_at) <= module.REFRESH  # one alone may have waited for something
                await claim.look()
                assert 9 < seconds_to(claim.look_at) <= module.LOOK_SHARE * 0.5
                claim.due_in(0)
                assert 0.3 < seconds_to(claim.look_at) <= 0.5
                await claim.look()
                assert seconds_to(claim.look_at) <= module.REFRESH
            finally:
                await link.close()

    run(main())


def test_a_lane_that_others_hold_does_not_wait_for_the_rare_look(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (_, db):
            await put(db, 1)
            link = Slow(dsn, "claimer")
            link.took = [3.0, 3.0]
            claim = claim_over(link)
            try:
                await claim.look()
                await claim.look()
                assert seconds_to(claim.look_at) > 50
                async with db.transaction():
                    await db.execute("SELECT FROM pg_task FOR UPDATE")
                    assert (await claim.claim(5))[0] == []
                assert seconds_to(claim.look_at) <= module.SLOWEST_LOOK
            finally:
                await link.close()

    run(main())


def test_the_server_tells_how_long_a_look_takes(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await put(db, 5)
            for name, *args in (("lanes",), ("lanes_of_queues", ["default"])):
                (row,) = await link.run(name, *args)
                assert 0 < row[4] < 1

    run(main())


def test_a_look_that_our_own_steps_held_up_is_not_taken_for_slow(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (_, db):
            await put(db, 5)
            link = HeldUp(dsn, "claimer")
            claim = claim_over(link)
            try:
                for _ in range(2):
                    link.on, link.meanwhile = "lanes", lambda: asyncio.sleep(0.1)
                    await claim.look()
                assert seconds_to(claim.look_at) <= module.REFRESH
            finally:
                await link.close()

    run(main())


def test_a_look_that_waited_for_the_database_is_not_taken_for_slow(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            await put(db, 5)
            claim = claim_over(link)
            await claim.look()
            line.swallow()
            await claim.look()
            assert line.cut == 1
            assert seconds_to(claim.look_at) <= module.REFRESH

    run(main())


class HeldUp(Link):
    """A link on which something happens between the server's answer and our reading of it."""

    meanwhile: Callable[[], Awaitable[None]] | None = None
    on: str = ""

    async def once(self, name: str, *args: Any, deadline: float = 35.0) -> list[Any]:
        rows = await super().once(name, *args, deadline=deadline)
        if name == self.on and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        return rows


@pytest.mark.parametrize("on", ["expire", "lanes", "claim"])
def test_a_hint_that_comes_while_it_looks_is_not_lost(dsn: str, on: str) -> None:
    """The task was committed after the look began, and its notification overtook the answer."""

    async def main() -> None:
        async with linked(dsn) as (_, db):
            link = HeldUp(dsn, "claimer")
            claim = claim_over(link)
            if on == "claim":
                await put(db)
            arrived: list[UUID] = []

            async def arrive() -> None:
                arrived.extend(await put(db))
                claim.hint()

            link.on, link.meanwhile = on, arrive
            first = ids_of((await claim.claim(10))[0])
            found = first + await drain(claim)
            await link.close()
            assert link.meanwhile is None
            assert set(found) >= set(arrived)

    run(main())


def test_what_this_worker_puts_off_is_looked_for_in_time(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        claim = claim_over(link, poll=20)
        await claim.claim(10)
        for delay, look_in, due_in in ((40, 20, 40), (10, 10, 10), (15, 10, 10)):
            claim.due_in(delay)
            assert seconds_to(claim.look_at) == pytest.approx(look_in, abs=3)
            assert seconds_to(claim.next_due) == pytest.approx(due_in, abs=3)

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_a_row_that_somebody_has_locked_is_tried_again_soon(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 2)
        claim = claim_over(link)
        async with db.transaction():
            await db.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", ids[0])
            assert ids_of((await claim.claim(10))[0]) == ids[1:]
            assert (await claim.claim(10))[0] == []
            assert not claim.wanted
            assert seconds_to(claim.look_at) == pytest.approx(10, abs=3)
        claim.look_at = time.monotonic()
        assert ids_of((await claim.claim(10))[0]) == ids[:1]

    play(dsn, scenario)


# --- leases that have ended ----------------------------------------------------------------------------------


def test_a_lease_that_ended_is_taken_over_and_the_crash_counted(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ended, held = await put(db, 3), await put(db, 2)
        await lease(db, ended, ends=-0.001)
        await lease(db, held, ends=50)
        rows, _, _ = await claim_over(link).claim(10)
        assert [(row[0], row[3]) for row in rows] == [(id, 2) for id in ended]

    with caplog.at_level(logging.WARNING, "pgtask.claim"):
        play(dsn, scenario)
    assert [str(record.msg) for record in caplog.records] == ["lease.expired tasks=3"]


def test_an_ended_lease_whose_row_is_locked_holds_up_nobody(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 2)
        await lease(db, ids, ends=-5)
        claim = claim_over(link)
        async with db.transaction(), asyncio.timeout(4):  # sooner than lock_timeout
            await db.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", ids[0])
            assert ids_of((await claim.claim(10))[0]) == ids[1:]
        assert await db.fetchval("SELECT lock_expires_at < now() FROM pg_task WHERE id = $1", ids[0])

    play(dsn, scenario)


def test_it_looks_again_when_the_next_lease_ends(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db)
        await lease(db, ids, ends=0.2)
        claim = claim_over(link, poll=20)
        rows: list[Any] = []
        while not rows:
            await asyncio.sleep(max(0.0, seconds_to(claim.look_at)))  # as the worker does
            rows, _, _ = await claim.claim(10)
        assert ids_of(rows) == ids
        assert await db.fetchval("SELECT locked_by IS NOT NULL AND claims = 2 FROM pg_task")
        assert link.statements <= 5, "expire, lanes; then expire, lanes, claim"

    play(dsn, scenario)


def test_leases_that_end_later_than_ours_do_not_put_off_the_look(dsn: str) -> None:
    """A lease that starts right after this look may end within one lease time."""

    async def scenario(link: Link, db: Any) -> None:
        await lease(db, await put(db), ends=5000)
        claim = claim_over(link, lease_timeout=0.6)
        await claim.claim(10)
        assert seconds_to(claim.look_at) <= 0.3

    play(dsn, scenario)


def test_more_ended_leases_than_one_statement_frees(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_EXPIRED", 10)

    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 25)
        await lease(db, ids, ends=-5)
        claim = claim_over(link)
        assert sorted(await drain(claim)) == sorted(ids)

    play(dsn, scenario)


# --- lost replies --------------------------------------------------------------------------------------------


def test_what_a_claim_took_whose_reply_was_lost_is_given_back_first(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            ids = await put(db, 6)
            claim = claim_over(link)
            assert ids_of((await claim.claim(1))[0]) == ids[:1]
            claim.look_at = inf
            line.swallow()
            rows, lost, _ = await claim.claim(3)
            assert (rows, line.cut) == ([], 1)
            held = await db.fetch("SELECT id FROM pg_task WHERE locked_by = $1", lost)
            assert {row["id"] for row in held} == set(ids[1:4])
            assert claim.wanted
            rows, token, _ = await claim.claim(10)
            assert [(row[0], row[3]) for row in rows] == [(id, 1) for id in ids[1:]]
            assert token != lost
            assert await db.fetchval("SELECT count(*) FROM pg_task WHERE locked_by = $1", lost) == 0

    with caplog.at_level(logging.WARNING, "pgtask.claim"):
        run(main())
    assert [str(record.msg) for record in caplog.records] == ["claim.recovered tasks=3"]


def test_a_claim_whose_backend_was_killed_took_nothing(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 3)
        claim = claim_over(link)
        assert len((await claim.claim(1))[0]) == 1
        async with db.transaction():
            await db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
            claiming = asyncio.create_task(claim.claim(10))
            await until_blocked(db, link.connection.get_server_pid())
            await db.execute("SELECT pg_terminate_backend($1, 5000)", link.connection.get_server_pid())
            assert (await claiming)[0] == []
        rows, _, _ = await claim.claim(10)
        assert [(row[0], row[3]) for row in rows] == [(id, 1) for id in ids[1:]]

    with caplog.at_level(logging.WARNING, "pgtask.claim"):
        play(dsn, scenario)
    assert caplog.records == []


def test_what_was_lost_and_taken_over_in_between_is_left_alone(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            ids = await put(db, 4)
            claim = claim_over(link)
            await claim.claim(1)
            claim.look_at = inf
            line.swallow()
            _, lost, _ = await claim.claim(3)
            await lease(db, ids[1:2], ends=60)
            await db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 s' WHERE id = $1", ids[2])
            rows, _, _ = await claim.claim(10)
            assert ids_of(rows) == ids[3:]
            left = await db.fetchrow("SELECT locked_by, claims FROM pg_task WHERE id = $1", ids[2])
            assert tuple(left) == (lost, 1), "it has ended: to free it is for expire, and counts"

    run(main())


@pytest.mark.parametrize("times", [2, 3])
def test_replies_may_be_lost_more_than_once(dsn: str, times: int) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            ids = await put(db, 10)
            claim = claim_over(link)
            await claim.claim(1)
            for _ in range(times):
                claim.look_at = inf  # what is sent next is a claim, however slow we are
                line.swallow()
                rows, _, _ = await claim.claim(2)
                assert rows == []
                await claim.claim(1)
            await drain(claim)
            held = await db.fetch("SELECT claims, locked_by FROM pg_task")
            assert [row["claims"] for row in held] == [1] * len(ids)
            assert all(row["locked_by"] for row in held)

    run(main())
