"""Steps that enqueue other steps with clients of their own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pgtask import App, Client, Context, Done, Task


class Relay(Task):
    pass


class Begin(Relay):
    """Enqueues by the client of the lifespan, by one of its own, and by one in a process that it forks."""

    other: str

    async def run(self, ctx: Context) -> Done:
        client: Client = ctx.resources
        await client.enqueue(Note(f"lifespan {client._postgres.listens}"))
        async with Client() as own:
            await own.enqueue(Note("step"))
        await asyncio.to_thread(self._in_a_fork)
        async with Client(self.other) as explicit:
            await explicit.enqueue(Note("explicit"))
        return Done()

    def _in_a_fork(self) -> None:
        pid = os.fork()
        if not pid:
            try:
                asyncio.run(enqueue("fork"))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)


async def enqueue(text: str) -> None:
    async with Client() as client:
        await client.enqueue(Note(text))


class Note(Relay):
    text: str

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("INSERT INTO noted VALUES ($1)", self.text)
        return Done()


@asynccontextmanager
async def lifespan() -> AsyncIterator[Client]:
    async with Client() as client:
        yield client


app = App(Relay, lifespan=lifespan)
