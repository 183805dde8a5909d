"""flush: outcomes of a batch reach their rows, or are dropped because the lease was lost; one that the database refuses
does not hold up the others; and to write a batch twice does no harm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from conftest import _fresh_database, run
from test_connection import Line, until_blocked

from pgtask._fastpath import Lease, Leases, Outcomes
from pgtask._postgres import store
from pgtask._postgres.store import Link, statement
from pgtask._worker import flush as module
from pgtask._worker.flush import Flush

STEP, NEXT = '{"T":{"First":null}}', '{"T":{"Second":{"n":1}}}'
LEASE = 60.0

GUARDS = "DROP TRIGGER IF EXISTS guard ON pg_task; ALTER TABLE pg_task DROP CONSTRAINT IF EXISTS guard"


# --- tools ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(cluster: str, template: str) -> Iterator[str]:
    yield from _fresh_database(cluster, template)


@pytest.fixture
def dsn(database: str) -> str:
    """One database for this module, emptied before each test."""

    async def empty() -> None:
        db = await asyncpg.connect(database)
        await db.execute(f"{GUARDS}; DELETE FROM pg_task")
        await db.close()

    asyncio.run(empty())
    return database


class Bench:
    """A flush with its link and leases, and a connection of our own to look and to meddle with."""

    def __init__(self, dsn: str, db: Any) -> None:
        self.db = db
        self.link = Link(dsn, "flusher")
        self.leases = Leases()
        self.flush = Flush(self.link, self.leases)

    async def take(self, n: int) -> list[Lease]:
        """Enqueue and claim so many tasks."""
        await self.db.execute(
            "INSERT INTO pg_task (step, wakeup_at) SELECT $2, now() - make_interval(secs => $1 - n)"
            " FROM generate_series(1, $1) AS n",
            n, STEP,
        )  # fmt: skip
        token = uuid4()
        rows = await self.db.fetch(statement("claim"), "default", 0, n, token, LEASE, 1000, 0.0)
        leases, _ = self.leases.claimed(rows, token, 0.0)
        assert len(leases) == n
        return leases

    async def steal(self, *leases: Lease) -> None:
        """Others take these tasks over."""
        query = "UPDATE pg_task SET locked_by = gen_random_uuid(), claims = claims + 1 WHERE id = ANY ($1)"
        await self.db.execute(query, [lease.id for lease in leases])

    async def row(self, lease: Lease) -> Any:
        return await self.db.fetchrow("SELECT *, wakeup_at - updated_at AS delay FROM pg_task WHERE id = $1", lease.id)

    async def rows(self) -> list[Any]:
        rows: list[Any] = await self.db.fetch("SELECT * FROM pg_task ORDER BY id")
        return rows


@asynccontextmanager
async def asyncpg_connection(dsn: str) -> AsyncIterator[Any]:
    db = await asyncpg.connect(dsn)
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def bench(dsn: str, through: str | None = None) -> AsyncIterator[Bench]:
    async with asyncpg_connection(dsn) as db:
        made = Bench(through or dsn, db)
        try:
            yield made
        finally:
            await made.link.close()


def add(outcomes: Outcomes, lease: Lease, kind: str) -> None:
    match kind:
        case "done":
            outcomes.add_done(lease)
        case "kept":
            outcomes.add_kept(lease, NEXT)
        case "next":
            outcomes.add_moved(lease, NEXT, 0, None, 5.0, "other", 7)
        case "retry":
            outcomes.add_moved(lease, None, lease.tried + 1, None, 5.0)
        case "park":
            outcomes.add_moved(lease, None, lease.tried + 1, "broken", 0.0)
        case "put back":
            outcomes.add_moved(lease, None, None, None, 30.0)
        case "interrupted":
            outcomes.add_moved(lease, None, None, None, 1.0, None, None, lease.claims)


KINDS = ("done", "kept", "next", "retry", "park", "put back", "interrupted")
WRITTEN: dict[str, dict[str, Any]] = {
    "kept": {"step": NEXT, "tried": 0, "claims": 1, "error": None, "queue": "default", "priority": 0},
    "next": {"step": NEXT, "tried": 0, "claims": 0, "error": None, "queue": "other", "priority": 7, "delay": 5},
    "retry": {"step": STEP, "tried": 4, "claims": 0, "error": None, "queue": "default", "priority": 0, "delay": 5},
    "park": {"step": STEP, "tried": 4, "claims": 0, "error": "broken", "queue": "default", "priority": 0, "delay": 0},
    "put back": {"step": STEP, "tried": 3, "claims": 0, "error": None, "delay": 30},
    "interrupted": {"step": STEP, "tried": 3, "claims": 1, "error": None, "delay": 1},
}


async def check_written(bench: Bench, lease: Lease, kind: str) -> None:
    row = await bench.row(lease)
    if kind == "done":
        assert row is None
        return
    found = {name: row[name] for name in WRITTEN[kind] if name != "delay"}
    if "delay" in WRITTEN[kind]:
        found["delay"] = row["delay"].total_seconds()
    assert found == WRITTEN[kind]
    assert (row["locked_by"], row["lock_expires_at"] is None) == (
        (lease.token, False) if kind == "kept" else (None, True)
    )
    assert row["updated_at"] > row["created_at"]


# --- what is written -----------------------------------------------------------------------------------------


def test_every_kind_of_outcome_in_one_batch(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = dict(zip(KINDS, await at.take(len(KINDS)), strict=True))
            await at.db.execute("UPDATE pg_task SET tried = 3, claims = 3")
            bystander = (await at.take(1))[0]
            before = await at.row(bystander)
            outcomes = Outcomes()
            for kind, lease in leases.items():
                add(outcomes, lease, kind)
            # What is added to a lease's tried is the dispatcher's business; here it was claimed with 0.
            outcomes.moved_tried[:] = [4 if tried == 1 else tried for tried in outcomes.moved_tried]
            assert await at.flush.flush(outcomes) == [leases["kept"]]
            for kind, lease in leases.items():
                await check_written(at, lease, kind)
            assert await at.row(bystander) == before
            assert (at.flush.done, at.flush.parked, at.flush.lost) == (1, 1, 0)
            assert len(at.leases) == 2
            assert at.leases.get(leases["kept"].id) is leases["kept"]
            assert at.leases.get(bystander.id) is bystander
            assert at.link.statements == 1

    run(main())


def test_only_a_move_to_another_lane_tells_the_others(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            heard: list[str] = []
            ended = asyncio.Event()

            def hear(_db: Any, _pid: int, _channel: str, payload: str) -> None:
                heard.append(payload)
                if payload == "end":
                    ended.set()

            leases = await at.take(len(KINDS))
            await at.db.add_listener("pg_task_changed", hear)
            for kind, lease in zip(KINDS, leases, strict=True):
                outcomes = Outcomes()
                add(outcomes, lease, kind)
                await at.flush.flush(outcomes)
                await at.db.execute("SELECT pg_notify('pg_task_changed', $1)", kind)
            await at.db.execute("NOTIFY pg_task_changed, 'end'")
            await ended.wait()
            assert heard == ["done", "kept", "", *KINDS[2:], "end"]
            await at.db.remove_listener("pg_task_changed", hear)

    run(main())


def test_a_large_batch_is_one_statement(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(2100)
            outcomes = Outcomes()
            for n, lease in enumerate(leases):
                add(outcomes, lease, ("done", "kept", "retry")[n % 3])
            kept = await at.flush.flush(outcomes)
            assert kept == leases[1::3]
            assert at.link.statements == 1
            query = "SELECT count(*), count(locked_by), sum(tried) FROM pg_task"
            assert tuple(await at.db.fetchrow(query)) == (1400, 700, 700)
            assert (at.flush.done, at.flush.lost, len(at.leases)) == (700, 0, 700)

    run(main())


def test_a_lease_that_has_ended_but_was_not_taken_over_still_counts(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(3)
            await at.db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 hour'")
            outcomes = Outcomes()
            for kind, lease in zip(("done", "kept", "retry"), leases, strict=True):
                add(outcomes, lease, kind)
            assert await at.flush.flush(outcomes) == [leases[1]]
            assert at.flush.lost == 0
            assert len(await at.rows()) == 2

    run(main())


# --- lost leases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["taken over", "freed", "deleted"])
def test_outcomes_of_lost_leases_are_dropped_and_counted(dsn: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[Lease]:
        async with bench(dsn) as at:
            good, lost = await at.take(len(KINDS)), await at.take(len(KINDS))
            await at.db.execute("UPDATE pg_task SET tried = 3")
            ids = [lease.id for lease in lost]
            if how == "taken over":
                await at.steal(*lost)
            elif how == "freed":
                free = "UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL WHERE id = ANY ($1)"
                await at.db.execute(free, ids)
            else:
                await at.db.execute("DELETE FROM pg_task WHERE id = ANY ($1)", ids)
            before = await at.db.fetch("SELECT ctid, * FROM pg_task WHERE id = ANY ($1)", ids)
            outcomes = Outcomes()
            for kind, one, other in zip(KINDS, good, lost, strict=True):
                add(outcomes, one, kind)
                add(outcomes, other, kind)
            outcomes.moved_tried[:] = [4 if tried == 1 else tried for tried in outcomes.moved_tried]
            assert await at.flush.flush(outcomes) == [good[1]]
            for kind, lease in zip(KINDS, good, strict=True):
                await check_written(at, lease, kind)
            assert await at.db.fetch("SELECT ctid, * FROM pg_task WHERE id = ANY ($1)", ids) == before
            assert at.flush.lost == len(KINDS)
            assert len(at.leases) == 1
            return lost

    with caplog.at_level(logging.WARNING, "pgtask.flush"):
        lost = run(main())
    said = sorted(str(record.msg) for record in caplog.records)
    assert said == sorted(f'lease.lost task={x.id} step="(not decoded)" outcome=dropped' for x in lost)


@pytest.mark.parametrize("kind", KINDS)
def test_done_counts_the_ends_that_were_written(dsn: str, kind: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(5)
            await at.steal(*leases[:3])
            outcomes = Outcomes()
            for lease in leases:
                add(outcomes, lease, kind)
            await at.flush.flush(outcomes)
            assert at.flush.lost == 3
            assert (at.flush.done, at.flush.parked) == (2 * (kind == "done"), 2 * (kind == "park"))

    run(main())


def test_a_worker_cannot_write_under_its_own_older_claim(dsn: str) -> None:
    """It stalled, its lease ran out, and it claimed the very task again itself."""

    async def main() -> None:
        async with bench(dsn) as at:
            (old,) = await at.take(1)
            await at.db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 s'")
            await at.db.fetch(statement("expire"), 10)
            token = uuid4()
            rows = await at.db.fetch(statement("claim"), "default", 0, 1, token, LEASE, 1000, 0.0)
            (new,), (displaced,) = at.leases.claimed(rows, token, 1.0)
            assert displaced is old
            before = await at.rows()
            for kind in KINDS:
                outcomes = Outcomes()
                add(outcomes, old, kind)
                assert await at.flush.flush(outcomes) == []
            assert await at.rows() == before
            assert at.flush.lost == len(KINDS)
            assert at.leases.get(new.id) is new, "dropping the old lease must not drop the new one"

    run(main())


# --- refused outcomes ----------------------------------------------------------------------------------------

CHECK = "ALTER TABLE pg_task ADD CONSTRAINT guard CHECK (step NOT LIKE '%poison%')"
POISON = '{"T":{"poison":null}}'


@pytest.mark.parametrize("poisoned", [{0}, {3}, {6}, {0, 6}, {1, 2, 3}, set(range(7))], ids=str)
@pytest.mark.parametrize("kind", ["kept", "next"])
def test_a_refused_outcome_is_parked_and_the_others_are_written(dsn: str, kind: str, poisoned: set[int]) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            await at.db.execute(CHECK)
            leases, others = await at.take(7), await at.take(2)
            outcomes = Outcomes()
            outcomes.add_done(others[0])
            add(outcomes, others[1], "park")
            for n, lease in enumerate(leases):
                step = POISON if n in poisoned else NEXT
                if kind == "kept":
                    outcomes.add_kept(lease, step)
                else:
                    outcomes.add_moved(lease, step, 0, None, 0.0)
            kept = await at.flush.flush(outcomes)
            assert await at.row(others[0]) is None
            assert (await at.row(others[1]))["error"] == "broken"
            good = [lease for n, lease in enumerate(leases) if n not in poisoned]
            assert sorted(x.id for x in kept) == (sorted(x.id for x in good) if kind == "kept" else [])
            for lease in good:
                assert (await at.row(lease))["step"] == NEXT
            for n in poisoned:
                row = await at.row(leases[n])
                assert "refused by the database" in row["error"]
                assert "guard" in row["error"]
                assert (row["step"], row["tried"], row["claims"], row["locked_by"]) == (STEP, 1, 0, None)
            assert (at.flush.done, at.flush.parked, at.flush.lost) == (1, 1 + len(poisoned), 0)
            assert len(at.leases) == len(kept)

    run(main())


NUL, SURROGATE = "a\0b", "a\udc80b"
UNWRITABLE: dict[str, Any] = {
    "step with NUL": lambda outcomes, lease: outcomes.add_kept(lease, NUL),
    "step with a surrogate": lambda outcomes, lease: outcomes.add_kept(lease, SURROGATE),
    "next step with NUL": lambda outcomes, lease: outcomes.add_moved(lease, NUL, 0, None, 0.0),
    "error with NUL": lambda outcomes, lease: outcomes.add_moved(lease, None, 1, NUL, 0.0),
    "error with a surrogate": lambda outcomes, lease: outcomes.add_moved(lease, None, 1, SURROGATE, 0.0),
    "delay beyond time": lambda outcomes, lease: outcomes.add_moved(lease, None, 1, None, 8.64e13),
    "endless delay": lambda outcomes, lease: outcomes.add_moved(lease, None, 1, None, float("inf")),
    "delay that is no number": lambda outcomes, lease: outcomes.add_moved(lease, None, 1, None, float("nan")),
    "queue with NUL": lambda outcomes, lease: outcomes.add_moved(lease, None, 0, None, 0.0, NUL),
    "priority too high": lambda outcomes, lease: outcomes.add_moved(lease, None, 0, None, 0.0, None, 40_000),
    "tried too high": lambda outcomes, lease: outcomes.add_moved(lease, None, 2**31, None, 0.0),
}


@pytest.mark.parametrize("write", UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_value_that_cannot_be_written_parks_its_task_alone(
    dsn: str, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> UUID:
        async with bench(dsn) as at:
            bad, *good = await at.take(4)
            outcomes = Outcomes()
            write(outcomes, bad)
            for lease in good:
                outcomes.add_done(lease)
            assert await at.flush.flush(outcomes) == []
            (row,) = await at.rows()
            assert row["id"] == bad.id
            assert "the outcome of (not decoded) was refused by the database" in row["error"]
            assert row["locked_by"] is None
            assert (at.flush.done, at.flush.parked, at.flush.lost, len(at.leases)) == (3, 1, 0, 0)
            return bad.id

    with caplog.at_level(logging.ERROR, "pgtask.flush"):
        id = run(main())
    assert [str(record.msg).split(" step=")[0] for record in caplog.records] == [f"outcome.refused task={id}"]


GUARD = """
    CREATE OR REPLACE FUNCTION guard() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'not this one' USING ERRCODE = TG_ARGV[0]; END $$;
    CREATE TRIGGER guard BEFORE {when} ON pg_task FOR EACH ROW
        WHEN (OLD.key = 'guarded') EXECUTE FUNCTION guard('{state}')
"""


async def guarded_batch(at: Bench, when: str, state: str, kind: str) -> tuple[Lease, list[Lease], Outcomes]:
    """Seven outcomes; a trigger refuses what would be done to the row of one."""
    leases = await at.take(7)
    await at.db.execute("UPDATE pg_task SET key = 'guarded' WHERE id = $1", leases[3].id)
    await at.db.execute(GUARD.format(when=when, state=state))
    outcomes = Outcomes()
    for lease in leases:
        add(outcomes, lease, kind)
    return leases[3], leases[:3] + leases[4:], outcomes


@pytest.mark.parametrize("state", ["23001", "22000", "P0001"])
def test_a_trigger_that_refuses_an_end_parks_the_task(dsn: str, state: str) -> None:
    """P0001 is what RAISE EXCEPTION in somebody's trigger says, if it says nothing else."""

    async def main() -> None:
        async with bench(dsn) as at:
            guarded, _, outcomes = await guarded_batch(at, "DELETE", state, "done")
            await at.flush.flush(outcomes)
            (row,) = await at.rows()
            assert row["id"] == guarded.id
            assert "not this one" in row["error"]
            assert (at.flush.done, at.flush.parked, len(at.leases)) == (6, 1, 0)

    run(main())


@pytest.mark.parametrize("kind", ["done", "kept", "retry"])
def test_a_row_that_can_not_even_be_parked_holds_up_nobody(dsn: str, kind: str) -> None:
    """It stays as it is, and its lease runs out."""

    async def main() -> None:
        async with bench(dsn) as at:
            guarded, good, outcomes = await guarded_batch(at, "UPDATE OR DELETE", "23001", kind)
            kept = await at.flush.flush(outcomes)
            assert kept == (good if kind == "kept" else [])
            for lease in good:
                row = await at.row(lease)
                assert row is None if kind == "done" else row["step"] == NEXT or row["tried"] == 1
            assert at.leases.get(guarded.id) is None, "nobody would renew it, or it would be renewed for ever"
            assert (await at.row(guarded))["locked_by"] == guarded.token

    run(main())


def test_a_lease_that_was_lost_and_refused_is_lost(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            await at.db.execute(CHECK)
            lost, good = await at.take(2)
            await at.steal(lost)
            before = await at.row(lost)
            outcomes = Outcomes()
            outcomes.add_kept(lost, NUL)
            add(outcomes, good, "done")
            assert await at.flush.flush(outcomes) == []
            assert await at.row(lost) == before
            assert (at.flush.done, at.flush.lost, len(at.leases)) == (1, 1, 0)

    run(main())


# --- locked rows ---------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds instead of seconds."""
    monkeypatch.setitem(store.HOT_SETTINGS, "lock_timeout", "20ms")
    monkeypatch.setattr(module, "RETRY_LOCKED", 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("strength", ["UPDATE", "SHARE", "KEY SHARE"])
@pytest.mark.parametrize("kind", ["done", "kept", "retry"])
def test_a_row_that_somebody_has_locked_holds_up_no_other(dsn: str, kind: str, strength: str) -> None:
    """KEY SHARE is what a foreign key of a user's table takes: it hinders a DELETE alone."""

    async def main() -> None:
        async with bench(dsn) as at, asyncio.timeout(10):
            leases = await at.take(5)
            outcomes = Outcomes()
            for lease in leases:
                add(outcomes, lease, kind)
            free = leases if strength == "KEY SHARE" and kind != "done" else leases[:2] + leases[3:]
            async with at.db.transaction():
                await at.db.execute(f"SELECT FROM pg_task WHERE id = $1 FOR {strength}", leases[2].id)
                for waits in range(2):
                    kept = await (at.flush.flush_waiting() if waits else at.flush.flush(outcomes))
                    assert kept == (free if kind == "kept" and not waits else [])
                    assert len(at.flush.waiting) == 5 - len(free)
                    assert at.leases.get(leases[2].id) is (leases[2] if kind == "kept" or len(free) == 4 else None)
                for lease in free:
                    row = await at.row(lease)
                    assert row is None if kind == "done" else row["step"] == NEXT or row["tried"] == 1
            later = await at.flush.flush_waiting()
            assert later == ([leases[2]] if kind == "kept" and len(free) == 4 else [])
            row = await at.row(leases[2])
            assert row is None if kind == "done" else row["step"] == NEXT or row["tried"] == 1
            assert (len(at.flush.waiting), at.flush.lost, at.flush.done) == (0, 0, 5 if kind == "done" else 0)

    run(main())


@pytest.mark.usefixtures("impatient")
def test_a_table_that_is_locked_for_long_is_waited_out(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CREATE INDEX locks it: for writing, but not for locking rows."""
    monkeypatch.setitem(store.HOT_SETTINGS, "lock_timeout", "20ms")
    monkeypatch.setattr(store, "LONGEST_BACKOFF", 0.1)

    async def main() -> None:
        async with bench(dsn) as at, asyncpg_connection(dsn) as rival:
            (lease,) = await at.take(1)
            outcomes = Outcomes()
            add(outcomes, lease, "done")
            async with rival.transaction():
                await rival.execute("LOCK TABLE pg_task IN SHARE MODE")
                writing = asyncio.create_task(at.flush.flush(outcomes))
                while at.link.statements < 6 and not writing.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                assert not writing.done()
            await writing
            assert (at.flush.done, len(await at.rows())) == (1, 0)

    run(main())


# --- lost replies --------------------------------------------------------------------------------------------


async def one_of_each(at: Bench) -> tuple[dict[str, Lease], Outcomes]:
    leases = dict(zip(KINDS, await at.take(len(KINDS)), strict=True))
    await at.db.execute("UPDATE pg_task SET tried = 3")
    outcomes = Outcomes()
    for kind, lease in leases.items():
        add(outcomes, lease, kind)
    outcomes.moved_tried[:] = [4 if tried == 1 else tried for tried in outcomes.moved_tried]
    return leases, outcomes


def test_a_batch_whose_reply_was_lost_is_written_once(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Line(dsn) as line, bench(dsn, line.dsn) as at:
            await at.flush.flush(Outcomes())
            leases, outcomes = await one_of_each(at)
            line.swallow()
            assert await at.flush.flush(outcomes) == [leases["kept"]]
            assert line.cut == 1
            for kind, lease in leases.items():
                await check_written(at, lease, kind)
            assert (at.flush.done, at.flush.parked, at.flush.lost, len(at.leases)) == (1, 1, 0, 1)

    with caplog.at_level(logging.WARNING, "pgtask.flush"):
        run(main())
    said = [record for record in caplog.records if record.name == "pgtask.flush"]
    assert said == [], "what was written by the first attempt was not lost"


def test_a_batch_whose_backend_was_killed_is_written_by_the_next(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases, outcomes = await one_of_each(at)
            connection = await at.link.open()
            async with at.db.transaction():
                await at.db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
                flushing = asyncio.create_task(at.flush.flush(outcomes))
                await until_blocked(at.db, connection.get_server_pid())
                await at.db.execute("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
            assert await flushing == [leases["kept"]]
            for kind, lease in leases.items():
                await check_written(at, lease, kind)
            assert (at.flush.done, at.flush.parked, at.flush.lost, len(at.leases)) == (1, 1, 0, 1)

    run(main())


def test_a_task_that_went_on_elsewhere_between_two_attempts_is_left_alone(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases, outcomes = await one_of_each(at)
            connection = await at.link.open()
            async with at.db.transaction():
                await at.db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
                flushing = asyncio.create_task(at.flush.flush(outcomes))
                await until_blocked(at.db, connection.get_server_pid())
                await at.db.execute("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
                await at.steal(*leases.values())
                before = await at.rows()
            assert await flushing == []
            assert await at.rows() == before
            assert len(at.leases) == 0

    run(main())


def test_the_same_batch_again_changes_nothing(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases, outcomes = await one_of_each(at)
            await at.flush.flush(outcomes)
            before = [{**row, "updated_at": None} for row in await at.rows()]
            assert await at.flush.flush(outcomes) == [leases["kept"]]
            assert [{**row, "updated_at": None} for row in await at.rows()] == before

    run(main())


# --- giving back ---------------------------------------------------------------------------------------------


def test_released_leases_are_as_if_never_claimed(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(5)
            await at.db.execute("UPDATE pg_task SET claims = 3")
            await at.steal(*leases[3:])
            before = await at.rows()
            await at.flush.release(leases)
            held = {lease.id for lease in leases[3:]}
            for old, new in zip(before, await at.rows(), strict=True):
                if old["id"] in held:
                    assert new == old
                else:
                    changed = {"locked_by": None, "lock_expires_at": None, "claims": 2}
                    assert dict(new) == {**dict(old), **changed}
            assert len(at.leases) == 0
            assert (at.flush.done, at.flush.lost) == (0, 0)

    run(main())


def test_a_release_wakes_others_and_nothing_is_sent_for_none(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            heard = asyncio.Event()
            leases = await at.take(1)
            await at.db.add_listener("pg_task_changed", lambda *_: heard.set())
            await at.flush.release([])
            assert at.link.statements == 0
            await at.flush.release(leases)
            await heard.wait()
            await at.db.reset()

    run(main())


def test_a_release_that_is_sent_twice_counts_once(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, bench(dsn, line.dsn) as at:
            leases = await at.take(3)
            await at.db.execute("UPDATE pg_task SET claims = 2")
            await at.flush.release(leases[:1])
            line.swallow()
            await at.flush.release(leases[1:])
            assert [tuple(row)[-1] for row in await at.db.fetch("SELECT id, claims FROM pg_task")] == [1, 1, 1]

    run(main())
