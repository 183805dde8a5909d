"""Work that goes on until it is told to end, for tests that take something away from under it: a chain of short steps,
and a workflow that records one step after the other. Neither uses the database itself, so that its outcomes alone say
how often it has happened."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

from pgtask import App, Context, Done, Next, Policy, Task, WorkflowContext, workflow

LEDGER = """
CREATE TABLE ledger (task uuid, step text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO ledger VALUES (OLD.id, OLD.step);
    RETURN NULL;
END$$;
CREATE TRIGGER note_next AFTER UPDATE ON pg_task FOR EACH ROW WHEN (OLD.step IS DISTINCT FROM NEW.step)
    EXECUTE FUNCTION note();
CREATE TRIGGER note_done AFTER DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION note();
"""
"""Each outcome that takes effect, by the step that had it."""


class Ticking(Task):
    """Chains of one kind."""


class Tick(Ticking):
    """Is followed by the next one, until the file `go` is there."""

    go: str
    number: int = 0

    async def run(self, ctx: Context) -> Next[Tick] | Done:
        await asyncio.sleep(0.02)
        return Done() if Path(self.go).exists() else Next(Tick(self.go, self.number + 1))


class Once(Ticking):
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class Uses(Ticking):
    """Has a query of its own, which is all that it does."""

    number: int

    async def run(self, ctx: Context) -> Done:
        await ctx.db.fetchval("SELECT 1")
        return Done()


async def look(go: str) -> bool:
    await asyncio.sleep(0.05)
    return Path(go).exists()


@workflow("ticking", policy=Policy(retry_limit=0, retry_delay=timedelta(seconds=1)))
async def ticking(ctx: WorkflowContext, go: str) -> int:
    """The number of its steps."""
    number = 0
    while not await ctx.step(f"step {number}", look, go):
        number += 1
    return number + 1


app = App(Ticking, ticking)
