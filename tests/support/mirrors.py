"""A task that brings a copy up to date: it reads a value when it starts, and writes what it has read when it ends."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from pgtask import App, Context, Done, Policy, Task

TABLES = (
    "CREATE TABLE original (name integer PRIMARY KEY, value integer NOT NULL)",
    "CREATE TABLE copy (name integer PRIMARY KEY, value integer NOT NULL)",
)


class Mirror(Task):
    """One step for each name."""


class BringUpToDate(Mirror):
    policy = Policy(retry_limit=100)
    name: int

    async def run(self, ctx: Context) -> Done:
        value = await ctx.db.fetchval("SELECT value FROM original WHERE name = $1", self.name)
        await asyncio.sleep(random.choice([0, 0, 0.002, 0.01]))
        await ctx.db.execute(
            "INSERT INTO copy VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = greatest(copy.value, $2)",
            self.name,
            value,
        )
        return Done()


app: Any = App(Mirror)
