"""The states of runs under races: whatever happens at once, on whichever connections, no run is in an illegal state.

Hypothesis draws rounds of what happens at the same time to a run, its child and its grandchild: claims and their loss,
checkpoints, looks for signals, pauses, ends, spawns, and from outside signals, cancels, resumes, and whoever parks or
revives a run without its journal. Leases are kept after they were lost, so that late writers are among those who race.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from conftest import run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pgtask._ids import first_id
from pgtask._postgres.runs import cancel_runs, resume_runs, send_signal
from pgtask._postgres.store import Link, statement
from pgtask._worker.entries import Checkpoint, ChildRow, Pause
from pgtask._worker.journal import Journal
from pgtask._worker.waits import Wait, Waits
from pgtask.errors import DataRefused, RunStopped

T = TypeVar("T")
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
CLAIM = """
    UPDATE pg_task SET locked_by = $2, lock_expires_at = now() + interval '1 minute', claims = claims + 1
    WHERE id = (SELECT id FROM pg_task WHERE id = $1 AND locked_by IS NULL AND error IS NULL AND wakeup_at <= now()
                FOR NO KEY UPDATE SKIP LOCKED)
    RETURNING id
"""
EXPIRE = """
    UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL
    WHERE id = (SELECT id FROM pg_task WHERE id = $1 AND locked_by IS NOT NULL FOR NO KEY UPDATE SKIP LOCKED)
"""


class World:
    """Two workers' journals, connections of clients, and what each run was told by its journal."""

    def __init__(self, pool: Any, journals: list[Journal]) -> None:
        self.pool = pool
        self.journals = journals
        self.runs = [UUID(int=first_id() + at) for at in range(3)]
        self.leases: dict[UUID, list[Any]] = {id: [] for id in self.runs}
        self.numbers = dict.fromkeys(self.runs, 0)
        self.spawned: set[UUID] = set()
        self.put_off: dict[UUID, Checkpoint] = {}
        self.ends: Counter[UUID] = Counter()
        """How often each run was told in this round that it has ended: by its journal, or by a cancel."""
        self.sent = 0

    async def trigger(self) -> None:
        await self.pool.execute(
            statement("runs/trigger"), self.runs[0], "flow", '{"flow":{"Run":null}}', None, None, "default", 0, None
        )

    def lease(self, id: UUID, age: int) -> Any:
        """The latest lease of a run, or an older one: a late writer's."""
        leases = self.leases[id]
        return leases[max(0, len(leases) - 1 - age)] if leases else None

    async def happen(self, what: str, at: int, age: int) -> None:
        id = self.runs[at]
        if what in ("claim", "expire", "cancel", "resume", "signal", "revive"):
            await getattr(self, what)(id)
            return
        lease = self.lease(id, age)
        if lease is not None:
            with contextlib.suppress(RunStopped):
                await getattr(self, what)(lease, self.journals[at % 2])

    # --- from outside

    async def claim(self, id: UUID) -> None:
        token = uuid4()
        if await self.pool.fetchval(CLAIM, id, token):
            wakeup_at = await self.pool.fetchval("SELECT wakeup_at FROM pg_task WHERE id = $1", id)
            self.leases[id].append(
                SimpleNamespace(id=id, token=token, label="flow.Run", seen_at=wakeup_at, clear=lambda: None)
            )

    async def expire(self, id: UUID) -> None:
        await self.pool.execute(EXPIRE, id)

    async def cancel(self, id: UUID) -> None:
        async with self.pool.acquire() as connection:
            self.ends.update(await cancel_runs(connection, [id]))

    async def resume(self, id: UUID) -> None:
        async with self.pool.acquire() as connection:
            await resume_runs(connection, [id])

    async def signal(self, id: UUID) -> None:
        async with self.pool.acquire() as connection:
            is_sent = await send_signal(connection, id, "go", "1")
        self.sent += is_sent  # not in one line: what is before += is read before the await

    async def revive(self, id: UUID) -> None:
        await self.again("UPDATE pg_task SET error = NULL WHERE id = $1", id)

    async def again(self, query: str, *args: Any) -> None:
        """As a `Link` does after a deadlock."""
        while True:
            with contextlib.suppress(asyncpg.DeadlockDetectedError):
                await self.pool.execute(query, *args)
                return

    # --- under a lease

    async def park(self, lease: Any, journal: Journal) -> None:
        """By the way of all tasks, as for a step that cannot be decoded."""
        moved = [[lease.id], [lease.token], [None], [1], ["not decoded"], [0.0], [None], [None], [None]]
        await self.again(statement("flush"), [], [], [], [], [], *moved, False)

    async def write(self, lease: Any, entry: Awaitable[T]) -> T:
        """What the journal answers, which must refuse who had lost the lease when he asked."""
        is_late = lease is not self.leases[lease.id][-1]
        answer = await entry
        assert not is_late, "an entry under a lost lease was written"
        return answer

    def checkpoint(self, lease: Any, kind: str, **more: Any) -> Checkpoint:
        self.numbers[lease.id] += 1
        number = self.numbers[lease.id]
        return Checkpoint(number, str(number), kind, "go", **more)

    async def record(self, lease: Any, journal: Journal) -> None:
        await self.write(lease, journal.record(lease, self.checkpoint(lease, "step", result="1"), 1))

    async def fail_a_try(self, lease: Any, journal: Journal) -> None:
        """Of a step that was put off before, if there is one."""
        before = self.put_off.get(lease.id) or self.checkpoint(lease, "step", error="no", due_at=LONG_AGO)
        await self.write(lease, journal.record(lease, before._replace(tried=before.tried + 1), None))
        self.put_off[lease.id] = before._replace(tried=before.tried + 1)

    async def complete(self, lease: Any, journal: Journal) -> None:
        """What was put off."""
        if before := self.put_off.pop(lease.id, None):
            await self.write(lease, journal.record(lease, before._replace(result="1", error=None, due_at=None), None))

    async def take(self, lease: Any, journal: Journal, due_at: datetime | None = None) -> None:
        taken = await self.write(lease, journal.take(lease, self.checkpoint(lease, "signal", due_at=due_at), None))
        lease.seen_at = taken.wakeup_at

    async def time_out(self, lease: Any, journal: Journal) -> None:
        await self.take(lease, journal, LONG_AGO)

    async def pause(self, lease: Any, journal: Journal) -> None:
        """As a run does: looks for a signal, and pauses for one if there is none."""
        taken = await self.write(lease, journal.take(lease, self.checkpoint(lease, "signal"), None))
        if taken.result is None:
            await self.write(lease, journal.pause(lease, Pause(taken.wakeup_at, None, 0, "signal go", False, [])))

    async def wait_for_child(self, lease: Any, journal: Journal) -> None:
        child = self.child_of(lease.id)
        if child in self.spawned and not await journal.collect([child]):
            wakeup_at = (await journal.load(lease.id)).wakeup_at
            pause = Pause(wakeup_at, None, 0, "1 children of go", False, [child])
            await self.write(lease, journal.pause(lease, pause))

    def child_of(self, id: UUID) -> UUID | None:
        at = self.runs.index(id) + 1
        return self.runs[at] if at < len(self.runs) else None

    async def spawn(self, lease: Any, journal: Journal) -> None:
        child = self.child_of(lease.id)
        if child is not None and child not in self.spawned:
            row = ChildRow(child, "flow", '{"flow":{"Run":null}}', "default", 0)
            await self.write(lease, journal.spawn(lease, self.checkpoint(lease, "spawn", result="1"), None, [row]))
            self.spawned.add(child)

    async def end(self, lease: Any, journal: Journal) -> None:
        end = journal.end(lease, output="1", error=None, tried=0, forgotten=[], version=1)
        await self.write(lease, end)
        self.ends[lease.id] += 1

    async def fail(self, lease: Any, journal: Journal) -> None:
        end = journal.end(lease, output=None, error="it failed", tried=1, forgotten=[], version=1)
        await self.write(lease, end)


ILLEGAL = {
    "a record that says the run has ended, and a task that has not": """
        SELECT count(*) FROM pg_task_runs r JOIN pg_task t USING (id) WHERE r.state IN ('SUCCESS', 'CANCELLED')""",
    "a run without an end and without a task": """
        SELECT count(*) FROM pg_task_runs r LEFT JOIN pg_task t USING (id)
        WHERE t.id IS NULL AND r.state IS DISTINCT FROM 'SUCCESS' AND r.state IS DISTINCT FROM 'CANCELLED'""",
    "ERROR, and the task is not parked": """
        SELECT count(*) FROM pg_task_runs r JOIN pg_task t USING (id)
        WHERE (r.state = 'ERROR') <> (t.error IS NOT NULL)""",
    "a task without a record": """
        SELECT count(*) FROM pg_task t LEFT JOIN pg_task_runs r USING (id) WHERE r.id IS NULL""",
    "a checkpoint that is both a result and an error": """
        SELECT count(*) FROM pg_task_checkpoints WHERE result IS NOT NULL AND error IS NOT NULL""",
    "a step that has a result and is to be tried again": """
        SELECT count(*) FROM pg_task_checkpoints WHERE kind = 'step' AND result IS NOT NULL AND due_at IS NOT NULL""",
    "a child that its parent does not know of": """
        SELECT count(*) FROM pg_task_runs r WHERE r.parent IS NOT NULL
        AND NOT EXISTS (SELECT FROM pg_task_checkpoints c WHERE c.run = r.parent AND c.kind = 'spawn')""",
    "a parent that knows of a child which was not made": """
        SELECT count(*) FROM pg_task_checkpoints c WHERE c.kind = 'spawn'
        AND NOT EXISTS (SELECT FROM pg_task_runs r WHERE r.parent = c.run)""",
    "a run that waits for a signal that is there, and sleeps on": """
        SELECT count(*) FROM pg_task_runs r JOIN pg_task t USING (id)
        WHERE r.waits_on = 'signal go' AND t.locked_by IS NULL AND t.error IS NULL AND t.wakeup_at > now()
          AND EXISTS (SELECT FROM pg_task_signals s WHERE s.run = r.id AND s.name = 'go')""",
    "a run that waits for a child that has ended, and sleeps on": """
        SELECT count(*) FROM pg_task_runs r JOIN pg_task t USING (id)
        WHERE r.waits_on = '1 children of go' AND t.locked_by IS NULL AND t.error IS NULL AND t.wakeup_at > now()
          AND NOT EXISTS (SELECT FROM pg_task_runs c WHERE c.parent = r.id AND c.state IS NULL)""",
}
SIGNALS = """
    SELECT (SELECT count(*) FROM pg_task_signals)
         + (SELECT count(*) FROM pg_task_checkpoints WHERE kind = 'signal' AND result IS NOT NULL)
"""
ORPHANS = """
    SELECT count(*) FROM pg_task_runs p JOIN pg_task_runs c ON c.parent = p.id JOIN pg_task t ON t.id = c.id
    WHERE p.state = 'CANCELLED'
"""
KINDS = ("claim", "claim", "expire", "cancel", "resume", "signal", "record", "take", "time_out", "pause", "spawn")
MORE = ("wait_for_child", "wait_for_child", "end", "fail", "fail_a_try", "complete", "park", "revive")
EVENT = st.tuples(st.sampled_from(KINDS + MORE), st.integers(0, 2), st.sampled_from((0, 0, 0, 1)))
ROUNDS = st.lists(st.lists(EVENT, min_size=1, max_size=4), min_size=1, max_size=10)


@asynccontextmanager
async def worlds(dsn: str) -> AsyncIterator[World]:
    links = [Link(dsn, "journal"), Link(dsn, "journal")]
    journals = [Journal(link, due_in=lambda _: None) for link in links]
    writers = [asyncio.create_task(journal.run()) for journal in journals]
    async with asyncpg.create_pool(dsn, min_size=4, max_size=4) as pool:
        await pool.execute("TRUNCATE pg_task, pg_task_runs, pg_task_checkpoints, pg_task_signals")
        world = World(pool, journals)
        await world.trigger()
        try:
            yield world
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)


async def play(dsn: str, rounds: list[list[tuple[str, int, int]]]) -> None:
    async with worlds(dsn) as world:
        await play_out(world, rounds)


async def play_out(world: World, rounds: list[list[tuple[str, int, int]]]) -> None:
    resumed = False
    for events in rounds:
        world.ends.clear()
        await asyncio.gather(*(world.happen(*event) for event in events))
        is_resumed = any(what == "resume" for what, _, _ in events)
        resumed = resumed or is_resumed
        for what, query in ILLEGAL.items():
            assert await world.pool.fetchval(query) == 0, what
        assert await world.pool.fetchval(SIGNALS) == world.sent
        if not is_resumed:  # a run that is resumed may end again
            assert all(ends == 1 for ends in world.ends.values()), f"ended more than once: {world.ends}"
        if not resumed:  # a child that is resumed outlives its parent on purpose
            assert await world.pool.fetchval(ORPHANS) == 0


CLAIMED = [("claim", 0, 0)]
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
@pytest.mark.timeout(240)
def test_no_race_leads_to_an_illegal_state(dsn: str, rounds: list[list[tuple[str, int, int]]]) -> None:
    run(play(dsn, rounds))


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


def test_a_child_ends_while_its_parent_begins_to_wait(dsn: str) -> None:
    for _ in range(15):
        for end in ("end", "park"):
            run(play(dsn, [*FAMILY, [("wait_for_child", 0, 0), (end, 1, 0)]]))
            run(play(dsn, [*FAMILY, [(end, 1, 0), ("wait_for_child", 0, 0)]]))


def test_a_child_that_ends_under_the_pause_of_its_parent_is_seen(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world, world.pool.acquire() as ending:
            for rounds in FAMILY:
                await asyncio.gather(*(world.happen(*event) for event in rounds))
            parent, child = world.runs[:2]
            (lease,), (of_child,) = world.leases[parent], world.leases[child]
            for error in ("no", None):  # and it goes on in between, with the same record as before
                await ending.execute("BEGIN")
                await ending.execute("SELECT FROM pg_task_runs WHERE id = $1 FOR UPDATE", child)
                pause = Pause(lease.seen_at, None, 0, "1 children of go", False, [child])
                paused = world.journals[0].pause(lease, pause)
                await until_locked_out(world)
                end = [[child], [of_child.token], [error], ["1"], [1], [1], [], []]
                assert await ending.fetchval(statement("journal/end"), *end) is None
                await ending.execute("COMMIT")
                assert await paused == lease.seen_at
                await world.revive(child)
                await world.claim(child)
                of_child = world.leases[child][-1]

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
def test_a_pause_and_a_look_agree_on_what_has_ended(dsn: str, change: str) -> None:
    """Whatever somebody has done to the rows; and who goes on is told when it ends."""

    async def main() -> None:
        async with worlds(dsn) as world:
            for rounds in FAMILY:
                await asyncio.gather(*(world.happen(*event) for event in rounds))
            parent, child = world.runs[:2]
            (lease,), journal = world.leases[parent], world.journals[0]
            await world.expire(child)
            if change == "it says that it has not failed":
                await world.pool.execute("ALTER TABLE pg_task DISABLE TRIGGER pg_task_run_parked")
            await world.pool.execute(MEDDLE[change], child)
            await world.pool.execute("ALTER TABLE pg_task ENABLE TRIGGER pg_task_run_parked")
            ended = await journal.collect([child])
            pause = Pause(lease.seen_at, None, 0, "1 children of go", False, [child])
            is_refused = await journal.pause(lease, pause) is not None
            assert is_refused == bool(ended)
            assert not ended or ended[child].state == (
                "ERROR" if "parked" in change or "not" in change else "CANCELLED"
            )
            if not ended:
                await world.pool.execute("UPDATE pg_task SET error = 'no' WHERE id = $1", child)
                assert await world.pool.fetchval("SELECT wakeup_at <= now() FROM pg_task WHERE id = $1", parent)

    run(main())


def test_a_run_that_is_refused_its_pause_again_and_again_asks_ever_less_often() -> None:
    asked: list[list[Wait]] = []

    async def refuse(waits: list[Wait]) -> None:
        asked.append(waits)

    async def main() -> None:
        waits = Waits(refuse, lambda: datetime.now(UTC))
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


def test_nothing_is_recorded_without_the_lease(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            id = world.runs[0]
            await world.claim(id)
            await world.expire(id)
            await world.claim(id)
            late, current = world.leases[id]
            journal = world.journals[0]
            checkpoint = Checkpoint(1, "1", "step", "a", "1")
            row = ChildRow(world.runs[1], "flow", "{}", "default", 0)
            pause = Pause(late.seen_at, None, 0, "signal go", False, [])
            end: dict[str, Any] = {"output": "1", "error": None, "tried": 0, "forgotten": [], "version": 1}
            await world.signal(id)
            await world.pool.execute("UPDATE pg_task_runs SET state = 'ERROR'")
            for entry in (
                journal.adopt(late, "flow"),
                journal.record(late, checkpoint, 1),
                journal.spawn(late, checkpoint, 1, [row]),
                journal.take(late, Checkpoint(1, "1", "signal", "go"), 1),
                journal.pause(late, pause),
                journal.end(late, **end),
                journal.end(late, **{**end, "error": "no"}),
            ):
                with pytest.raises(RunStopped):
                    await entry
            found = await world.pool.fetchrow(
                "SELECT (SELECT count(*) FROM pg_task_checkpoints), (SELECT count(*) FROM pg_task_runs), "
                "(SELECT count(*) FROM pg_task_signals), (SELECT locked_by FROM pg_task), "
                "(SELECT state FROM pg_task_runs)"
            )
            assert tuple(found) == (0, 1, 1, current.token, "ERROR")
            await journal.adopt(current, "flow")
            assert await world.pool.fetchval("SELECT state FROM pg_task_runs") is None
            await journal.record(current, checkpoint, 1)
            assert await world.pool.fetchval("SELECT count(*) FROM pg_task_checkpoints") == 1

    run(main())


def test_a_locked_row_holds_up_its_own_run_only(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            locked, free = world.runs[0], uuid4()
            await world.pool.execute(
                statement("runs/trigger"), free, "flow", '{"flow":{"Run":null}}', None, None, "default", 0, None
            )
            world.leases[free] = []
            await world.claim(locked)
            await world.claim(free)
            journal = world.journals[0]
            async with world.pool.acquire() as connection:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", locked)
                waits = journal.record(world.leases[locked][0], Checkpoint(1, "1", "step", "a", "1"), 1)
                passes = journal.record(world.leases[free][0], Checkpoint(1, "1", "step", "a", "1"), 1)
                await asyncio.wait_for(passes, 1.5)
                assert not waits.done()
                await transaction.rollback()
            await asyncio.wait_for(waits, 5)

    run(main())


def test_a_row_that_stays_locked_is_looked_at_ever_less_often(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            id = world.runs[0]
            await world.claim(id)
            journal = world.journals[0]
            async with world.pool.acquire() as connection:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", id)
                waits = journal.record(world.leases[id][0], Checkpoint(1, "1", "step", "a", "1"), 1)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(waits), 1)
                assert 10 < journal._link.statements < 30  # two for each look, after 2, 4, 8, ... 250 ms
                await transaction.rollback()
            await asyncio.wait_for(waits, 5)

    run(main())


@pytest.mark.parametrize("kind", ["record", "spawn", "take"])
def test_a_run_that_gets_on_has_not_killed_its_worker(dsn: str, kind: str) -> None:
    """Claims that ended without an outcome count no more; a look for a signal that is not there proves nothing."""

    async def main() -> None:
        async with worlds(dsn) as world:
            id = world.runs[0]
            await world.pool.execute("UPDATE pg_task SET claims = 2")
            await world.claim(id)
            (lease,), journal = world.leases[id], world.journals[0]
            cleared: list[bool] = []
            lease.clear = lambda: cleared.append(True)
            if kind == "take":
                await world.take(lease, journal)
                assert await world.pool.fetchval("SELECT claims FROM pg_task WHERE id = $1", id) == 3
                assert not cleared
                await world.signal(id)
            await getattr(world, kind)(lease, journal)
            assert await world.pool.fetchval("SELECT claims FROM pg_task WHERE id = $1", id) == 1
            assert cleared == [True]

    run(main())


@pytest.mark.parametrize("kind", ["end", "pause"])
def test_a_deadlock_is_undone_and_the_statement_sent_again(dsn: str, kind: str) -> None:
    """Somebody has the record of one run and wants that of another, which the statement locks in the other order."""

    async def main() -> None:
        async with worlds(dsn) as world, world.pool.acquire() as other:
            for rounds in FAMILY:
                await asyncio.gather(*(world.happen(*event) for event in rounds))
            first, second = world.runs[:2]
            (lease,), journal = world.leases[first if kind == "pause" else second], world.journals[0]
            await other.execute("SET deadlock_timeout = '1min'")  # so that it is the journal that notices
            transaction = other.transaction()
            await transaction.start()
            # Both statements lock the record of the child, then that of its parent.
            await other.execute("SELECT FROM pg_task_runs WHERE id = $1 FOR UPDATE", first)
            entry: asyncio.Future[Any]
            if kind == "end":
                await world.pool.execute("UPDATE pg_task_runs SET awaited = true WHERE id = $1", second)
                entry = journal.end(lease, output="1", error=None, tried=0, forgotten=[], version=1)
            else:
                entry = journal.pause(lease, Pause(lease.seen_at, None, 0, "1 children of go", False, [second]))
            await until_locked_out(world)
            await other.execute("SELECT FROM pg_task_runs WHERE id = $1 FOR UPDATE", second)
            assert not entry.done()
            await transaction.commit()
            connection = journal._link.connection
            assert await asyncio.wait_for(entry, 10) is None
            assert journal._link.connection is connection, "it was opened anew"

    run(main())


def test_waiters_are_released_together_after_one_commit(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            id = world.runs[0]
            await world.claim(id)
            (lease,), journal = world.leases[id], world.journals[0]
            await journal.record(lease, Checkpoint(1, "1", "step", "first", "1"), 1)
            entries = [
                journal.record(lease, Checkpoint(number, str(number), "step", f"s{number}", "1"), None)
                for number in range(2, 302)
            ]
            await asyncio.gather(*entries)
            assert await world.pool.fetchval("SELECT count(DISTINCT recorded_at) FROM pg_task_checkpoints") == 2
            history = await journal.load(id)
            assert sorted(checkpoint.number for checkpoint in history.checkpoints) == list(range(1, 302))
            assert history.version == 1

    run(main())


def test_what_the_database_refuses_is_refused_to_its_own_run(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            id = world.runs[0]
            await world.claim(id)
            (lease,), journal = world.leases[id], world.journals[0]
            good = [journal.record(lease, Checkpoint(at, str(at), "step", f"s{at}", "1"), None) for at in range(1, 6)]
            bad = journal.record(lease, Checkpoint(9, "9", "step", "a NUL \0", "1"), None)
            await asyncio.gather(*good)
            with pytest.raises(DataRefused, match="22021"):
                await bad

    run(main())


def test_seconds_of_a_pause_are_told(dsn: str) -> None:
    """The worker that lets a run go looks again when it falls due, without a notification."""

    async def main() -> None:
        told: list[float] = []
        async with worlds(dsn) as world:
            journal = world.journals[0]
            journal._due_in = told.append
            id = world.runs[0]
            await world.claim(id)
            history = await journal.load(id)
            due_at = journal.now() + timedelta(seconds=7)
            pause = Pause(history.wakeup_at, due_at, 0, "sleep nap", False, [])
            assert await journal.pause(world.leases[id][0], pause) is None
        assert len(told) == 1
        assert 6 < told[0] <= 7

    run(main())


async def ahead(world: World, journal: Journal) -> float:
    """How many seconds the clock of a journal is ahead of that of the database."""
    now = await world.pool.fetchval("SELECT clock_timestamp()")
    return float((journal.now() - now).total_seconds())


@pytest.mark.parametrize("is_first", [True, False])
def test_a_load_that_waits_for_a_lock_does_not_put_the_clock_forward(dsn: str, is_first: bool) -> None:
    async def main() -> None:
        async with worlds(dsn) as world, world.pool.acquire() as other:
            journal = world.journals[0]
            if not is_first:
                await journal.load(world.runs[0])
            await other.execute("BEGIN; LOCK TABLE pg_task_checkpoints IN ACCESS EXCLUSIVE MODE")
            loading = journal.load(world.runs[0])
            await until_locked_out(world)
            await other.execute("SELECT pg_sleep(1); COMMIT")
            await loading
            assert abs(await ahead(world, journal)) < 0.5

    run(main())


def test_a_reply_that_is_read_late_does_not_put_the_clock_back(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            journal = world.journals[0]
            await journal.load(world.runs[0])
            statements = journal._link.statements
            loading = journal.load(world.runs[0])
            while journal._link.statements == statements:  # noqa: ASYNC110
                await asyncio.sleep(0)
            time.sleep(1)  # noqa: ASYNC251 - as a step that blocks the loop
            await loading
            assert abs(await ahead(world, journal)) < 0.5

    run(main())


def test_a_clock_of_the_database_that_was_set_is_followed(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            journal = world.journals[0]
            for wrong in (-60, 60):
                await journal.load(world.runs[0])
                journal._offset += wrong
                await journal.load(world.runs[0])
                assert abs(await ahead(world, journal)) < 0.5

    run(main())


async def until_locked_out(world: World) -> None:
    """Somebody waits for a lock."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
    while not await world.pool.fetchval(waiting):
        await world.pool.execute("SELECT pg_sleep(0.01)")


def test_what_comes_between_the_look_and_the_pause_is_seen(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            id, child = world.runs[:2]
            await world.claim(id)
            (lease,), journal = world.leases[id], world.journals[0]
            taken = await journal.take(lease, world.checkpoint(lease, "signal"), 1)
            assert taken.result is None
            await world.signal(id)
            seen = await journal.pause(lease, Pause(taken.wakeup_at, None, 0, "signal go", False, []))
            assert seen is not None
            assert seen > taken.wakeup_at
            await world.spawn(lease, journal)
            await world.claim(child)
            await world.end(world.leases[child][0], journal)
            assert await journal.pause(lease, Pause(seen, None, 0, "children", False, [child])) == seen

    run(main())


def test_nobody_takes_a_run_over_while_it_is_recorded(dsn: str) -> None:
    async def main() -> None:
        async with worlds(dsn) as world:
            id = world.runs[0]
            await world.claim(id)
            (lease,) = world.leases[id]
            columns = [[1], ["1"], ["step"], ["a"], ["1"], [], [], [0], [0.0], [1]]
            async with world.pool.acquire() as connection:
                transaction = connection.transaction()
                await transaction.start()
                assert await connection.fetchval(statement("journal/record"), [id], [lease.token], *columns) is None
                await world.expire(id)
                assert await world.pool.fetchval("SELECT locked_by FROM pg_task WHERE id = $1", id) == lease.token
                await transaction.commit()
            await world.expire(id)
            assert await world.pool.fetchval("SELECT locked_by FROM pg_task WHERE id = $1", id) is None

    run(main())
