"""Tasks that each write rows in `ctx.transaction()`, in steps that follow one another, for tests that take something
away from under them. The table has no unique index: a second row of a step shows."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from pgtask import App, Context, Done, Next, Task

SINK = "CREATE TABLE sink (number integer NOT NULL, step text NOT NULL, pid integer NOT NULL)"


class Sinking(Task):
    """Two steps that write, and one that writes and ends."""


class Insert(Sinking):
    """Writes a row, and goes on here."""

    number: int

    async def run(self, ctx: Context) -> Next[Last]:
        await write(ctx, self.number, "Insert")
        return Next(Last(self.number))


class Last(Sinking):
    """Writes a row, and is done."""

    number: int

    async def run(self, ctx: Context) -> Done:
        await write(ctx, self.number, "Last")
        return Done()


class Rest(Sinking):
    """Writes a row, and stays in its transaction until the file is there."""

    number: int
    go: str

    async def run(self, ctx: Context) -> Done:
        await write(ctx, self.number, "Rest")
        while not Path(self.go).exists():  # noqa: ASYNC110, ASYNC240  a test makes the file
            await asyncio.sleep(0.02)
        return Done()


async def write(ctx: Context, number: int, step: str) -> None:
    async with ctx.transaction() as conn:
        await conn.execute("INSERT INTO sink VALUES ($1, $2, $3)", number, step, os.getpid())


app = App(Sinking)
