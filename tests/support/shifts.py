"""Steps that say in a table, `told`, that they ran."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from fleet import Rows

from pgtask import App, Context, Done, Next, Policy, Task, Throttled

GONE = "SELECT count(*) FROM told WHERE text = 'go'"
TOLD = "CREATE TABLE IF NOT EXISTS told (number bigint GENERATED ALWAYS AS IDENTITY, text text)"


def told(rows: Rows) -> list[str]:
    rows(TOLD)
    return [row[0] for row in rows("SELECT text FROM told ORDER BY number")]


async def make_told(connection: Any) -> None:
    """Two sessions that make a table at once would fail."""
    await connection.execute("SELECT pg_advisory_lock(1)")
    await connection.execute(TOLD)
    await connection.execute("SELECT pg_advisory_unlock(1)")


async def tell(ctx: Context, text: str) -> None:
    async with ctx.db.acquire() as connection:
        await make_told(connection)
        await connection.execute("INSERT INTO told (text) VALUES ($1)", text)


class Tale(Task):
    """Steps of one kind each."""


class Tell(Tale):
    text: str

    async def run(self, ctx: Context) -> Done:
        if self.text:
            await tell(ctx, self.text)
        return Done()


class Shifts(Task):
    """Steps that expire in another way, or wait for a word."""


class Park(Tale):
    policy = Policy(on_expired="park")
    text: str

    async def run(self, ctx: Context) -> Done:
        await tell(ctx, self.text)
        return Done()


class Begin(Shifts):
    """Goes on with a step that is put off once, or with one that waits for a word."""

    waits: bool = False

    async def run(self, ctx: Context) -> Next[Put] | Next[Shift]:
        return Next(Shift("slow")) if self.waits else Next(Put("went on"))


class Put(Shifts):
    """Is put off when it first runs."""

    text: str

    async def run(self, ctx: Context) -> Done:
        await tell(ctx, self.text)
        if not await ctx.db.fetchval("SELECT count(*) > 1 FROM told WHERE text = $1", self.text):
            raise Throttled(timedelta(seconds=1.5))
        return Done()


class Shift(Shifts):
    text: str
    then: str = ""

    async def run(self, ctx: Context) -> Done | Next[Put]:
        async with ctx.db.acquire() as connection:
            await make_told(connection)
        while self.text == "slow" and not await ctx.db.fetchval(GONE):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await tell(ctx, self.text)
        return Next(Put(self.then)) if self.then else Done()


app: Any = App(Tale, Shifts)
