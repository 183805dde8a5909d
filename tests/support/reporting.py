"""A task whose steps report their progress, and go on when a file is there."""

from __future__ import annotations

import asyncio

from flows import wait_for_file

from pgtask import App, Context, Done, Next, Task


class Reporter(Task):
    pass


class Import(Reporter):
    """Reports 3 of 10, and goes on when its file is there."""

    path: str

    async def run(self, ctx: Context) -> Next[Check]:
        for number in range(4):
            ctx.progress(number, total=10)
        await asyncio.to_thread(wait_for_file, self.path)
        return Next(Check(self.path + ".2"))


class Check(Reporter):
    """Reports nothing, and is done when its file is there."""

    path: str

    async def run(self, ctx: Context) -> Done:
        await asyncio.to_thread(wait_for_file, self.path)
        return Done()


class CountInThread(Reporter):
    """Reports a number without a total, in a thread."""

    path: str

    def run(self, ctx: Context) -> Done:
        ctx.progress(1_000_000)
        wait_for_file(self.path)
        return Done()


app = App(Reporter)
