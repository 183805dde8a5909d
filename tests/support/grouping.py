"""An app whose tasks are members of groups."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import msgspec

from pgtask import App, Batch, BatchContext, Context, Done, Fail, Next, Policy, Task


class Page(msgspec.Struct):
    """A result."""

    url: str


class Crawl(Task):
    """The members, and the step at the end of their group."""


class Fetch(Crawl):
    """Returns a page, and enqueues others: `links` of them, each with `depth` less."""

    url: str
    links: int = 0
    depth: int = 0

    async def run(self, ctx: Context) -> Done:
        links = self.links if self.depth else 0
        urls = [f"{self.url}/{number}" for number in range(links)]
        return Done(Page(self.url), enqueue=[Fetch(url, self.links, self.depth - 1) for url in urls])


class Walk(Crawl):
    """Goes on by `Next` as often as it says, and returns nothing."""

    left: int
    links: int = 0

    async def run(self, ctx: Context) -> Next[Walk] | Done:
        if self.left:
            return Next(
                Walk(self.left - 1, self.links),
                enqueue=[Fetch(f"{self.left}.{number}") for number in range(self.links)],
            )
        return Done()


class Break(Crawl):
    """Is parked, unless the file exists."""

    file: str = ""

    async def run(self, ctx: Context) -> Done | Fail:
        is_whole = self.file and Path(self.file).exists()  # noqa: ASYNC240
        return Done() if is_whole else Fail("broken 17")


class Wait(Crawl):
    """Counts its start in a directory, and runs until the file `go` is there."""

    directory: str
    goes_on: bool = False

    async def run(self, ctx: Context) -> Next[Wait] | Done:
        Path(self.directory, f"{os.getpid()}-{ctx.task_id}-{self.goes_on}").touch()  # noqa: ASYNC240
        while not Path(self.directory, "go").exists():  # noqa: ASYNC110, ASYNC240  a test makes the file
            await asyncio.sleep(0.01)
        return Next(Wait(self.directory)) if self.goes_on else Done(1)


class Insert(Crawl):
    """Writes a row together with its outcome."""

    number: int

    async def run(self, ctx: Context) -> Done:
        async with ctx.transaction() as db:
            await db.execute("INSERT INTO mark (step) VALUES ($1)", f"insert {self.number}")
        return Done(self.number)


class Gather(Crawl):
    """Runs in batches."""

    policy = Policy(batch=Batch(20, linger=timedelta(milliseconds=20)))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Gather], ctx: BatchContext) -> list[Done | Fail]:
        return [Fail("thirteen") if step.number == 13 else Done(step.number) for step in steps]


class Odd(Crawl):
    """Returns what no JSON can say."""

    async def run(self, ctx: Context) -> Done:
        return Done(object())


class Confused(Crawl):
    """Returns the steps that it has meant to enqueue."""

    async def run(self, ctx: Context) -> Done:
        return Done([Fetch("a")])


class Report(Crawl):
    """The step at the end."""

    group: str

    async def run(self, ctx: Context) -> Done:
        db = ctx.db
        await db.execute("INSERT INTO mark (step) VALUES ($1)", f"then {self.group}")
        return Done()


class Kept(Task):
    """Members that are kept in the archive."""

    archive = True


class Keep(Kept):
    """Returns its number."""

    number: int

    async def run(self, ctx: Context) -> Done:
        return Done(self.number)


app = App(Crawl, Kept)
