"""The stores of clients and the journals of runs, in Postgres and in memory, behind one interface.

A test that takes the fixture `stores` runs over both: `async with stores() as world`. What differs between the two in a
test is `World`, and nothing else. Five kinds of tests of runs stay with one of them:

- the clock: in memory it jumps to what is due next, in Postgres a sleep or a retry takes its time;
- the faults, replays and lists of `pgtask.testing.MemoryWorker`, which exist in memory only;
- locks, deadlocks, snapshots, privileges and triggers, which exist in Postgres only;
- rows that plain SQL, a flush or the reaper has written: a run without a record, a step that cannot be decoded, a task
  parked behind its journal;
- processes, connections and notifications: what a crash, an outage or a pooler does to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from writers import journaling

from pgtask import App, Client
from pgtask._fastpath import Handled, Requeue
from pgtask._memory.journal import MemoryJournal
from pgtask._memory.rows import FOREVER
from pgtask._postgres.store import Link
from pgtask._postgres.tasks import aware
from pgtask._workflow.entries import LoadHistory
from pgtask._workflow.executor import RunExecutor
from pgtask._workflow.journal import Journal
from pgtask._workflow.steps import StepRunner
from pgtask._workflow.values import Checkpoint
from pgtask.testing import MemoryClient


class World(ABC):
    """A client, a journal, and the workers that the test plays by itself."""

    client: Client
    journal: Journal

    def __init__(self) -> None:
        self.leases: dict[UUID, Any] = {}
        """The last lease of each run."""
        self.cleared: list[UUID] = []
        """Runs whose leases the journal has cleared: they have made progress."""

    def _lease(self, run: UUID, seen_at: datetime, tried: int) -> Any:
        self.leases[run] = lease = SimpleNamespace(
            id=run,
            token=uuid4(),
            label="flow.Run",
            seen_at=seen_at,
            tried=tried,
            is_running=True,
            clear_claims=lambda: self.cleared.append(run),
        )
        return lease

    async def drive(self, app: App, *, db: Any = None, resources: Any = None) -> None:
        """Play a worker until no run is due: claim each and execute it."""
        leases: dict[UUID, Any] = {}
        dispatcher: Any = PlayedDispatcher()
        with ThreadPoolExecutor(2) as threads:
            runner = StepRunner(dispatcher, threads, max_bytes=1_000_000, end_if_copy=lambda error: None)
            held: Any = leases
            executor = RunExecutor(app, held, dispatcher, journal=self.journal, runner=runner)
            while due := await self._due_run():
                step: Any = type("Run", (), {"workflow": due.name})()
                step.input = None if due.input is None else due.input.encode()
                lease = leases[due.id] = await self.claim(due.id)
                context: Any = SimpleNamespace(task_id=due.id, attempt=lease.tried + 1, db=db, resources=resources)
                outcome = await executor.execute(step, context)
                if isinstance(outcome, Requeue):
                    await self.expire(lease)
                    await self.change(due.id, wakeup_at=outcome.delay, tried=outcome.tried)
                else:
                    assert isinstance(outcome, Handled)

    async def _due_run(self) -> Any:
        now = await self.now()
        found = await self.client.runs(state="QUEUED")
        return next((one for one in reversed(found) if one.due_at is not None and one.due_at <= now), None)

    async def recorded(self, run: UUID) -> list[Checkpoint]:
        history = await self.journal.submit(LoadHistory(run))
        return sorted(history.checkpoints)

    @abstractmethod
    async def now(self) -> datetime: ...

    @abstractmethod
    async def claim(self, run: UUID) -> Any:
        """Lease a run; `seen_at` of the lease is the wakeup_at of its task."""

    @abstractmethod
    async def expire(self, lease: Any) -> None:
        """Release a lease without an outcome."""

    @abstractmethod
    async def task(self, run: UUID) -> dict[str, Any] | None:
        """The columns of a task that has a row."""

    @abstractmethod
    async def change(self, run: UUID, **columns: Any) -> None:
        """Set columns of a task; `wakeup_at` in seconds from now."""

    @abstractmethod
    async def pause(self, run: UUID, waits_on: str | None) -> None:
        """Make the record say that the run is paused for as long as its task waits forever."""


class PlayedDispatcher:
    """The part of a dispatcher that the executor of runs calls."""

    def __init__(self) -> None:
        self.table = SimpleNamespace(entry=lambda step: SimpleNamespace())
        self.draining = self.logs_finished = False
        self.errors = 0

    def is_interruption(self, error: BaseException) -> bool:
        return False

    def log_failed(self, *args: Any, **more: Any) -> None: ...

    def log_parked(self, *args: Any) -> None: ...


COLUMNS = ("wakeup_at", "tried", "claims", "error", "queue", "priority", "key")


class PostgresWorld(World):
    def __init__(self, client: Client, journal: Journal, pool: Any) -> None:
        super().__init__()
        self.client = client
        self.journal = journal
        self._pool = pool

    async def now(self) -> datetime:
        found: datetime = await self._pool.fetchval("SELECT clock_timestamp()")
        return found

    async def claim(self, run: UUID) -> Any:
        lease = self._lease(run, *await self._pool.fetchrow("SELECT wakeup_at, tried FROM pg_task WHERE id = $1", run))
        await self._pool.execute(
            "UPDATE pg_task SET locked_by = $2, lock_expires_at = now() + interval '1 hour', claims = claims + 1 "
            "WHERE id = $1",
            run,
            lease.token,
        )
        return lease

    async def expire(self, lease: Any) -> None:
        await self._pool.execute(
            "UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL WHERE locked_by = $1", lease.token
        )

    async def task(self, run: UUID) -> dict[str, Any] | None:
        query = f"SELECT locked_by IS NOT NULL AS is_leased, {', '.join(COLUMNS)} FROM pg_task WHERE id = $1"
        row = await self._pool.fetchrow(query, run)
        return None if row is None else {**row, "wakeup_at": aware(row["wakeup_at"])}

    async def change(self, run: UUID, **columns: Any) -> None:
        if (seconds := columns.pop("wakeup_at", 0)) != 0:
            due = "'infinity'" if seconds is None else f"now() + interval '{seconds} s'"
            await self._pool.execute(f"UPDATE pg_task SET wakeup_at = {due} WHERE id = $1", run)
        for name, value in columns.items():
            await self._pool.execute(f"UPDATE pg_task SET {name} = $2 WHERE id = $1", run, value)

    async def pause(self, run: UUID, waits_on: str | None) -> None:
        query = "UPDATE pg_task_runs SET waits_on = $2, paused_until = 'infinity' WHERE id = $1"
        await self._pool.execute(query, run, waits_on)


class MemoryWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self._client = self.client = MemoryClient()
        self._rows = self._client.rows
        self._leases: dict[UUID, Any] = {}
        leases: Any = self._leases
        self.journal = MemoryJournal(self._client.records, leases, set())

    async def now(self) -> datetime:
        return self._rows.now

    async def claim(self, run: UUID) -> Any:
        task = self._rows.tasks[run]
        task.state = "leased"
        task.claims += 1
        lease = self._leases[run] = self._lease(run, task.due_at, task.tried)
        return lease

    async def expire(self, lease: Any) -> None:
        del self._leases[lease.id]
        self._rows.release([lease.id])

    async def task(self, run: UUID) -> dict[str, Any] | None:
        task = self._rows.tasks[run]
        if not task.is_live:
            return None
        columns = {name: getattr(task, name) for name in COLUMNS if name != "wakeup_at"}
        return {"is_leased": task.state == "leased", "wakeup_at": task.due_at, **columns}

    async def change(self, run: UUID, **columns: Any) -> None:
        task = self._rows.tasks[run]
        for name, value in columns.items():
            if name == "wakeup_at":
                task.due_at = FOREVER if value is None else self._rows.now + timedelta(seconds=value)
            else:
                setattr(task, name, value)
        if columns.get("error") is not None:
            task.state = "parked"
            self._client.records.end(self._client.records.runs[run], "ERROR", error=columns["error"])
            self._rows.announce_parked(task)

    async def pause(self, run: UUID, waits_on: str | None) -> None:
        record = self._client.records.runs[run]
        record.waits_on, record.paused_until = waits_on, FOREVER


Stores = Callable[[], AbstractAsyncContextManager[World]]


@asynccontextmanager
async def in_memory() -> AsyncIterator[World]:
    yield MemoryWorld()


@asynccontextmanager
async def in_postgres(dsn: str) -> AsyncIterator[World]:
    link = Link(dsn, "pgtask worker 1 journal")
    async with (
        journaling(dsn, link) as journal,
        asyncpg.create_pool(dsn, min_size=1, max_size=2) as pool,
        Client(dsn) as client,
    ):
        yield PostgresWorld(client, journal, pool)


@pytest.fixture(params=["postgres", "memory"])
def stores(request: pytest.FixtureRequest) -> Stores:
    """Open the stores of a client and the journal of a worker, in Postgres and in memory."""
    if request.param == "memory":
        return in_memory
    dsn = request.getfixturevalue("dsn")
    return lambda: in_postgres(dsn)
