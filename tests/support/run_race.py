"""A run, its child and its grandchild, to which events of several sessions happen at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
from writers import journaling

from pgtask._ids import first_id
from pgtask._postgres.runs import cancel_runs, resume_runs, send_signal
from pgtask._postgres.store import Link, statement
from pgtask._workflow.entries import (
    CollectResults,
    EndRun,
    LoadHistory,
    RecordCheckpoint,
    SpawnChildren,
    Suspend,
    TakeSignal,
)
from pgtask._workflow.journal import PostgresJournal
from pgtask._workflow.values import Checkpoint, ChildRow
from pgtask.errors import RunStopped

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


class RunRace:
    """Two workers' journals, connections of clients, and the answers of the journal to each run."""

    def __init__(self, pool: Any, journals: list[PostgresJournal]) -> None:
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
                SimpleNamespace(id=id, token=token, label="flow.Run", seen_at=wakeup_at, clear_claims=lambda: None)
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
        """Send a statement again after a deadlock, like a `Link`."""
        while True:
            with contextlib.suppress(asyncpg.DeadlockDetectedError):
                await self.pool.execute(query, *args)
                return

    # --- under a lease

    async def park(self, lease: Any, journal: PostgresJournal) -> None:
        """By the way of all tasks, as for a step that cannot be decoded."""
        moved = [[lease.id], [lease.token], [None], [1], ["not decoded"], [0.0], [None], [None], [None]]
        await self.again(statement("flush"), [], [], [], [], [], 0, *moved, False)

    async def write(self, lease: Any, entry: Awaitable[T]) -> T:
        """Return the answer of the journal, which must refuse an entry under a lease that was lost before."""
        is_late = lease is not self.leases[lease.id][-1]
        answer = await entry
        assert not is_late, "an entry under a lost lease was written"
        return answer

    def checkpoint(self, lease: Any, kind: str, **more: Any) -> Checkpoint:
        self.numbers[lease.id] += 1
        number = self.numbers[lease.id]
        return Checkpoint(number, str(number), kind, "go", **more)

    async def record(self, lease: Any, journal: PostgresJournal) -> None:
        await self.write(lease, journal.submit(RecordCheckpoint(lease, self.checkpoint(lease, "step", result="1"), 1)))

    async def fail_a_try(self, lease: Any, journal: PostgresJournal) -> None:
        """Of a step that was put off before, if there is one."""
        before = self.put_off.get(lease.id) or self.checkpoint(lease, "step", error="no", due_at=LONG_AGO)
        await self.write(lease, journal.submit(RecordCheckpoint(lease, before._replace(tried=before.tried + 1), None)))
        self.put_off[lease.id] = before._replace(tried=before.tried + 1)

    async def complete(self, lease: Any, journal: PostgresJournal) -> None:
        """Complete a step that was put off."""
        if before := self.put_off.pop(lease.id, None):
            await self.write(
                lease,
                journal.submit(RecordCheckpoint(lease, before._replace(result="1", error=None, due_at=None), None)),
            )

    async def take(self, lease: Any, journal: PostgresJournal, due_at: datetime | None = None) -> None:
        taken = await self.write(
            lease, journal.submit(TakeSignal(lease, self.checkpoint(lease, "signal", due_at=due_at), None))
        )
        lease.seen_at = taken.wakeup_at

    async def time_out(self, lease: Any, journal: PostgresJournal) -> None:
        await self.take(lease, journal, LONG_AGO)

    async def pause(self, lease: Any, journal: PostgresJournal) -> None:
        """Look for a signal, and suspend the run for one if there is none."""
        taken = await self.write(lease, journal.submit(TakeSignal(lease, self.checkpoint(lease, "signal"), None)))
        if taken.result is None:
            await self.write(lease, journal.submit(Suspend(lease, taken.wakeup_at, None, 0, "signal go", False, [])))

    async def wait_for_child(self, lease: Any, journal: PostgresJournal) -> None:
        child = self.child_of(lease.id)
        if child in self.spawned and not await journal.submit(CollectResults([child])):
            wakeup_at = (await journal.submit(LoadHistory(lease.id))).wakeup_at
            pause = Suspend(lease, wakeup_at, None, 0, "1 children of go", False, [child])
            await self.write(lease, journal.submit(pause))

    def child_of(self, id: UUID) -> UUID | None:
        at = self.runs.index(id) + 1
        return self.runs[at] if at < len(self.runs) else None

    async def spawn(self, lease: Any, journal: PostgresJournal) -> None:
        child = self.child_of(lease.id)
        if child is not None and child not in self.spawned:
            row = ChildRow(child, "flow", '{"flow":{"Run":null}}', "default", 0)
            await self.write(
                lease, journal.submit(SpawnChildren(lease, self.checkpoint(lease, "spawn", result="1"), None, [row]))
            )
            self.spawned.add(child)

    async def end(self, lease: Any, journal: PostgresJournal) -> None:
        last = self.checkpoint(lease, "step", result="1")._replace(name="last")
        await self.write(lease, journal.submit(EndRun(lease, 1, output=str(last.number), checkpoints=[last])))
        self.ends[lease.id] += 1

    async def fail(self, lease: Any, journal: PostgresJournal) -> None:
        end = journal.submit(EndRun(lease, output=None, error="it failed", tried=1, forgotten=[], version=1))
        await self.write(lease, end)


ILLEGAL = {
    "an end without the checkpoint that it carries": """
        SELECT count(*) FROM pg_task_runs r
        LEFT JOIN pg_task_checkpoints c ON c.run = r.id AND c.number::text = r.output
        WHERE r.state = 'SUCCESS' AND c.name IS DISTINCT FROM 'last'""",
    "the last checkpoint of a run that has not ended": """
        SELECT count(*) FROM pg_task_checkpoints c JOIN pg_task_runs r ON r.id = c.run
        WHERE c.name = 'last' AND r.state IS DISTINCT FROM 'SUCCESS'""",
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


@asynccontextmanager
async def open_race(dsn: str) -> AsyncIterator[RunRace]:
    async with (
        journaling(dsn, Link(dsn, "journal")) as one,
        journaling(dsn, Link(dsn, "journal")) as other,
        asyncpg.create_pool(dsn, min_size=4, max_size=4) as pool,
    ):
        await pool.execute("TRUNCATE pg_task, pg_task_runs, pg_task_checkpoints, pg_task_signals")
        race = RunRace(pool, [one, other])
        await race.trigger()
        yield race


async def play(dsn: str, rounds: list[list[tuple[str, int, int]]]) -> None:
    async with open_race(dsn) as race:
        await play_out(race, rounds)


async def play_out(race: RunRace, rounds: list[list[tuple[str, int, int]]]) -> None:
    resumed = False
    for events in rounds:
        race.ends.clear()
        await asyncio.gather(*(race.happen(*event) for event in events))
        is_resumed = any(what == "resume" for what, _, _ in events)
        resumed = resumed or is_resumed
        for what, query in ILLEGAL.items():
            assert await race.pool.fetchval(query) == 0, what
        assert await race.pool.fetchval(SIGNALS) == race.sent
        if not is_resumed:  # a run that is resumed may end again
            assert all(ends == 1 for ends in race.ends.values()), f"ended more than once: {race.ends}"
        if not resumed:  # a child that is resumed outlives its parent on purpose
            assert await race.pool.fetchval(ORPHANS) == 0


CLAIMED = [("claim", 0, 0)]
