"""An app with schedules, the stage of a worker that starts them, and a clock of the database that a test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from pgtask import App, Context, Done, Next, Schedule, Task, WorkflowContext, workflow
from pgtask._occurrences import scheduled_time
from pgtask._postgres.store import Link
from pgtask._worker.schedules import Schedules

TABLE = "CREATE TABLE times (name text, first timestamptz, second timestamptz)"
CLOCK = """
CREATE SCHEMA clock;
CREATE TABLE clock.step (by interval NOT NULL);
INSERT INTO clock.step VALUES ('0');
CREATE FUNCTION clock.statement_timestamp() RETURNS timestamptz STABLE LANGUAGE sql AS
    'SELECT pg_catalog.statement_timestamp() + (SELECT by FROM clock.step)';
DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET search_path = clock, pg_catalog, public', current_database());
END $$;
"""


class Sweeps(Task):
    """Two steps, of which the second tells the times that both were scheduled for."""


class Sweep(Sweeps):
    name: str

    async def run(self, ctx: Context) -> Next[Tell]:
        return Next(Tell(self.name, ctx.scheduled_for))


class Tell(Sweeps):
    name: str
    first: datetime | None

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("INSERT INTO times VALUES ($1, $2, $3)", self.name, self.first, ctx.scheduled_for)
        return Done()


@workflow("count_up")
async def count_up(ctx: WorkflowContext, start: int) -> str:
    return f"{start} {ctx.scheduled_for and ctx.scheduled_for.isoformat()}"


app = App(
    Sweeps,
    count_up,
    schedules=[
        Schedule("each second", "* * * * * *", Sweep("each second"), missed="all", overlap="allow", max_missed=10_000),
        Schedule("each minute", "* * * * *", Sweep("each minute"), missed="all", overlap="allow"),
        Schedule("yearly", "@yearly", count_up, 3, zone="Europe/Berlin"),
    ],
)
slower = App(Sweeps, schedules=[Schedule("each minute", "*/2 * * * *", Sweep("each other minute"))])


class GatedLink(Link):
    """A connection on which the statement that starts tasks waits for a gate."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, "schedules")
        self.gate, self.arrived = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def once(self, name: str, *args: Any, deadline: float = 30) -> list[Any]:
        if name == "schedules/fire":
            self.arrived.set()
            await self.gate.wait()
        return await super().once(name, *args, deadline=deadline)


class Stage:
    """The stage of a worker of the app "scheduled:app", alone."""

    def __init__(self, dsn: str, schedules: Iterable[Schedule], app: str = "scheduled:app") -> None:
        self.link = GatedLink(dsn)
        self.stage = Schedules(self.link, app, {one.name: one for one in schedules})

    async def look(self) -> bool:
        return await self.stage.look()

    @asynccontextmanager
    async def held_before_fire(self) -> AsyncIterator[Callable[[], None]]:
        """Look, and hold it when it has planned; yield what lets it go on. It has ended at the end of the block."""
        self.link.gate.clear()
        self.link.arrived.clear()
        look = asyncio.create_task(self.look())
        await self.link.arrived.wait()
        yield self.link.gate.set
        await look


class Clock:
    """The clock of the database as schedules see it, on a connection of its own."""

    def __init__(self, db: Any) -> None:
        self.db = db

    async def set(self, shown: datetime) -> None:
        await self.db.execute("UPDATE clock.step SET by = $1 - pg_catalog.statement_timestamp()", shown)

    async def times(self) -> list[datetime]:
        """Return the occurrences whose tasks are in the table."""
        ids = [row[0] for row in await self.db.fetch("SELECT id FROM pg_task ORDER BY id")]
        return [time for time in map(scheduled_time, ids) if time is not None]

    async def row(self, name: str) -> Any:
        return await self.db.fetchrow("SELECT * FROM pg_task_schedules WHERE name = $1", name)


@asynccontextmanager
async def stages(dsn: str, *schedules: Schedule, count: int = 1) -> AsyncIterator[tuple[list[Stage], Clock]]:
    """Yield stages that have declared these schedules at noon, and the clock."""
    db = await asyncpg.connect(dsn)
    await db.execute(CLOCK)
    await db.execute("SET search_path = clock, pg_catalog, public")
    clock = Clock(db)
    await clock.set(NOON)
    made = [Stage(dsn, schedules) for _ in range(count)]
    try:
        for stage in made:
            await stage.look()
        yield made, clock
    finally:
        for stage in made:
            await stage.link.close()
        await db.close()


NOON = datetime(2026, 6, 1, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def at(minute: int) -> datetime:
    """Return the whole minute so many minutes after noon."""
    return NOON.replace(second=0) + minute * MINUTE
