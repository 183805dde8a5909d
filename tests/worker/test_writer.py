"""The writer: what is locked, too slow or refused goes aside, and holds up nothing else."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from uuid import uuid4

import pytest
from fix_database import run
from sessions import connected
from writers import Flushing, flushing

from pgtask._fastpath import Outcomes, TaskLease
from pgtask._postgres import store, writer
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.store import Link, statement
from pgtask.errors import DatabaseUnavailable, RowsLocked, StatementTimeout

NEXT = '{"T":{"Next":null}}'

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statement may take half a second, and locked rows are tried again when the test says so."""
    monkeypatch.setitem(store.HOT_SETTINGS, "statement_timeout", "500ms")
    monkeypatch.setitem(store.HOT_SETTINGS, "lock_timeout", "20ms")
    monkeypatch.setitem(writer.ASIDE_SETTINGS, "statement_timeout", "500ms")
    monkeypatch.setattr(writer, "LOCKED_RETRY", 1000.0)


SLOW = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep({seconds}); RETURN OLD; END $$;
    CREATE TRIGGER slow AFTER {when} ON pg_task FOR EACH ROW WHEN (OLD.key {which}) EXECUTE FUNCTION slow()
"""


async def take(at: Flushing, db: Any, count: int) -> list[TaskLease]:
    """Claim tasks with the keys `1` to `count`."""
    await db.execute(
        "INSERT INTO pg_task (step, key, wakeup_at) SELECT '{}', n, now() - make_interval(secs => $1 - n)"
        " FROM generate_series(1, $1) AS n",
        count,
    )
    token = uuid4()
    rows = await db.fetch(statement("claim"), "default", 0, count, token, 60.0, 1000, 0.0)
    return at.leases.add_claimed(sorted(rows, key=lambda row: row[5]), token, 0.0)[0]


def done(leases: list[TaskLease]) -> Outcomes:
    outcomes = Outcomes()
    for lease in leases:
        outcomes.add_done(lease)
    return outcomes


def test_statement_timeout_is_no_outage(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=9, when="DELETE", which="= '1'"))
            (lease,) = await take(at, db, 1)
            with pytest.raises(StatementTimeout):
                await at.link.run("flush", *done([lease]).parameters(1), raises=(StatementTimeout,))
            assert at.link.outage is None
            assert at.link.connection is not None, "the connection is as good as before"

    run(main())


def test_task_whose_row_is_too_slow_to_write_is_parked_alone(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=9, when="DELETE", which="= '5'"))
            leases = await take(at, db, 9)
            await at.write(done(leases))
            ((id, error),) = await db.fetch("SELECT id, error FROM pg_task")
            assert id == leases[4].id
            assert "it takes longer than 10 s to write" in error
            assert (at.flush.done, at.flush.parked, at.flush.blocked, len(at.leases)) == (8, 1, 0, 0)

    with caplog.at_level(logging.WARNING):
        run(main())
    assert [str(record.msg).split()[0] for record in caplog.records] == ["database.slow", "outcome.refused"]


def test_entries_beside_a_slow_one_do_not_wait_for_its_tries(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=9, when="DELETE", which="= '1'"))
            leases = await take(at, db, 8)
            await at.flush.flush(done(leases))
            settling = asyncio.create_task(at.settle())
            while at.flush.done < 7:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (at.flush.blocked, at.flush.parked) == (1, 0), "it is still being tried"
            await settling
            assert at.flush.parked == 1

    run(main())


def test_settle_waits_for_a_retry_under_way(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LOCKED_RETRY", 0.01)

    async def main() -> None:
        async with connected(dsn) as db, connected(dsn) as rival, flushing(dsn) as at:
            (lease,) = await take(at, db, 1)
            async with rival.transaction():
                await rival.execute("SELECT FROM pg_task FOR UPDATE")
                await at.flush.flush(done([lease]))
                await at.aside.settle()
                while at.aside._locked:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                settling = asyncio.create_task(at.aside.settle())
                await asyncio.sleep(0)
                assert not settling.done(), "a retry is under way"
            await settling
            await at.aside.settle()
            assert at.flush.done == 1

    run(main())


def test_parking_that_meets_a_lock_is_still_a_parking(dsn: str) -> None:
    """An outcome that is refused is parked; if that is refused too, after a lock, its lease expires."""

    async def main() -> None:
        async with connected(dsn) as db, connected(dsn) as rival, flushing(dsn) as at:
            await db.execute("ALTER TABLE pg_task ADD CHECK (error IS NULL)")
            (lease,) = await take(at, db, 1)
            outcomes = Outcomes()
            outcomes.add_continued(lease, "a\0b")
            async with rival.transaction():
                await rival.execute("SELECT FROM pg_task FOR UPDATE")
                await at.write(outcomes)
                assert at.flush.blocked == 1
            await at.settle()
            assert (at.flush.lost, at.flush.blocked, len(at.leases)) == (1, 0, 0)

    run(main())


def test_statement_that_was_never_sent_leaves_no_doubt(dsn: str) -> None:
    """A lease that was lost while the database could not be reached is lost."""

    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            (lease,) = await take(at, db, 1)
            await db.execute("UPDATE pg_task SET locked_by = gen_random_uuid()")
            opened = at.link.open
            failures = [DatabaseUnavailable("no route")]

            async def fail_first() -> Any:
                if failures:
                    raise failures.pop()
                return await opened()

            at.link.open = fail_first  # type: ignore[method-assign]
            await at.write(done([lease]))
            assert (at.flush.done, at.flush.lost) == (0, 1)

    run(main())


def test_batch_that_is_too_slow_as_a_whole_is_written_in_parts(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=0.03, when="DELETE", which="IS NOT NULL"))
            await at.write(done(await take(at, db, 40)))
            assert await db.fetchval("SELECT count(*) FROM pg_task") == 0
            assert (at.flush.done, at.flush.parked, at.flush.blocked) == (40, 0, 0)

    run(main())


@pytest.mark.faults
def test_task_that_is_too_slow_to_be_parked_too_loses_its_lease(dsn: str) -> None:
    """Its lease expires, and is not renewed until then."""

    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=9, when="DELETE OR UPDATE", which="= '1'"))
            leases = await take(at, db, 2)
            await at.write(done(leases))
            (row,) = await db.fetch("SELECT id, error, locked_by FROM pg_task")
            assert tuple(row) == (leases[0].id, None, leases[0].token)
            assert (at.flush.done, at.flush.lost, at.flush.blocked, len(at.leases)) == (1, 1, 0, 0)

    run(main())


def test_lease_that_is_too_slow_to_release_expires_alone(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=9, when="UPDATE", which="= '3'"))
            await db.execute("ALTER TABLE pg_task DISABLE TRIGGER slow")
            leases = await take(at, db, 4)
            await db.execute("ALTER TABLE pg_task ENABLE TRIGGER slow")
            await at.flush.release(leases)
            assert (at.flush.blocked, at.link.statements) == (4, 1), "the pump goes on"
            await at.settle()
            left = await db.fetch("SELECT id FROM pg_task WHERE locked_by IS NOT NULL")
            assert [row[0] for row in left] == [leases[2].id]
            assert (at.flush.blocked, at.flush.lost, len(at.leases)) == (0, 1, 0)

    run(main())


def test_slow_batch_holds_up_no_later_one(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=9, when="DELETE", which="= '1'"))
            *slow, free = await take(at, db, 8)
            await at.flush.flush(done(slow))
            await at.flush.flush(done([free]))
            assert (at.flush.done, at.flush.blocked) == (1, 7)
            await at.settle()
            assert (at.flush.done, at.flush.blocked, at.flush.parked) == (7, 0, 1)

    run(main())


LOCKS_ANOTHER = """
    CREATE TABLE another (key text PRIMARY KEY);
    INSERT INTO another VALUES ('3');
    CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM FROM another WHERE key = OLD.key FOR UPDATE; RETURN OLD; END $$;
    CREATE TRIGGER look AFTER DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION look()
"""


def test_lock_behind_a_trigger_keeps_only_its_task(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with connected(dsn) as db, connected(dsn) as rival, flushing(dsn) as at:
            await db.execute(LOCKS_ANOTHER)
            leases = await take(at, db, 7)
            async with rival.transaction():
                await rival.execute("SELECT FROM another FOR UPDATE")
                await at.write(done(leases))
                assert [row[0] for row in await db.fetch("SELECT key FROM pg_task")] == ["3"]
                assert (at.flush.done, at.flush.blocked) == (6, 1)
                await at.settle()
                assert (at.flush.done, at.flush.blocked) == (6, 1)
            await at.settle()
            assert (at.flush.done, at.flush.blocked, len(at.leases)) == (7, 0, 0)

    with caplog.at_level(logging.WARNING):
        run(main())
    assert [str(record.msg).split()[0] for record in caplog.records] == ["database.locked"]


def test_statements_are_bounded_by_their_size(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_SIZE", 10_000)

    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            leases = await take(at, db, 8)
            outcomes = Outcomes()
            for lease in leases:
                outcomes.add_continued(lease, f'{{"T":{{"Next":"{"x" * 4900}"}}}}')
            continued = await at.write(outcomes)
            assert sorted(lease.id for lease in continued) == sorted(lease.id for lease in leases)
            assert at.link.statements == 4
            outcomes = Outcomes()
            outcomes.add_continued(leases[0], f'{{"T":{{"Next":"{"x" * 49_000}"}}}}')
            assert await at.write(outcomes) == leases[:1], "one alone may be larger"

    run(main())


def test_statements_get_smaller_while_the_server_is_slow(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SLOW", 0.1)
    monkeypatch.setattr(writer, "FAST", 0.05)

    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await db.execute(SLOW.format(seconds=0.2, when="DELETE", which="= '1'"))
            leases = await take(at, db, 17)
            await at.write(done(leases[:8]))
            before = at.link.statements
            await at.write(done(leases[8:]))
            assert at.link.statements - before == 2, "nine outcomes, four at most at first, and more after a fast one"
            assert at.flush.done == 17

    run(main())


def test_nothing_is_connected_aside_before_it_is_needed(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "IDLE", 0.05)
    name = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flusher aside'"

    async def main() -> None:
        async with connected(dsn) as db, flushing(dsn) as at:
            await at.write(done(await take(at, db, 1)))
            assert await db.fetchval(name) == 0
            await db.execute("ALTER TABLE pg_task ADD CHECK (step NOT LIKE '%poison%')")
            (lease,) = await take(at, db, 1)
            outcomes = Outcomes()
            outcomes.add_continued(lease, '{"poison":null}')
            await at.write(outcomes)
            assert at.flush.parked == 1
            while await db.fetchval(name):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    run(main())


def test_pooled_statement_that_is_slow_is_no_outage(dsn: str) -> None:
    """A pooler passes no settings on: each statement brings them along."""

    async def main() -> None:
        async with connected(dsn) as db:
            link = Link(dsn, "pooled", pooled=True)
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task IN ACCESS EXCLUSIVE MODE")
                with pytest.raises(RowsLocked):
                    await link.once("lanes", *lane_parameters(None))
            assert [row[0] for row in await link.once("lanes", *lane_parameters(None))] == [None]
            assert link.outage is None
            await link.close()

    run(main())
