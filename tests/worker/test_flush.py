"""flush: the outcomes of a batch reach their rows, or are dropped because the lease was lost. An outcome that the
database refuses does not delay the others, and to write a batch twice does no harm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from claim_kit import ALL_LEASES
from fix_database import run
from proxy import Line
from sessions import connected, until_blocked
from writers import Flushing, running

from pgtask._fastpath import Outcomes, TaskLease
from pgtask._postgres import store, writer
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.store import statement
from pgtask._worker import flush as module

STEP, NEXT = '{"T":{"First":null}}', '{"T":{"Second":{"n":1}}}'
LEASE = 60.0

GUARDS = "DROP TRIGGER IF EXISTS guard ON pg_task; ALTER TABLE pg_task DROP CONSTRAINT IF EXISTS guard"

pytestmark = pytest.mark.one_database(GUARDS)


# --- tools ---------------------------------------------------------------------------------------------------


class Bench(Flushing):
    """A flush with its link and leases, and a connection of the test to read and change rows with."""

    def __init__(self, dsn: str, db: Any) -> None:
        super().__init__(dsn)
        self.db = db

    async def take(self, n: int) -> list[TaskLease]:
        """Enqueue and claim `n` tasks."""
        await self.db.execute(
            "INSERT INTO pg_task (step, wakeup_at) SELECT $2, now() - make_interval(secs => $1 - n)"
            " FROM generate_series(1, $1) AS n",
            n, STEP,
        )  # fmt: skip
        token = uuid4()
        rows = await self.db.fetch(statement("claim"), "default", 0, n, token, LEASE, 1000, 0.0)
        leases, _ = self.leases.add_claimed(rows, token, 0.0)
        assert len(leases) == n
        return leases

    async def steal(self, *leases: TaskLease) -> None:
        """Let another worker claim these tasks."""
        query = "UPDATE pg_task SET locked_by = gen_random_uuid(), claims = claims + 1 WHERE id = ANY ($1)"
        await self.db.execute(query, [lease.id for lease in leases])

    async def row(self, lease: TaskLease) -> Any:
        return await self.db.fetchrow("SELECT *, wakeup_at - updated_at AS delay FROM pg_task WHERE id = $1", lease.id)

    async def rows(self) -> list[Any]:
        rows: list[Any] = await self.db.fetch("SELECT * FROM pg_task ORDER BY id")
        return rows


@asynccontextmanager
async def bench(dsn: str, through: str | None = None) -> AsyncIterator[Bench]:
    async with connected(dsn) as db:
        made = Bench(through or dsn, db)
        async with running(made):
            yield made


def add(outcomes: Outcomes, lease: TaskLease, kind: str) -> None:
    match kind:
        case "done":
            outcomes.add_done(lease)
        case "continued":
            outcomes.add_continued(lease, NEXT)
        case "next":
            outcomes.add_rescheduled(lease, NEXT, 0, None, 5.0, "other", 7)
        case "retry":
            outcomes.add_rescheduled(lease, None, lease.tried + 1, None, 5.0)
        case "park":
            outcomes.add_rescheduled(lease, None, lease.tried + 1, "broken", 0.0)
        case "put back":
            outcomes.add_rescheduled(lease, None, None, None, 30.0)
        case "interrupted":
            outcomes.add_rescheduled(lease, None, None, None, 1.0, None, None, lease.claims)


def replace_tried(outcomes: Outcomes) -> None:
    """Count as the dispatcher would from the rows' 3 failed tries: these leases were claimed with 0."""
    rows = outcomes.rescheduled
    rows[:] = [row._replace(tried=4) if row.tried == 1 else row for row in rows]


KINDS = ("done", "continued", "next", "retry", "park", "put back", "interrupted")
WRITTEN: dict[str, dict[str, Any]] = {
    "continued": {"step": NEXT, "tried": 0, "claims": 1, "error": None, "queue": "default", "priority": 0},
    "next": {"step": NEXT, "tried": 0, "claims": 0, "error": None, "queue": "other", "priority": 7, "delay": 5},
    "retry": {"step": STEP, "tried": 4, "claims": 0, "error": None, "queue": "default", "priority": 0, "delay": 5},
    "park": {"step": STEP, "tried": 4, "claims": 0, "error": "broken", "queue": "default", "priority": 0, "delay": 0},
    "put back": {"step": STEP, "tried": 3, "claims": 0, "error": None, "delay": 30},
    "interrupted": {"step": STEP, "tried": 3, "claims": 1, "error": None, "delay": 1},
}


async def check_written(bench: Bench, lease: TaskLease, kind: str) -> None:
    row = await bench.row(lease)
    if kind == "done":
        assert row is None
        return
    found = {name: row[name] for name in WRITTEN[kind] if name != "delay"}
    if "delay" in WRITTEN[kind]:
        found["delay"] = row["delay"].total_seconds()
    assert found == WRITTEN[kind]
    assert (row["locked_by"], row["lock_expires_at"] is None) == (
        (lease.token, False) if kind == "continued" else (None, True)
    )
    assert row["updated_at"] > row["created_at"]


# --- written rows -------------------------------------------------------------------------------------------


def test_batch_holds_every_kind_of_outcome(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = dict(zip(KINDS, await at.take(len(KINDS)), strict=True))
            await at.db.execute("UPDATE pg_task SET tried = 3, claims = 3")
            bystander = (await at.take(1))[0]
            before = await at.row(bystander)
            outcomes = Outcomes()
            for kind, lease in leases.items():
                add(outcomes, lease, kind)
            replace_tried(outcomes)
            assert await at.write(outcomes) == [leases["continued"]]
            for kind, lease in leases.items():
                await check_written(at, lease, kind)
            assert await at.row(bystander) == before
            assert (at.flush.done, at.flush.parked, at.flush.lost) == (1, 1, 0)
            assert len(at.leases) == 2
            assert at.leases.get(leases["continued"].id) is leases["continued"]
            assert at.leases.get(bystander.id) is bystander
            assert at.link.statements == 1

    run(main())


def test_only_a_move_to_another_lane_notifies(dsn: str) -> None:
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
                await at.write(outcomes)
                await at.db.execute("SELECT pg_notify('pg_task_changed', $1)", kind)
            await at.db.execute("NOTIFY pg_task_changed, 'end'")
            await ended.wait()
            assert heard == ["done", "continued", "", *KINDS[2:], "end"]
            await at.db.remove_listener("pg_task_changed", hear)

    run(main())


def test_large_batch_is_one_statement(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(2100)
            outcomes = Outcomes()
            for n, lease in enumerate(leases):
                add(outcomes, lease, ("done", "continued", "retry")[n % 3])
            continued = await at.write(outcomes)
            assert continued == leases[1::3]
            assert at.link.statements == 1
            query = "SELECT count(*), count(locked_by), sum(tried) FROM pg_task"
            assert tuple(await at.db.fetchrow(query)) == (1400, 700, 700)
            assert (at.flush.done, at.flush.lost, len(at.leases)) == (700, 0, 700)

    run(main())


def test_outcome_of_expired_unclaimed_lease_is_written(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(3)
            await at.db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 hour'")
            outcomes = Outcomes()
            for kind, lease in zip(("done", "continued", "retry"), leases, strict=True):
                add(outcomes, lease, kind)
            assert await at.write(outcomes) == [leases[1]]
            assert at.flush.lost == 0
            assert len(await at.rows()) == 2

    run(main())


# --- lost leases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["taken over", "freed", "deleted"])
def test_outcomes_of_lost_leases_are_dropped_and_counted(dsn: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[TaskLease]:
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
            replace_tried(outcomes)
            assert await at.write(outcomes) == [good[1]]
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


def test_many_lost_leases_are_some_lines_and_a_count(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(300)
            await at.db.execute("DELETE FROM pg_task")
            outcomes = Outcomes()
            for lease in leases[:200]:
                outcomes.add_done(lease)
            await at.write(outcomes)
            for lease in leases[200:]:
                at.flush.add_lost(lease, ends_in=0.0)
            assert at.flush.lost == 300
            at.flush.log_suppressed()

    with caplog.at_level(logging.WARNING, "pgtask.flush"):
        run(main())
    events: list[Any] = [record.msg for record in caplog.records]
    said = [event.fields for event in events if event.name == "lease.lost"]
    counts = [fields["more"] for fields in said if "more" in fields]
    assert len(said) < 40
    assert len(said) - len(counts) + sum(counts) == 300


@pytest.mark.parametrize("kind", KINDS)
def test_done_counts_only_written_outcomes(dsn: str, kind: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(5)
            await at.steal(*leases[:3])
            outcomes = Outcomes()
            for lease in leases:
                add(outcomes, lease, kind)
            await at.write(outcomes)
            assert at.flush.lost == 3
            assert (at.flush.done, at.flush.parked) == (2 * (kind == "done"), 2 * (kind == "park"))

    run(main())


def test_outcome_of_an_older_claim_is_not_written(dsn: str) -> None:
    """The worker stalled, its lease expired, and it claimed the same task again."""

    async def main() -> None:
        async with bench(dsn) as at:
            (old,) = await at.take(1)
            await at.db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 s'")
            await at.db.fetch(statement("expire"), 10, *ALL_LEASES)
            token = uuid4()
            rows = await at.db.fetch(statement("claim"), "default", 0, 1, token, LEASE, 1000, 0.0)
            (new,), (displaced,) = at.leases.add_claimed(rows, token, 1.0)
            assert displaced is old
            before = await at.rows()
            for kind in KINDS:
                outcomes = Outcomes()
                add(outcomes, old, kind)
                assert await at.write(outcomes) == []
            assert await at.rows() == before
            assert at.flush.lost == len(KINDS)
            assert at.leases.get(new.id) is new, "dropping the old lease must not drop the new one"

    run(main())


# --- refused outcomes ----------------------------------------------------------------------------------------

CHECK = "ALTER TABLE pg_task ADD CONSTRAINT guard CHECK (step NOT LIKE '%poison%')"
POISON = '{"T":{"poison":null}}'


@pytest.mark.parametrize("poisoned", [{0}, {3}, {6}, {0, 6}, {1, 2, 3}, set(range(7))], ids=str)
@pytest.mark.parametrize("kind", ["continued", "next"])
def test_refused_outcome_is_parked_and_others_written(dsn: str, kind: str, poisoned: set[int]) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            await at.db.execute(CHECK)
            leases, others = await at.take(7), await at.take(2)
            outcomes = Outcomes()
            outcomes.add_done(others[0])
            add(outcomes, others[1], "park")
            for n, lease in enumerate(leases):
                step = POISON if n in poisoned else NEXT
                if kind == "continued":
                    outcomes.add_continued(lease, step)
                else:
                    outcomes.add_rescheduled(lease, step, 0, None, 0.0)
            continued = await at.write(outcomes)
            assert await at.row(others[0]) is None
            assert (await at.row(others[1]))["error"] == "broken"
            good = [lease for n, lease in enumerate(leases) if n not in poisoned]
            assert sorted(x.id for x in continued) == (sorted(x.id for x in good) if kind == "continued" else [])
            for lease in good:
                assert (await at.row(lease))["step"] == NEXT
            for n in poisoned:
                row = await at.row(leases[n])
                assert "refused by the database" in row["error"]
                assert "guard" in row["error"]
                assert (row["step"], row["tried"], row["claims"], row["locked_by"]) == (STEP, 1, 0, None)
            assert (at.flush.done, at.flush.parked, at.flush.lost) == (1, 1 + len(poisoned), 0)
            assert len(at.leases) == len(continued)

    run(main())


NUL, SURROGATE = "a\0b", "a\udc80b"
UNWRITABLE: dict[str, Any] = {
    "step with NUL": lambda outcomes, lease: outcomes.add_continued(lease, NUL),
    "step with a surrogate": lambda outcomes, lease: outcomes.add_continued(lease, SURROGATE),
    "next step with NUL": lambda outcomes, lease: outcomes.add_rescheduled(lease, NUL, 0, None, 0.0),
    "error with NUL": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 1, NUL, 0.0),
    "error with a surrogate": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 1, SURROGATE, 0.0),
    "delay beyond time": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 1, None, 8.64e13),
    "endless delay": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 1, None, float("inf")),
    "delay that is no number": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 1, None, float("nan")),
    "queue with NUL": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 0, None, 0.0, NUL),
    "priority too high": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 0, None, 0.0, None, 40_000),
    "tried too high": lambda outcomes, lease: outcomes.add_rescheduled(lease, None, 2**31, None, 0.0),
}


@pytest.mark.parametrize("write", UNWRITABLE.values(), ids=UNWRITABLE)
def test_unwritable_value_parks_its_task_alone(dsn: str, write: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> UUID:
        async with bench(dsn) as at:
            bad, *good = await at.take(4)
            outcomes = Outcomes()
            write(outcomes, bad)
            for lease in good:
                outcomes.add_done(lease)
            assert await at.write(outcomes) == []
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


async def guarded_batch(at: Bench, when: str, state: str, kind: str) -> tuple[TaskLease, list[TaskLease], Outcomes]:
    """Return seven outcomes. A trigger refuses the write to the row of one."""
    leases = await at.take(7)
    await at.db.execute("UPDATE pg_task SET key = 'guarded' WHERE id = $1", leases[3].id)
    await at.db.execute(GUARD.format(when=when, state=state))
    outcomes = Outcomes()
    for lease in leases:
        add(outcomes, lease, kind)
    return leases[3], leases[:3] + leases[4:], outcomes


@pytest.mark.parametrize("state", ["23001", "22000", "P0001"])
def test_trigger_that_refuses_an_end_parks_the_task(dsn: str, state: str) -> None:
    """P0001 is the default state of RAISE EXCEPTION in a trigger."""

    async def main() -> None:
        async with bench(dsn) as at:
            guarded, _, outcomes = await guarded_batch(at, "DELETE", state, "done")
            await at.write(outcomes)
            (row,) = await at.rows()
            assert row["id"] == guarded.id
            assert "not this one" in row["error"]
            assert (at.flush.done, at.flush.parked, len(at.leases)) == (6, 1, 0)

    run(main())


@pytest.mark.parametrize("kind", ["done", "continued", "retry"])
def test_unparkable_row_blocks_no_other(dsn: str, kind: str) -> None:
    """The row stays as it is, and its lease expires."""

    async def main() -> None:
        async with bench(dsn) as at:
            guarded, good, outcomes = await guarded_batch(at, "UPDATE OR DELETE", "23001", kind)
            continued = await at.write(outcomes)
            assert set(continued) == set(good if kind == "continued" else [])
            for lease in good:
                row = await at.row(lease)
                assert row is None if kind == "done" else row["step"] == NEXT or row["tried"] == 1
            assert at.leases.get(guarded.id) is None, "the worker would renew the lease forever"
            assert (await at.row(guarded))["locked_by"] == guarded.token

    run(main())


def test_lost_and_refused_lease_is_lost(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            await at.db.execute(CHECK)
            lost, good = await at.take(2)
            await at.steal(lost)
            before = await at.row(lost)
            outcomes = Outcomes()
            outcomes.add_continued(lost, NUL)
            add(outcomes, good, "done")
            assert await at.write(outcomes) == []
            assert await at.row(lost) == before
            assert (at.flush.done, at.flush.lost, len(at.leases)) == (1, 1, 0)

    run(main())


# --- locked rows ---------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for milliseconds instead of seconds."""
    monkeypatch.setitem(store.HOT_SETTINGS, "lock_timeout", "20ms")
    monkeypatch.setattr(writer, "LOCKED_RETRY", 1000.0)  # the test says when


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("strength", ["UPDATE", "SHARE", "KEY SHARE"])
@pytest.mark.parametrize("kind", ["done", "continued", "retry"])
def test_locked_row_blocks_no_other_outcome(dsn: str, kind: str, strength: str) -> None:
    """A foreign key of a user's table takes KEY SHARE, which hinders only a DELETE."""

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
                    continued = await (at.settle() if waits else at.write(outcomes))
                    assert continued == (free if kind == "continued" and not waits else [])
                    assert at.flush.blocked == 5 - len(free)
                    assert at.leases.get(leases[2].id) is (leases[2] if kind == "continued" or len(free) == 4 else None)
                for lease in free:
                    row = await at.row(lease)
                    assert row is None if kind == "done" else row["step"] == NEXT or row["tried"] == 1
            later = await at.settle()
            assert later == ([leases[2]] if kind == "continued" and len(free) == 4 else [])
            row = await at.row(leases[2])
            assert row is None if kind == "done" else row["step"] == NEXT or row["tried"] == 1
            assert (at.flush.blocked, at.flush.lost, at.flush.done) == (0, 0, 5 if kind == "done" else 0)

    run(main())


@pytest.mark.usefixtures("impatient")
def test_locked_table_holds_up_no_other_statement(dsn: str) -> None:
    """The lock is that of CREATE INDEX: it forbids to write rows, but not to lock them."""

    async def main() -> None:
        async with bench(dsn) as at, connected(dsn) as rival:
            leases = await at.take(4)
            outcomes = Outcomes()
            for lease in leases:
                add(outcomes, lease, "done")
            async with rival.transaction():
                await rival.execute("LOCK TABLE pg_task IN SHARE MODE")
                await at.write(outcomes)
                assert (at.flush.blocked, at.flush.done) == (4, 0)
                assert len(await at.link.run("lanes", *lane_parameters(None))) == 1
            await at.settle()
            assert (at.flush.blocked, at.flush.done, len(await at.rows())) == (0, 4, 0)

    run(main())


# --- lost replies --------------------------------------------------------------------------------------------


async def one_of_each(at: Bench) -> tuple[dict[str, TaskLease], Outcomes]:
    leases = dict(zip(KINDS, await at.take(len(KINDS)), strict=True))
    await at.db.execute("UPDATE pg_task SET tried = 3")
    outcomes = Outcomes()
    for kind, lease in leases.items():
        add(outcomes, lease, kind)
    replace_tried(outcomes)
    return leases, outcomes


def test_batch_with_lost_reply_is_written_once(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Line(dsn) as line, bench(dsn, line.dsn) as at:
            await at.write(Outcomes())
            leases, outcomes = await one_of_each(at)
            line.swallow()
            assert await at.write(outcomes) == [leases["continued"]]
            assert line.cut == 1
            for kind, lease in leases.items():
                await check_written(at, lease, kind)
            assert (at.flush.done, at.flush.parked, at.flush.lost, len(at.leases)) == (1, 1, 0, 1)

    with caplog.at_level(logging.WARNING, "pgtask.flush"):
        run(main())
    said = [record for record in caplog.records if record.name == "pgtask.flush"]
    assert said == [], "the first attempt has written it"


def test_batch_of_a_killed_backend_is_sent_again(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases, outcomes = await one_of_each(at)
            connection = await at.link.open()
            async with at.db.transaction():
                await at.db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
                flushing = asyncio.create_task(at.write(outcomes))
                await until_blocked(at.db, connection.get_server_pid())
                await at.db.execute("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
            assert await flushing == [leases["continued"]]
            for kind, lease in leases.items():
                await check_written(at, lease, kind)
            assert (at.flush.done, at.flush.parked, at.flush.lost, len(at.leases)) == (1, 1, 0, 1)

    run(main())


def test_task_claimed_between_two_attempts_is_left_alone(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases, outcomes = await one_of_each(at)
            connection = await at.link.open()
            async with at.db.transaction():
                await at.db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
                flushing = asyncio.create_task(at.write(outcomes))
                await until_blocked(at.db, connection.get_server_pid())
                await at.db.execute("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
                await at.steal(*leases.values())
                before = await at.rows()
            assert await flushing == []
            assert await at.rows() == before
            assert len(at.leases) == 0

    run(main())


def test_batch_that_is_sent_twice_changes_nothing(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases, outcomes = await one_of_each(at)
            await at.write(outcomes)
            before = [{**row, "updated_at": None, "position": None} for row in await at.rows()]
            assert await at.write(outcomes) == [leases["continued"]]
            assert [{**row, "updated_at": None, "position": None} for row in await at.rows()] == before

    run(main())


# --- release -------------------------------------------------------------------------------------------------


def test_release_of_a_locked_row_is_repeated_later(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release does not depend on `lock_timeout`, which a pooler does not pass on."""
    monkeypatch.setitem(store.HOT_SETTINGS, "lock_timeout", "0")

    async def main() -> None:
        async with bench(dsn) as at, connected(dsn) as locks:
            leases = await at.take(5)
            await at.steal(leases[4])
            outcomes = Outcomes()
            add(outcomes, leases[0], "done")
            async with locks.transaction():
                await locks.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", leases[1].id)
                async with asyncio.timeout(20):
                    await at.flush.release(leases[1:])
                    await at.write(outcomes)
                assert (at.flush.locked, len(at.leases), at.flush.done) == (1, 1, 1)
                assert at.leases.get(leases[1].id) is leases[1]
                for lease in leases[2:4]:
                    assert (await at.row(lease))["locked_by"] is None
                assert at.flush.take_releasable() == []
                assert at.flush.seconds_to_wait() == module.LOCKED_RETRY
                for _ in range(2):  # it stays locked
                    again = at.flush.take_releasable(before=float("inf"))
                    assert again == [leases[1]]
                    await at.flush.release(again)
            await at.flush.release(at.flush.take_releasable(before=float("inf")))
            assert (at.flush.locked, len(at.leases), at.flush.lost) == (0, 0, 0)
            assert at.flush.seconds_to_wait() == float("inf")
            row = await at.row(leases[1])
            assert (row["locked_by"], row["claims"]) == (None, 0)

    run(main())


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


def test_release_notifies_and_empty_one_sends_nothing(dsn: str) -> None:
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


def test_release_that_is_sent_twice_counts_once(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, bench(dsn, line.dsn) as at:
            leases = await at.take(3)
            await at.db.execute("UPDATE pg_task SET claims = 2")
            await at.flush.release(leases[:1])
            line.swallow()
            await at.flush.release(leases[1:])
            assert [tuple(row)[-1] for row in await at.db.fetch("SELECT id, claims FROM pg_task")] == [1, 1, 1]

    run(main())


def test_late_flush_behind_a_later_one_changes_nothing(dsn: str) -> None:
    """Each of three steps under one lease is flushed; then a frozen server process carries out the earlier ones."""

    async def main() -> None:
        async with bench(dsn) as at:
            (lease,) = await at.take(1)
            for number in (1, 2, 3):
                outcomes = Outcomes()
                outcomes.add_continued(lease, f'{{"T":{{"Step{number}":null}}}}')
                assert await at.write(outcomes) == [lease]
            before = await at.row(lease)
            assert before["step"] == '{"T":{"Step3":null}}'
            late = Outcomes()
            late.add_continued(lease, '{"T":{"Late":null}}')
            for position in range(before["position"]):
                assert await at.db.fetch(statement("flush"), *late.parameters(position)) == [(None, [], None, None)]
                assert await at.row(lease) == before
            again = await at.db.fetch(statement("flush"), *outcomes.parameters(before["position"]))
            assert again == [(None, None, None, None)], "the last one may be sent again"
            after = await at.row(lease)
            assert (after["step"], after["position"]) == (before["step"], before["position"])

    run(main())


def test_each_flush_has_a_greater_position(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            (lease,) = await at.take(1)
            found = []
            for _ in range(3):
                outcomes = Outcomes()
                outcomes.add_continued(lease, NEXT)
                await at.write(outcomes)
                found.append((await at.row(lease))["position"])
            assert found[0] > 0
            assert found == sorted(set(found))

    run(main())


def test_claim_begins_at_position_zero(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            await at.take(1)
            await at.db.execute("UPDATE pg_task SET position = 7, locked_by = NULL, lock_expires_at = NULL")
            await at.db.fetch(statement("claim"), "default", 0, 1, uuid4(), LEASE, 1000, 0.0)
            assert await at.db.fetchval("SELECT position FROM pg_task") == 0

    run(main())
