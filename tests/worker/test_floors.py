"""claim: what it reads where dead index entries are many, since another session keeps an old snapshot.

Costs are counted in buffers (8 KiB pages touched, a page counted each time), which do not depend on the machine.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from claim_kit import claim_over, ids_of, lease, put
from fix_database import run
from plans import literal
from sessions import linked, our_session, until, until_blocked

from pgtask._postgres.store import HOT_SETTINGS, Link, statement
from pgtask._worker import claim as claim_module
from pgtask._worker import expired, lanes, sweep
from pgtask._worker import foreign as foreign_module
from pgtask._worker.burst import Burst
from pgtask._worker.claim import Claim
from pgtask._worker.expired import ExpiredLeases
from pgtask._worker.foreign import Foreign
from pgtask._worker.sweep import Sweep

DEAD = 10_000
KINDS = {
    "lanes": ("float8", "float8", "text[]", "text[]", "smallint[]", "float8[]", "float8"),
    "expire": ("integer", "float8", "float8", "float8", "float8"),
}


class Counted(Link):
    """A link that notes the buffers that each poll reads, by a second execution, in a transaction that is undone."""

    buffers: list[tuple[str, int]]
    server: Any

    async def once(self, name: str, *args: Any, deadline: float = 35.0) -> list[Any]:
        if name in KINDS:
            self.buffers.append((name, await self._count(name, args)))
        return await super().once(name, *args, deadline=deadline)

    async def _count(self, name: str, args: tuple[Any, ...]) -> int:
        values = ", ".join(map(literal, args, KINDS[name]))
        transaction = self.server.transaction()
        await transaction.start()
        try:
            explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {name}({values})"
            ((plan,),) = (json.loads(await self.server.fetchval(explain)),)
        finally:
            await transaction.rollback()
        return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])

    def take(self, name: str) -> list[int]:
        """Return what the last polls of this kind have read, and forget it."""
        taken = [buffers for kind, buffers in self.buffers if kind == name]
        self.buffers = [(kind, buffers) for kind, buffers in self.buffers if kind != name]
        return taken


@asynccontextmanager
async def beside_dead_entries(dsn: str) -> AsyncIterator[tuple[Counted, Any]]:
    """Open a link and a session, beside a session that keeps the entries of finished tasks in both indexes."""
    async with our_session(dsn) as reader, our_session(dsn, **HOT_SETTINGS) as server, linked(dsn) as (_, db):
        await db.execute("ALTER TABLE pg_task SET (autovacuum_enabled = off)")
        await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        await put_dead(db)
        for name in KINDS:
            await server.execute(f"PREPARE {name} AS {statement(name)}")
        link = Counted(dsn, "claimer")
        link.server, link.buffers = server, []
        try:
            yield link, db
        finally:
            await link.close()


async def put_dead(db: Any, n: int = DEAD) -> None:
    """Tasks of two lanes, of the last hour, that were claimed and finished."""
    await db.execute(
        "INSERT INTO pg_task (step, wakeup_at, priority)"
        " SELECT '{}', now() - interval '1 h' + n * interval '59 min' / $1::integer, n % 2"
        " FROM generate_series(1, $1::integer) AS n",
        n,
    )
    await db.execute(
        "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = wakeup_at, claims = 1"
        " WHERE locked_by IS NULL AND claims = 0 AND wakeup_at < now() - interval '1 min'"
    )
    await db.execute("DELETE FROM pg_task WHERE lock_expires_at < now()")


def play(dsn: str, scenario: Callable[[Counted, Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with beside_dead_entries(dsn) as (link, db):
            await scenario(link, db)

    run(main())


@pytest.fixture
def without_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read no portion, so that a test sees what polls find from their floors alone."""
    monkeypatch.setattr(Sweep, "is_due", False)
    monkeypatch.setattr(ExpiredLeases, "due_at", property(lambda self: self._free_at))


@pytest.fixture(autouse=True)
def _slow_from_the_first_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any statement that reads all for slow, let no time pass between portions, and let these grow to the end: one
    poll reads them all."""
    for module in (lanes, expired, sweep):
        monkeypatch.setattr(module, "PORTION_TIME", 1e9)
    monkeypatch.setattr(lanes, "SLOW", float("-inf"))
    monkeypatch.setattr(expired, "SLOW", float("-inf"))
    monkeypatch.setattr(sweep, "SHARE", 0)
    monkeypatch.setattr(sweep, "MIN_REST", 0)
    monkeypatch.setattr(lanes, "SHARE", 0)


async def poll(claim: Claim) -> None:
    """Poll once, for leases that have ended too."""
    claim.expired.free_soon()
    await claim.poll_lanes()


async def use_floors(claim: Claim) -> None:
    """Poll until it has begun to use floors."""
    for _ in range(2):
        await poll(claim)
    assert claim._finder._sweep is not None
    assert claim.expired._sweep is not None


async def claim_all(claim: Claim) -> list[UUID]:
    ids: list[UUID] = []
    while claim._lanes:
        claim.next_poll = time.monotonic() + 60  # no poll meanwhile
        ids += ids_of((await claim.claim_batch(100))[0])
    return ids


async def cancel(dsn: str, db: Any, link: Link, act: Awaitable[Any]) -> Any:
    """Let the server cancel what `act` sends first, as its statement timeout does. Return what it returns."""
    connection = await link.open()
    await connection.execute("SET lock_timeout = 0")  # it waits for the cancel
    pid = connection.get_server_pid()
    async with our_session(dsn) as holder:
        await holder.execute("BEGIN; LOCK TABLE pg_task")
        doing = asyncio.ensure_future(act)
        await until_blocked(db, pid)
        sent = await db.fetchval("SELECT clock_timestamp()")
        assert await db.fetchval("SELECT pg_cancel_backend($1)", pid)
        over = "SELECT state = 'idle' OR query_start > $2 FROM pg_stat_activity WHERE pid = $1"
        await until(db, over, pid, sent)
        await holder.execute("ROLLBACK")
        return await doing


async def claim_within_a_sweep(claim: Claim) -> list[UUID]:
    """Poll, which reads a whole sweep here, and claim."""
    await poll(claim)
    return await claim_all(claim)


def test_polls_read_a_bounded_number_of_entries(dsn: str) -> None:
    async def scenario(link: Counted, db: Any) -> None:
        ids = await put(db, 3, due=-5)
        await put(db, 3, due=-5, queue="other")
        claim = claim_over(link)
        await poll(claim)
        whole = link.take("lanes")[0], link.take("expire")[0]
        assert min(whole) > DEAD / 20, "there are no dead entries to read"
        await poll(claim)
        link.buffers.clear()
        await poll(claim)
        front = link.take("lanes")[0], link.take("expire")[0]
        assert max(front) < DEAD / 100, "older servers read the index, and no row"
        if (await link.open()).get_server_version() >= (18,):
            assert max(front) < 40
        assert set(await claim_all(claim)) > set(ids)

    play(dsn, scenario)


def test_portion_of_a_sweep_reads_few_entries(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its span grows no further once a portion takes long."""
    monkeypatch.setattr(sweep, "PORTION_TIME", -1.0)
    for module in (lanes, expired):  # one a poll
        monkeypatch.setattr(module, "PORTION_TIME", 1e-9)

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        link.buffers.clear()
        for _ in range(20):
            await poll(claim)
        assert max(link.take("lanes")) < DEAD / 100
        assert max(link.take("expire")) < DEAD / 100

    play(dsn, scenario)


def test_task_behind_the_floor_is_found_by_the_sweep(dsn: str) -> None:
    """Of a known lane, and of one that has held nothing before."""

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        assert await claim_all(claim) == []
        for priority in (0, 9):
            old = await put(db, due=-1800, priority=priority)
            assert await claim_within_a_sweep(claim) == old
        oldest = await put(db)
        await db.execute("UPDATE pg_task SET wakeup_at = '-infinity' WHERE id = $1", oldest[0])
        assert await claim_within_a_sweep(claim) == oldest

    play(dsn, scenario)


@pytest.mark.parametrize("at", ["now() - interval '50 min'", "'-infinity'"])
def test_claim_of_a_task_behind_the_floor_stops_there(dsn: str, at: str) -> None:
    """It does not read the dead entries up to the floor."""

    async def scenario(link: Counted, db: Any) -> None:
        recent = await put(db, 3, due=-5)
        claim = claim_over(link)
        await use_floors(claim)
        old = await put(db)
        await db.execute(f"UPDATE pg_task SET wakeup_at = {at} WHERE id = $1", old[0])
        sent: list[tuple[str, Any]] = []
        once = link.once

        async def note(name: str, *args: Any, deadline: float = 35.0) -> list[Any]:
            sent.append((name, args[-1]))
            return await once(name, *args, deadline=deadline)

        link.once = note  # type: ignore[method-assign]
        assert await claim_within_a_sweep(claim) == old + recent or old + recent == await claim_all(claim)
        names = [name for name, _ in sent if name.startswith("claim")]
        assert "claim_known" in names
        until = next(until for name, until in sent if name == "claim_known")
        assert until < time.time() - 60

    play(dsn, scenario)


def test_locked_task_behind_the_floor_hides_no_other(dsn: str) -> None:
    """Each portion of a sweep may find one, and each is offered to claims."""

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        locked = await put(db, due=-3000)
        free = await put(db, due=-200) + await put(db, due=-20)
        async with our_session(dsn) as holder:
            await holder.execute("BEGIN")
            await holder.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", locked[0])
            assert set(await claim_within_a_sweep(claim)) == set(free)
            await holder.execute("ROLLBACK")
        assert await claim_within_a_sweep(claim) == locked

    play(dsn, scenario)


def test_lane_is_not_due_for_a_locked_task_that_is_gone(dsn: str) -> None:
    """A sweep forgets what it does not find again."""

    async def scenario(link: Counted, db: Any) -> None:
        locked, *_ = await put(db, 20, due=-10)
        claim = claim_over(link)
        await use_floors(claim)
        async with our_session(dsn) as holder:
            await holder.execute("BEGIN")
            await holder.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", locked)
            assert len((await claim.claim_batch(10))[0]) == 10
            await poll(claim)
            await holder.execute("DELETE FROM pg_task; COMMIT")
        await poll(claim)
        assert not claim._lanes

    play(dsn, scenario)


def claim_mixed(link: Link) -> Claim:
    """A claim that has met tasks of other apps in the default lane."""
    claim = claim_over(link, families=("Web",))
    assert claim.foreign is not None
    claim.foreign.remember_claim(UUID(int=1), "default", 0)
    claim.foreign.mark_lane(UUID(int=1))
    return claim


def test_task_behind_the_floor_of_a_mixed_lane_is_found(dsn: str) -> None:
    """Each of them, and the lane is not due any more after the last."""

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_mixed(link)
        await use_floors(claim)
        for due in (-3000, -200, -20):
            old = await put(db, due=due)
            assert await claim_within_a_sweep(claim) == old
            await db.execute("DELETE FROM pg_task")
        await poll(claim)
        assert not claim._lanes

    play(dsn, scenario)


@pytest.mark.parametrize("seconds", [60.0, 0.0], ids=["in one poll", "in many polls"])
def test_own_task_behind_the_floor_is_found_among_foreign_ones(
    dsn: str, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Each search reads a few of them."""
    monkeypatch.setattr(foreign_module, "READ_LIMIT", 3)
    monkeypatch.setattr(claim_module, "READ_LIMIT", 3)
    monkeypatch.setattr(foreign_module, "MAX_SEARCH_TIME", seconds)

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_mixed(link)
        await use_floors(claim)
        others = await put(db, 20, due=-3000)
        await db.execute('UPDATE pg_task SET step = \'{"Other":{"Step":null}}\' WHERE id = ANY ($1)', others)
        ours = await put(db, due=-2900)
        for _ in range(1 if seconds else 30):
            if found := await claim_within_a_sweep(claim):
                break
        assert found == ours
        await db.execute("DELETE FROM pg_task WHERE id = $1", ours[0])
        await claim.poll_lanes(is_complete=True)
        assert not claim._lanes, "no task there is ours"

    play(dsn, scenario)


@pytest.mark.usefixtures("without_sweeps")
@pytest.mark.parametrize("is_mixed", [False, True], ids=["in a lane of ours", "in a mixed lane"])
def test_burst_does_not_end_before_a_complete_sweep(dsn: str, is_mixed: bool) -> None:
    """And it ends then."""

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_mixed(link) if is_mixed else claim_over(link)
        burst = Burst(link, claim, names=None, foreign=None, queues=(), horizon=0.0)
        await use_floors(claim)
        old = await put(db, due=-1800)
        claim.next_poll = time.monotonic() + 60
        assert await burst.check_end()
        assert not burst.is_over
        assert await claim_all(claim) == old
        await db.execute("DELETE FROM pg_task")
        await poll(claim)
        claim.next_poll = time.monotonic() + 60
        assert await burst.check_end()
        assert burst.is_over

    play(dsn, scenario)


def test_floors_are_given_up_where_reading_all_is_fast(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        monkeypatch.setattr(lanes, "SLOW", 1e9)
        monkeypatch.setattr(expired, "SLOW", 1e9)
        await poll(claim)
        assert claim._finder._sweep is None
        assert claim.expired._sweep is None
        old = await put(db, due=-1800)
        await poll(claim)
        assert await claim_all(claim) == old

    play(dsn, scenario)


@pytest.mark.usefixtures("without_sweeps")
def test_new_task_is_found_from_the_floors(dsn: str) -> None:
    """In a lane that the worker knows, in one that it does not know, and one that is due later."""

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        for lane in ({}, {"priority": 7}, {"queue": "new"}, {}):
            new = await put(db, due=-0.01, **lane)
            await poll(claim)
            assert await claim_all(claim) == new
        await put(db, due=25, queue="later")
        await poll(claim)
        assert claim.next_due is not None
        assert 15 < claim.next_due - time.monotonic() < 26

    play(dsn, scenario)


@pytest.mark.usefixtures("without_sweeps")
def test_released_task_is_found_after_its_notification(dsn: str) -> None:
    """A poll after a notification reads as far back as a short time allows."""

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        released = await put(db, due=-30)
        for _ in range(12):
            claim.poll_soon()
            await poll(claim)
            if claim._lanes:
                break
        assert await claim_all(claim) == released

    play(dsn, scenario)


@pytest.mark.usefixtures("without_sweeps")
def test_locked_task_does_not_hold_up_its_lane(dsn: str) -> None:
    """Claims go on where they were, past the dead entries behind it; and the task is claimed once it is free."""

    async def scenario(link: Counted, db: Any) -> None:
        locked, *others = await put(db, 20, due=-10)
        claim = claim_over(link)
        await use_floors(claim)
        async with our_session(dsn) as holder:
            await holder.execute("BEGIN")
            await holder.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", locked)
            assert ids_of((await claim.claim_batch(10))[0]) == others[:10]
            await poll(claim)
            single, front = claim._lanes
            assert single.until - single.floor < 0.001, "one claim tries that task alone"
            ninth, tenth = [
                await db.fetchval("SELECT extract(epoch FROM wakeup_at)::float8 FROM pg_task WHERE id = $1", id)
                for id in others[8:10]
            ]
            assert ninth < front.floor < tenth
            assert await claim_all(claim) == others[10:]
            await holder.execute("ROLLBACK")
        await poll(claim)
        assert await claim_all(claim) == [locked]

    play(dsn, scenario)


def test_lease_that_was_locked_is_freed_by_the_sweep(dsn: str) -> None:
    async def scenario(link: Counted, db: Any) -> None:
        ids = await put(db)
        await lease(db, ids, ends=-1000)
        claim = claim_over(link)
        async with our_session(dsn) as holder:
            await holder.execute("BEGIN; SELECT FROM pg_task FOR UPDATE")
            await use_floors(claim)
            assert claim.expired._sweep is not None
            await claim.expired.free()
            await holder.execute("ROLLBACK")
        await claim.expired.free()
        assert await db.fetchval("SELECT locked_by IS NULL FROM pg_task")

    play(dsn, scenario)


SLOW_TRIGGER = """
    CREATE FUNCTION cancel() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (SELECT count(*) FROM changed) > {most} THEN
            RAISE EXCEPTION USING ERRCODE = 'query_canceled';
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER slow AFTER UPDATE ON pg_task REFERENCING NEW TABLE AS changed EXECUTE FUNCTION cancel();
"""


@pytest.mark.parametrize("is_behind", [False, True], ids=["from the beginning", "in a portion"])
def test_expiry_that_the_server_cancels_frees_fewer(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_behind: bool
) -> None:
    """It is not taken for one that reads too much."""
    if not is_behind:
        monkeypatch.setattr(expired, "SLOW", 1e9)

    async def main() -> None:
        async with linked(dsn) as (link, db):
            leases = ExpiredLeases(link, 60.0)
            if is_behind:
                for _ in range(2):
                    leases.free_soon()
                    await leases.free()
                assert leases._sweep is not None
            await lease(db, await put(db, 20), ends=-1000)
            await db.execute(SLOW_TRIGGER.format(most=3))
            for _ in range(40):
                await leases.free()
                if not await db.fetchval("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL"):
                    break
            else:
                pytest.fail("some leases are still there")
            assert (leases._sweep is not None) == is_behind

    run(main())
    assert "expire.slow" not in caplog.text


def test_expiry_that_the_server_cancels_for_one_lease_passes_it(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """Others are freed, behind the floor and above it."""

    async def main() -> None:
        async with linked(dsn) as (link, db):
            leases = ExpiredLeases(link, 60.0)
            await lease(db, await put(db), ends=-1000)
            await db.execute(SLOW_TRIGGER.format(most=0))
            for _ in range(9):
                await leases.free()
            assert leases._sweep is not None
            await db.execute("DROP TRIGGER slow ON pg_task")
            await lease(db, await put(db, 3), ends=-1)
            for _ in range(9):
                leases.free_soon()
                await leases.free()
            assert not await db.fetchval("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL")

    run(main())
    assert caplog.text.count("expire.slow") == 1


@pytest.mark.usefixtures("without_sweeps")
def test_lease_is_freed_from_the_floor_when_it_ends(dsn: str) -> None:
    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        ids = await put(db)
        await lease(db, ids, ends=0.0)
        await poll(claim)
        assert await claim_within_a_sweep(claim) == ids

    play(dsn, scenario)


@pytest.mark.usefixtures("without_sweeps")
def test_third_loss_reads_a_bounded_number_of_entries(dsn: str) -> None:
    """The search for another third loss does not begin at the beginning."""

    async def scenario(link: Counted, db: Any) -> None:
        claim = claim_over(link)
        await use_floors(claim)
        whole = link.take("expire")[0]
        ids = await put(db)
        await lease(db, ids, ends=0.0)
        await db.execute("UPDATE pg_task SET claims = 3 WHERE id = ANY ($1)", ids)
        await poll(claim)
        assert await db.fetchval("SELECT claims FROM pg_task WHERE locked_by IS NULL") == 3
        assert link.take("expire")[0] < whole / 3

    play(dsn, scenario)


@pytest.mark.usefixtures("without_sweeps")
def test_end_of_the_next_lease_is_known_from_the_floor(dsn: str) -> None:
    async def scenario(link: Counted, db: Any) -> None:
        first, second = await put(db, 2)
        await lease(db, [first], ends=15)
        await lease(db, [second], ends=25)
        claim = claim_over(link)
        await use_floors(claim)
        for ends in (15, 25):
            await poll(claim)
            assert ends - 10 < claim.expired.due_at - time.monotonic() < ends + 0.2
            await db.execute("DELETE FROM pg_task WHERE id = $1", first)

    play(dsn, scenario)


FAKE_CLOCK = """
    CREATE SCHEMA fake;
    CREATE TABLE fake.clock (shift interval);
    INSERT INTO fake.clock VALUES ('0');
    CREATE FUNCTION fake.now() RETURNS timestamptz STABLE LANGUAGE sql
        AS 'SELECT pg_catalog.now() + shift FROM fake.clock';
    ALTER DATABASE "{}" SET search_path = fake, pg_catalog, public;
"""


@pytest.mark.usefixtures("without_sweeps")
@pytest.mark.parametrize("shift", [-3600, 3600])
def test_clock_that_jumps_hides_no_task_and_no_lease(dsn: str, shift: int) -> None:
    """That of the server, as after a failover."""

    async def main() -> None:
        async with our_session(dsn) as db:
            await db.execute(FAKE_CLOCK.format(await db.fetchval("SELECT current_database()")))
        try:
            async with beside_dead_entries(dsn) as (link, db):
                claim = claim_over(link)
                await use_floors(claim)
                held = await put(db, due=0)
                await lease(db, held, ends=min(shift, shift / 2))
                await db.execute("UPDATE fake.clock SET shift = make_interval(secs => $1)", float(shift))
                new = await put(db, due=0)
                await poll(claim)
                assert set(await claim_all(claim)) == {*held, *new}
        finally:
            async with our_session(dsn) as db:
                await db.execute(f'ALTER DATABASE "{await db.fetchval("SELECT current_database()")}" RESET search_path')

    run(main())


@pytest.mark.usefixtures("without_sweeps")
def test_poll_that_the_server_cancels_is_not_repeated(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, and the next polls start at floors."""

    async def main() -> None:
        async with linked(dsn) as (link, db):
            claim = claim_over(link)
            claim.expired._limit = 1
            await cancel(dsn, db, link, claim.expired.free())
            assert claim.expired._sweep is not None
            await cancel(dsn, db, link, claim._finder.poll(is_hinted=False, is_complete=False))
            assert claim._finder._sweep is not None
            new = await put(db, due=-1)
            for _ in range(3):
                await claim._finder.poll(is_hinted=False, is_complete=False)
            await poll(claim)
            assert await claim_all(claim) == new

    run(main())
    assert [str(record.msg).split()[0] for record in caplog.records if "slow" in str(record.msg)] == [
        "expire.slow",
        "poll.slow",
    ]
    assert caplog.text.count("took too long and was cancelled; perhaps") == 2


def test_search_that_the_server_cancels_is_not_repeated(dsn: str) -> None:
    """For our first task among those of other apps: it goes on with what falls due from then on."""

    async def main() -> None:
        async with linked(dsn) as (link, db):
            foreign = Foreign(link, ["Web"])
            foreign.remember_claim(UUID(int=1), "default", 0)
            foreign.mark_lane(UUID(int=1))
            await put(db, due=-1000)
            now = await db.fetchval("SELECT extract(epoch FROM now())::float8")
            found, _ = await cancel(dsn, db, link, foreign.find_known("default", 0, now - 2000, now, is_complete=False))
            assert found.first is None
            assert found.again_at > time.monotonic() + 60
            await put(db, due=0)
            await until(db, "SELECT max(wakeup_at) < now() FROM pg_task")
            found, _ = await foreign.find_known("default", 0, now - 2000, now, is_complete=False)
            assert found.first is not None
            assert found.first >= now

    run(main())


@pytest.mark.usefixtures("without_sweeps")
def test_poll_from_floors_that_is_cancelled_passes_them(dsn: str) -> None:
    """It claims from the last floors, and the next poll begins where claims have come."""

    async def scenario(link: Counted, db: Any) -> None:
        await put(db, 20, due=-1500)
        claim = claim_over(link)
        await use_floors(claim)
        claimed = ids_of((await claim.claim_batch(10))[0])
        claim.expired._free_at = time.monotonic() + 60
        parameters: list[tuple[Any, ...]] = []

        async def read(sent: tuple[Any, ...]) -> None:
            parameters.append(sent)

        read_before = claim._finder._read
        claim._finder._read = read  # type: ignore[assignment]
        await claim.poll_lanes()
        claimed += await claim_all(claim)
        assert len(claimed) == 20
        await claim.poll_lanes()
        (before,), (after,) = (sent[5][:1] for sent in parameters)
        assert after > before
        claim._finder._read = read_before  # type: ignore[method-assign]
        new = await put(db, due=-0.01)
        await claim.poll_lanes()
        assert await claim_all(claim) == new

    play(dsn, scenario)
