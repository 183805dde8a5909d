"""The states of runs under races: events at the same time, on several connections, lead to no illegal state.

Hypothesis draws rounds of what happens at the same time to a run, its child and its grandchild: claims and their loss,
checkpoints, looks for signals, pauses, ends, spawns, and from outside signals, cancels, resumes, and statements that
park or revive a run without its journal. Leases are kept after they were lost, so that late writers race too.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from fix_database import run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from late import begun
from run_race import CLAIMED, LONG_AGO, RunRace, open_race, play
from sessions import connected

from pgtask._ids import first_id
from pgtask._postgres.store import statement
from pgtask._workflow.branches import Branches, Wait
from pgtask._workflow.entries import LOST, CollectResults, EndRun, LoadHistory, RecordCheckpoint, Suspend
from pgtask._workflow.journal import PostgresJournal
from pgtask._workflow.values import Checkpoint
from pgtask.errors import DataRefused

KINDS = ("claim", "claim", "expire", "cancel", "resume", "signal", "record", "take", "time_out", "pause", "spawn")
MORE = ("wait_for_child", "wait_for_child", "end", "fail", "fail_a_try", "complete", "park", "revive")
EVENT = st.tuples(st.sampled_from(KINDS + MORE), st.integers(0, 2), st.sampled_from((0, 0, 0, 1)))
ROUNDS = st.lists(st.lists(EVENT, min_size=1, max_size=4), min_size=1, max_size=10)
FAMILY = [CLAIMED, [("spawn", 0, 0)], [("claim", 1, 0)]]


@given(rounds=ROUNDS)
@example([CLAIMED, [("cancel", 0, 0), ("end", 0, 0)]])
@example([CLAIMED, [("cancel", 0, 0), ("spawn", 0, 0)]])
@example([CLAIMED, [("signal", 0, 0), ("time_out", 0, 0)]])
@example([CLAIMED, [("signal", 0, 0), ("pause", 0, 0)]])
@example([CLAIMED, [("expire", 0, 0)], CLAIMED, [("end", 0, 1), ("end", 0, 0)]])
@example([CLAIMED, [("spawn", 0, 0), ("expire", 0, 0)]])
@example([CLAIMED, [("expire", 0, 0)], CLAIMED, [("spawn", 0, 1), ("spawn", 0, 0)]])
@example([CLAIMED, [("fail_a_try", 0, 0)], [("complete", 0, 0), ("expire", 0, 0)]])
@example([CLAIMED, [("fail_a_try", 0, 0)], [("fail_a_try", 0, 0), ("fail_a_try", 0, 0)]])
@example([*FAMILY, [("wait_for_child", 0, 0), ("end", 1, 0)]])
@example([*FAMILY, [("wait_for_child", 0, 0), ("cancel", 1, 0)]])
@example([*FAMILY, [("wait_for_child", 0, 0), ("park", 1, 0)]])
@example([*FAMILY, [("wait_for_child", 0, 0)], [("park", 1, 0), ("cancel", 0, 0)], [("revive", 1, 0)]])
@example([*FAMILY, [("fail", 1, 0)], [("revive", 1, 0), ("wait_for_child", 0, 0)]])
@example([*FAMILY, [("wait_for_child", 0, 0)], [("cancel", 0, 0), ("end", 1, 0)]])
@example([*FAMILY, [("spawn", 1, 0), ("cancel", 0, 0)]])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.faults
@pytest.mark.timeout(240)
def test_no_race_leads_to_an_illegal_state(dsn: str, rounds: list[list[tuple[str, int, int]]]) -> None:
    run(play(dsn, rounds))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("first", "second", "run_of_second"),
    [
        ("pause", "signal", 0),
        ("time_out", "signal", 0),
        ("end", "cancel", 0),
        ("spawn", "cancel", 0),
        ("spawn", "expire", 0),
        ("spawn", "end", 0),
    ],
)
def test_the_same_race_again_and_again(dsn: str, first: str, second: str, run_of_second: int) -> None:
    """Each pair from both sides, thirty times: the moments differ by themselves."""
    for _ in range(15):
        run(play(dsn, [CLAIMED, [(first, 0, 0), (second, run_of_second, 0)]]))
        run(play(dsn, [CLAIMED, [(second, run_of_second, 0), (first, 0, 0)]]))


@pytest.mark.faults
def test_a_child_ends_while_its_parent_begins_to_wait(dsn: str) -> None:
    for _ in range(15):
        for end in ("end", "park"):
            run(play(dsn, [*FAMILY, [("wait_for_child", 0, 0), (end, 1, 0)]]))
            run(play(dsn, [*FAMILY, [(end, 1, 0), ("wait_for_child", 0, 0)]]))


def test_child_that_ends_while_its_parent_suspends_is_seen(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race, race.pool.acquire() as db, connected(dsn) as late:
            for rounds in FAMILY:
                await asyncio.gather(*(race.happen(*event) for event in rounds))
            parent, child = race.runs[:2]
            (lease,), (of_child,) = race.leases[parent], race.leases[child]
            wait = [
                [parent],
                [lease.token],
                [lease.seen_at],
                [],
                [0],
                ["1 children of go"],
                [parent],
                [child],
                [1],
                [False],
            ]
            for error in ("no", None):  # and it goes on in between, with the same record as before
                async with begun(db, late, "journal/suspend", *wait) as pausing:
                    end = [[child], [of_child.token], [error], ["1"], [1], [1], *[[]] * 12]
                    ((left_out, _, _),) = await db.fetch(statement("journal/end"), *end)
                    assert left_out is None
                assert [tuple(row) for row in await pausing] == [(parent, False, lease.seen_at)]
                await race.revive(child)
                await race.claim(child)
                of_child = race.leases[child][-1]

    run(main())


def test_signal_that_arrives_during_a_look_stops_the_suspension(dsn: str) -> None:
    """The look locks the row that the signal has changed, but cannot see the signal."""

    async def main() -> None:
        async with open_race(dsn) as race, race.pool.acquire() as db, connected(dsn) as late:
            await race.claim(race.runs[0])
            id, (lease,) = race.runs[0], race.leases[race.runs[0]]
            async with begun(db, late, "journal/take", [id], [lease.token], ["go"], [1], ["1"], [], [1]) as looking:
                await race.signal(id)
            ((_, result, _, _, wakeup_at),) = await looking
            assert result is None
            assert await race.journals[0].submit(Suspend(lease, wakeup_at, None, 0, "signal go")) is not None

    run(main())


def test_end_that_a_signal_overtakes_counts_it(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race, race.pool.acquire() as db, connected(dsn) as late:
            await race.claim(race.runs[0])
            id, (lease,) = race.runs[0], race.leases[race.runs[0]]
            end = [[id], [lease.token], [None], ["1"], [0], [1], *[[]] * 12]
            async with begun(db, late, "journal/end", *end) as ending:
                await race.signal(id)
            assert [tuple(row) for row in await ending] == [([], None, 0)], "it cannot see the signal"
            ((left_out, unread, _),) = await db.fetch(statement("journal/end"), *end)
            assert (left_out, json.loads(unread)) == (None, {str(id): {"go": 1}})

    run(main())


def test_parent_and_child_that_suspend_together_both_wake(dsn: str) -> None:
    """One statement notes both in the record of the child: that its parent waits for it, and for what it waits."""

    async def main() -> None:
        async with open_race(dsn) as race:
            for rounds in FAMILY:
                await asyncio.gather(*(race.happen(*event) for event in rounds))
            parent, child = race.runs[:2]
            (of_parent,), (of_child,) = race.leases[parent], race.leases[child]
            waits = [
                race.journals[0].submit(
                    Suspend(of_parent, of_parent.seen_at, None, 0, "1 children of go", False, [child])
                ),
                race.journals[0].submit(Suspend(of_child, of_child.seen_at, None, 0, "signal go")),
            ]
            assert await asyncio.gather(*waits) == [None, None]
            due = "SELECT wakeup_at <= now() FROM pg_task WHERE id = $1"
            await race.signal(child)
            assert await race.pool.fetchval(due, child)
            assert not await race.pool.fetchval(due, parent)
            await race.pool.execute("UPDATE pg_task SET error = 'no' WHERE id = $1", child)
            assert await race.pool.fetchval(due, parent)

    run(main())


SIBLINGS = """
    WITH child AS (
        INSERT INTO pg_task_runs (id, name, parent, awaited)
        SELECT child, 'flow', $1, true FROM unnest($2::uuid[]) AS child
    ),
    parent AS (
        INSERT INTO pg_task_runs (id, name, waits_on, paused_until, waits_for)
        VALUES ($1, 'flow', 'children of go', 'infinity', cardinality($2::uuid[]))
    )
    INSERT INTO pg_task (id, step, wakeup_at, locked_by, lock_expires_at)
    SELECT $1::uuid, '{}', 'infinity', NULL, NULL::timestamptz
    UNION ALL
    SELECT child, '{}', now(), child, now() + interval '1 hour' FROM unnest($2::uuid[]) AS child
"""


def test_siblings_that_end_in_two_workers_wake_their_parent(dsn: str) -> None:
    """In opposite orders, several in a statement, while a person cancels one: no deadlock, and each counts once."""

    async def main() -> None:
        async with connected(dsn) as db:  # a deadlock is to be found before a lock_timeout ends it
            name = await db.fetchval("SELECT quote_ident(current_database())")
            await db.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '5ms'")
        async with open_race(dsn) as race, race.pool.acquire() as db:
            for number in range(40):
                parent, *children = (UUID(int=first_id() + at) for at in range(8))
                await db.execute(SIBLINGS, parent, children)
                ends: list[Awaitable[Any]] = []
                for at, child in enumerate(children[:-1]):
                    lease: Any = SimpleNamespace(id=child, token=child, label="flow.Run")
                    end = (
                        EndRun(lease, output="1", version=1)
                        if at % 3
                        else EndRun(lease, error="no", tried=1, version=1)
                    )
                    ends.append(race.journals[at % 2].submit(end))
                ends = ends if number % 2 else ends[::-1]
                await asyncio.gather(*ends, race.cancel(children[-1]))
                waits_for = await db.fetchval("SELECT waits_for FROM pg_task_runs WHERE id = $1", parent)
                is_due = await db.fetchval("SELECT wakeup_at <= now() FROM pg_task WHERE id = $1", parent)
                assert (waits_for, is_due) == (0, True)
            query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            assert await db.fetchval(query) == 0

    run(main())


MEDDLE = {
    "no record": "DELETE FROM pg_task_runs WHERE id = $1",
    "no task": "DELETE FROM pg_task WHERE id = $1",
    "neither": "WITH task AS (DELETE FROM pg_task WHERE id = $1) DELETE FROM pg_task_runs WHERE id = $1",
    "parked without a record": """
        WITH record AS (DELETE FROM pg_task_runs WHERE id = $1) UPDATE pg_task SET error = 'no' WHERE id = $1""",
    "it says that it has failed": "UPDATE pg_task_runs SET state = 'ERROR' WHERE id = $1",
    "it says that it was cancelled": "UPDATE pg_task_runs SET state = 'CANCELLED', ended_at = now() WHERE id = $1",
    "it says that it has not failed": """
        WITH task AS (UPDATE pg_task SET error = 'no' WHERE id = $1) SELECT""",
}


@pytest.mark.parametrize("change", MEDDLE)
def test_suspension_and_collection_agree_on_ended_children(dsn: str, change: str) -> None:
    """Also after changes by plain SQL; and a parent that goes on is woken by the end of its child."""

    async def main() -> None:
        async with open_race(dsn) as race:
            for rounds in FAMILY:
                await asyncio.gather(*(race.happen(*event) for event in rounds))
            parent, child = race.runs[:2]
            (lease,), journal = race.leases[parent], race.journals[0]
            await race.expire(child)
            if change == "it says that it has not failed":
                await race.pool.execute("ALTER TABLE pg_task DISABLE TRIGGER pg_task_run_parked")
            await race.pool.execute(MEDDLE[change], child)
            await race.pool.execute("ALTER TABLE pg_task ENABLE TRIGGER pg_task_run_parked")
            ended = await journal.submit(CollectResults([child]))
            pause = Suspend(lease, lease.seen_at, None, 0, "1 children of go", False, [child])
            is_refused = await journal.submit(pause) is not None
            assert is_refused == bool(ended)
            assert not ended or ended[child].state == (
                "ERROR" if "parked" in change or "not" in change else "CANCELLED"
            )
            if not ended:
                await race.pool.execute("UPDATE pg_task SET error = 'no' WHERE id = $1", child)
                assert await race.pool.fetchval("SELECT wakeup_at <= now() FROM pg_task WHERE id = $1", parent)

    run(main())


def test_run_whose_suspension_is_refused_backs_off() -> None:
    asked: list[list[Wait]] = []

    async def refuse(waits: list[Wait]) -> None:
        asked.append(waits)

    async def main() -> None:
        waits = Branches(refuse, lambda: datetime.now(UTC))
        began = time.monotonic()
        for seconds in range(6):  # 2 + 4 + 8 + 16 + 32 ms
            await waits.wait(
                Wait("1 children of go", seen_at=LONG_AGO + timedelta(seconds=seconds), children=(UUID(int=1),))
            )
        assert 0.062 <= time.monotonic() - began < 1
        began = time.monotonic()
        for number in range(6):
            await waits.wait(Wait(f"signal {number}"))
        assert time.monotonic() - began < 0.05, "something new had come each time"
        assert len(asked) == 12

    run(main())


# --- the fence


def test_a_locked_row_holds_up_its_own_run_only(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            locked, free = race.runs[0], uuid4()
            await race.pool.execute(
                statement("runs/trigger"), free, "flow", '{"flow":{"Run":null}}', None, None, "default", 0, None
            )
            race.leases[free] = []
            await race.claim(locked)
            await race.claim(free)
            journal = race.journals[0]
            async with race.pool.acquire() as connection:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", locked)
                waits = journal.submit(
                    RecordCheckpoint(race.leases[locked][0], Checkpoint(1, "1", "step", "a", "1"), 1)
                )
                passes = journal.submit(RecordCheckpoint(race.leases[free][0], Checkpoint(1, "1", "step", "a", "1"), 1))
                await asyncio.wait_for(passes, 1.5)
                assert not waits.done()
                await transaction.rollback()
            await asyncio.wait_for(waits, 5)

    run(main())


def test_entry_whose_row_stays_locked_backs_off(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            id = race.runs[0]
            await race.claim(id)
            journal = race.journals[0]
            async with race.pool.acquire() as connection:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", id)
                waits = journal.submit(RecordCheckpoint(race.leases[id][0], Checkpoint(1, "1", "step", "a", "1"), 1))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(waits), 1)
                assert 10 < journal._link.statements < 30  # two for each look, after 2, 4, 8, ... 250 ms
                await transaction.rollback()
            await asyncio.wait_for(waits, 5)

    run(main())


def test_waiters_are_released_together_after_one_commit(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            id = race.runs[0]
            await race.claim(id)
            (lease,), journal = race.leases[id], race.journals[0]
            await journal.submit(RecordCheckpoint(lease, Checkpoint(1, "1", "step", "first", "1"), 1))
            entries = [
                journal.submit(
                    RecordCheckpoint(lease, Checkpoint(number, str(number), "step", f"s{number}", "1"), None)
                )
                for number in range(2, 302)
            ]
            await asyncio.gather(*entries)
            assert await race.pool.fetchval("SELECT count(DISTINCT recorded_at) FROM pg_task_checkpoints") == 2
            history = await journal.submit(LoadHistory(id))
            assert sorted(checkpoint.number for checkpoint in history.checkpoints) == list(range(1, 302))
            assert history.version == 1

    run(main())


def test_refused_entry_fails_its_own_run_only(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            id = race.runs[0]
            await race.claim(id)
            (lease,), journal = race.leases[id], race.journals[0]
            good = [
                journal.submit(RecordCheckpoint(lease, Checkpoint(at, str(at), "step", f"s{at}", "1"), None))
                for at in range(1, 6)
            ]
            bad = journal.submit(RecordCheckpoint(lease, Checkpoint(9, "9", "step", "a NUL \0", "1"), None))
            await asyncio.gather(*good)
            with pytest.raises(DataRefused, match="22021"):
                await bad

    run(main())


def test_run_of_which_one_entry_was_skipped_is_sent_again() -> None:
    """Another session may release the row of a run between two of its entries in one statement."""
    lease: Any = SimpleNamespace(id=UUID(int=1))
    batch = [RecordCheckpoint(lease, Checkpoint(at, str(at), "step", f"s{at}", "1")) for at in (1, 2)]
    assert RecordCheckpoint.answers(batch, [[[lease.id] * 2]]) == [None, None]
    assert RecordCheckpoint.answers(batch, [[[lease.id]]]) == [LOST, LOST]


def test_journal_announces_the_due_time_of_a_suspended_run(dsn: str) -> None:
    """The worker that suspends a run claims again when it falls due, without a notification."""

    async def main() -> None:
        told: list[float] = []
        async with open_race(dsn) as race:
            journal = race.journals[0]
            journal._due_in = told.append
            id = race.runs[0]
            await race.claim(id)
            history = await journal.submit(LoadHistory(id))
            due_at = journal.now() + timedelta(seconds=7)
            pause = Suspend(race.leases[id][0], history.wakeup_at, due_at, 0, "sleep nap", False, [])
            assert await journal.submit(pause) is None
        assert len(told) == 1
        assert 6 < told[0] <= 7

    run(main())


async def ahead(race: RunRace, journal: PostgresJournal) -> float:
    """The seconds by which the clock of a journal is ahead of that of the database."""
    now = await race.pool.fetchval("SELECT clock_timestamp()")
    return float((journal.now() - now).total_seconds())


@pytest.mark.parametrize("is_first", [True, False])
def test_load_that_waits_for_a_lock_keeps_the_clock(dsn: str, is_first: bool) -> None:
    async def main() -> None:
        async with open_race(dsn) as race, race.pool.acquire() as other:
            journal = race.journals[0]
            if not is_first:
                await journal.submit(LoadHistory(race.runs[0]))
            await other.execute("BEGIN; LOCK TABLE pg_task_checkpoints IN ACCESS EXCLUSIVE MODE")
            loading = journal.submit(LoadHistory(race.runs[0]))
            await until_locked_out(race)
            await other.execute("SELECT pg_sleep(1); COMMIT")
            await loading
            assert abs(await ahead(race, journal)) < 0.5

    run(main())


def test_reply_that_is_read_late_keeps_the_clock(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            journal = race.journals[0]
            await journal.submit(LoadHistory(race.runs[0]))
            statements = journal._link.statements
            loading = journal.submit(LoadHistory(race.runs[0]))
            while journal._link.statements == statements:  # noqa: ASYNC110
                await asyncio.sleep(0)
            time.sleep(1)  # noqa: ASYNC251 - as a step that blocks the loop
            await loading
            assert abs(await ahead(race, journal)) < 0.5

    run(main())


def test_a_clock_of_the_database_that_was_set_is_followed(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            journal = race.journals[0]
            for wrong in (-60, 60):
                await journal.submit(LoadHistory(race.runs[0]))
                journal._offset += wrong
                await journal.submit(LoadHistory(race.runs[0]))
                assert abs(await ahead(race, journal)) < 0.5

    run(main())


async def until_locked_out(race: RunRace) -> None:
    """Wait until another session waits for a lock."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
    while not await race.pool.fetchval(waiting):
        await race.pool.execute("SELECT pg_sleep(0.01)")


def test_run_is_not_taken_over_while_it_is_recorded(dsn: str) -> None:
    async def main() -> None:
        async with open_race(dsn) as race:
            id = race.runs[0]
            await race.claim(id)
            (lease,) = race.leases[id]
            columns = [[1], ["1"], ["step"], ["a"], ["1"], [], [], [0], [0.0], [1]]
            async with race.pool.acquire() as connection:
                transaction = connection.transaction()
                await transaction.start()
                assert await connection.fetchval(statement("journal/record"), [id], [lease.token], *columns) is None
                await race.expire(id)
                assert await race.pool.fetchval("SELECT locked_by FROM pg_task WHERE id = $1", id) == lease.token
                await transaction.commit()
            await race.expire(id)
            assert await race.pool.fetchval("SELECT locked_by FROM pg_task WHERE id = $1", id) is None

    run(main())
