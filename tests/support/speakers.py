"""Steps that log a number twice, and suspend in between or not."""

from __future__ import annotations

import asyncio
import logging

from pgtask import App, Context, Done, Task


class Speakers(Task):
    """The family of steps."""


class Speak(Speakers):
    number: int
    suspends: bool

    async def run(self, ctx: Context) -> Done:
        log = logging.getLogger("speakers")
        log.info("%d", self.number)
        if self.suspends:
            await asyncio.sleep(0)
        log.info("%d", self.number)
        return Done()


class SpeakLate(Speakers):
    number: int

    async def run(self, ctx: Context) -> Done:
        log = logging.getLogger("speakers")
        log.info("%d", self.number)
        if self.number >= 300:
            await asyncio.sleep(0)
            await asyncio.gather(asyncio.to_thread(log.info, "%d", self.number), asyncio.sleep(0))
        return Done()


app = App(Speakers)
