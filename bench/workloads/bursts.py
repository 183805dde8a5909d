"""Tasks of the bursts whose workers are killed, and their app."""

from __future__ import annotations

import asyncio
import ctypes

from pgtask import App, Context, Done, Next, Task

__all__ = ["Begin", "Segfault", "Sleep", "app"]


class Burst(Task):
    """Three steps that do nothing, or one step that sleeps."""


class Begin(Burst):
    number: int

    async def run(self, ctx: Context) -> Next[Proceed]:
        return Next(Proceed(self.number))


class Proceed(Burst):
    number: int

    async def run(self, ctx: Context) -> Next[Finish]:
        await asyncio.sleep(0)  # so that some step is suspended at any time
        return Next(Finish(self.number))


class Finish(Burst):
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class Sleep(Burst):
    seconds: float

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(self.seconds)
        return Done()


class Poison(Task):
    """One step that ends its process."""


class Segfault(Poison):
    async def run(self, ctx: Context) -> Done:
        ctypes.string_at(0)
        return Done()


app = App(Burst, Poison)
