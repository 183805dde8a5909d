"""A step that says when it began, and takes a moment."""

from __future__ import annotations

import asyncio

from pgtask import App, Context, Done, Task


class Naps(Task):
    """Short naps."""


class Nap(Naps):
    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("INSERT INTO begun DEFAULT VALUES")
        await asyncio.sleep(0.01)
        return Done()


app = App(Naps)
