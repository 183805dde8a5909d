"""claim: the times of polls."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
from claim_kit import SOON, claim_over, drain, ids_of, lease, play, put, seconds_to, wait_of
from fix_database import run
from proxy import Line
from sessions import linked

from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.store import Link
from pgtask._worker import claim as module
from pgtask._worker import expired

pytestmark = [pytest.mark.one_database, pytest.mark.usefixtures("without_debounce")]


# --- when to poll


def test_polls_of_an_empty_table_get_rarer(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        claim = claim_over(link)
        assert claim.may_find_tasks
        waits: list[float] = []
        for _ in range(8):
            claim.next_poll = 0.0
            assert (await claim.claim_batch(10))[0] == []
            assert not claim.may_find_tasks
            assert claim.next_due is None
            waits.append(wait_of(claim))
        assert waits == pytest.approx([0.5, 1, 2, 4, 8, 15, 15, 15])
        claim.poll_soon()
        assert seconds_to(claim.next_poll) < SOON
        claim.next_poll = 0.0
        await claim.claim_batch(10)
        assert wait_of(claim) == pytest.approx(0.5)

    play(dsn, scenario)


def test_future_task_is_polled_when_it_falls_due(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, due=25)
        await put(db, due=15, queue="other")
        await put(db, due=100, queue="far")
        claim, some, far = (claim_over(link, *queues, poll=20) for queues in ((), ("default", "far"), ("far",)))
        for who, poll_in, due_in in ((claim, 15, 15), (some, 20, 25), (far, 20, 100)):
            await who.claim_batch(10)
            assert seconds_to(who.next_poll) == pytest.approx(poll_in, abs=3)
            assert seconds_to(who.next_due) == pytest.approx(due_in, abs=3)

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_due_lane_is_claimed_until_it_is_empty(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 5)
        claim = claim_over(link)
        await claim.claim_batch(2)
        assert claim.may_find_tasks
        assert seconds_to(claim.next_due) <= 0
        await claim.claim_batch(3)
        assert claim.may_find_tasks, "a full batch may not have been the last"
        assert (await claim.claim_batch(3))[0] == []
        await claim.claim_batch(3)
        assert not claim.may_find_tasks
        assert claim.next_due is None

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_emptied_lane_is_followed_by_a_poll_at_once(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db)
        claim = claim_over(link)
        assert len((await claim.claim_batch(10))[0]) == 1
        later = await put(db, queue="new")
        assert seconds_to(claim.next_poll) < SOON
        assert await drain(claim) == later

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_hint_costs_nothing_while_a_lane_is_drained(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 50)
        claim = claim_over(link)
        await claim.claim_batch(5)
        assert link.statements == 3, "expire, lanes, claim"
        look_at = claim.next_poll
        for _ in range(3):
            claim.poll_soon()
            await claim.claim_batch(5)
        assert (link.statements, claim.next_poll) == (6, look_at)

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_higher_priority_interrupts_a_drained_lane(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        await put(db, 50)
        claim = claim_over(link)
        await claim.claim_batch(5)
        assert seconds_to(claim.next_poll) == pytest.approx(10, abs=3)
        urgent = await put(db, priority=1)
        claim.next_poll = time.monotonic()  # that much later
        assert ids_of((await claim.claim_batch(5))[0]) == urgent

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_task_before_the_floor_waits_for_the_next_poll(dsn: str) -> None:
    """Claims start at the floor of their lane: index entries before it are mostly dead, and only polls read them."""

    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 6)
        claim = claim_over(link)
        assert ids_of((await claim.claim_batch(2))[0]) == ids[:2]
        older = await put(db, due=-5000)
        assert ids_of((await claim.claim_batch(2))[0]) == ids[2:4]
        claim.next_poll = time.monotonic()
        assert ids_of((await claim.claim_batch(2))[0]) == [*older, ids[4]]

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_tasks_of_one_moment_are_all_claimed(dsn: str) -> None:
    """The floor is a time, and includes it."""

    async def scenario(link: Link, db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step, wakeup_at) SELECT '{}', now() FROM generate_series(1, 9)")
        claim = claim_over(link)
        claimed = [ids_of((await claim.claim_batch(4))[0]) for _ in range(3)]
        assert [len(ids) for ids in claimed] == [4, 4, 1]

    play(dsn, scenario)


class Slow(Link):
    """A link to a server that reports that its polls took `took` seconds, one after the other, except for portions."""

    took: list[float]

    async def once(self, name: str, *args: Any, deadline: float = 35.0) -> list[Any]:
        rows = await super().once(name, *args, deadline=deadline)
        if name != "lanes" or args[1] > float("-inf"):
            return rows
        took = self.took.pop(0)
        return [(*row[:4], took, row[5]) for row in rows]


def test_slow_polls_get_rarer(dsn: str) -> None:
    """Those that read all are followed by polls that start at the floors, and these get rarer if they are slow too."""

    async def main() -> None:
        async with linked(dsn) as (_, db):
            await put(db, 5)
            link = Slow(dsn, "claimer")
            link.took = [0.5, 0.6, 0.7, 0.5, 0.005]
            claim = claim_over(link)
            try:
                for _ in range(3):  # one alone may have waited for something
                    await claim.poll_lanes()
                    assert seconds_to(claim.next_poll) <= module.POLL_INTERVAL
                await claim.poll_lanes()
                assert wait_of(claim) == pytest.approx(module.POLL_SHARE * 0.5)
                claim.poll_in(0)
                assert wait_of(claim) == pytest.approx(0.5)
                await claim.poll_lanes()
                assert seconds_to(claim.next_poll) <= module.POLL_INTERVAL
            finally:
                await link.close()

    run(main())


def test_locked_lane_does_not_wait_for_the_rare_poll(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (_, db):
            await put(db, 1)
            link = Slow(dsn, "claimer")
            link.took = [3.0] * 4
            claim = claim_over(link)
            try:
                for _ in range(4):
                    await claim.poll_lanes()
                assert seconds_to(claim.next_poll) > 50
                async with db.transaction():
                    await db.execute("SELECT FROM pg_task FOR UPDATE")
                    assert (await claim.claim_batch(5))[0] == []
                assert seconds_to(claim.next_poll) <= module.MAX_POLL_TIME
            finally:
                await link.close()

    run(main())


def test_server_measures_the_time_of_a_poll(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await put(db, 5)
            for queues in (None, ["default"]):
                (row,) = await link.run("lanes", *lane_parameters(queues))
                assert 0 < row[4] < 60

    run(main())


def test_poll_delayed_by_own_steps_is_not_slow(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (_, db):
            await put(db, 5)
            link = HeldUp(dsn, "claimer")
            claim = claim_over(link)
            try:
                for _ in range(2):
                    link.on, link.meanwhile = "lanes", lambda: asyncio.sleep(0.1)
                    await claim.poll_lanes()
                assert seconds_to(claim.next_poll) <= module.POLL_INTERVAL
            finally:
                await link.close()

    run(main())


def test_poll_delayed_by_an_outage_is_not_slow(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            await put(db, 5)
            claim = claim_over(link)
            await claim.poll_lanes()
            line.swallow()
            await claim.poll_lanes()
            assert line.cut == 1
            assert seconds_to(claim.next_poll) <= module.POLL_INTERVAL

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
def test_hint_during_a_poll_is_not_lost(dsn: str, on: str) -> None:
    """The task was committed after the poll began, and its notification overtook the answer."""

    async def main() -> None:
        async with linked(dsn) as (_, db):
            link = HeldUp(dsn, "claimer")
            claim = claim_over(link)
            if on == "claim":
                await put(db)
            arrived: list[UUID] = []

            async def arrive() -> None:
                arrived.extend(await put(db))
                claim.poll_soon()

            link.on, link.meanwhile = on, arrive
            first = ids_of((await claim.claim_batch(10))[0])
            found = first + await drain(claim)
            await link.close()
            assert link.meanwhile is None
            assert set(found) >= set(arrived)

    run(main())


def test_task_put_off_by_this_worker_is_polled_in_time(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        claim = claim_over(link, poll=20)
        await claim.claim_batch(10)
        for delay, poll_in, due_in in ((40, 20, 40), (10, 10, 10), (15, 10, 10)):
            claim.poll_in(delay)
            assert seconds_to(claim.next_poll) == pytest.approx(poll_in, abs=3)
            assert seconds_to(claim.next_due) == pytest.approx(due_in, abs=3)

    play(dsn, scenario)


@pytest.mark.usefixtures("unhurried")
def test_locked_row_is_claimed_again_soon(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 2)
        claim = claim_over(link)
        async with db.transaction():
            await db.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", ids[0])
            assert ids_of((await claim.claim_batch(10))[0]) == ids[1:]
            assert (await claim.claim_batch(10))[0] == []
            assert not claim.may_find_tasks
            assert seconds_to(claim.next_poll) == pytest.approx(10, abs=3)
        claim.next_poll = time.monotonic()
        assert ids_of((await claim.claim_batch(10))[0]) == ids[:1]

    play(dsn, scenario)


# --- leases that have ended


def test_expired_lease_is_freed_and_its_crash_counted(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ended, held = await put(db, 3), await put(db, 2)
        await lease(db, ended, ends=-0.001)
        await lease(db, held, ends=50)
        rows, _, _ = await claim_over(link).claim_batch(10)
        assert [(row[0], row[3]) for row in rows] == [(id, 2) for id in ended]

    with caplog.at_level(logging.WARNING, "pgtask.claim"):
        play(dsn, scenario)
    assert [str(record.msg) for record in caplog.records] == ["lease.expired tasks=3"]


def test_expired_lease_with_locked_row_blocks_no_other(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 2)
        await lease(db, ids, ends=-5)
        claim = claim_over(link)
        async with db.transaction():
            await db.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", ids[0])
            assert ids_of((await claim.claim_batch(10))[0]) == ids[1:]
        assert await db.fetchval("SELECT lock_expires_at < now() FROM pg_task WHERE id = $1", ids[0])

    play(dsn, scenario)


def test_poll_follows_the_end_of_the_next_lease(dsn: str) -> None:
    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db)
        await lease(db, ids, ends=0.2)
        claim = claim_over(link, poll=20)
        rows: list[Any] = []
        while not rows:
            await asyncio.sleep(max(0.0, seconds_to(claim.next_poll)))  # as the worker does
            rows, _, _ = await claim.claim_batch(10)
        assert ids_of(rows) == ids
        assert await db.fetchval("SELECT locked_by IS NOT NULL AND claims = 2 FROM pg_task")
        assert link.statements <= 5, "expire, lanes; then expire, lanes, claim"

    play(dsn, scenario)


def test_longer_leases_do_not_delay_the_poll(dsn: str) -> None:
    """A lease that starts right after this poll may end within one lease time."""

    async def scenario(link: Link, db: Any) -> None:
        await lease(db, await put(db), ends=5000)
        claim = claim_over(link, lease_timeout=0.6)
        await claim.claim_batch(10)
        assert seconds_to(claim.next_poll) <= 0.3

    play(dsn, scenario)


def test_leases_that_end_together_are_freed_together(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep comes a while after the first end, so the leases of a lost worker are divided into groups once."""
    monkeypatch.setattr(expired, "EXPIRE_DELAY", 10.0)

    async def scenario(link: Link, db: Any) -> None:
        await lease(db, await put(db, 1), ends=1)
        claim = claim_over(link)
        await claim.claim_batch(10)
        assert seconds_to(claim.expired.due_at) > 5

    assert expired.EXPIRE_DELAY >= 0.05, "the leases of one renewal end up to 30 ms apart"
    play(dsn, scenario)


def test_many_expired_leases_take_several_statements(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expired, "MAX_EXPIRED", 10)

    async def scenario(link: Link, db: Any) -> None:
        ids = await put(db, 25)
        await lease(db, ids, ends=-5)
        claim = claim_over(link)
        assert sorted(await drain(claim)) == sorted(ids)

    play(dsn, scenario)
