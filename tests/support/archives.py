"""Tasks that are kept when they are finished, beside some that are not."""

from __future__ import annotations

from datetime import timedelta

from pgtask import App, Context, Done, Next, Policy, Task


class Kept(Task):
    archive = True


class Begin(Kept):
    number: int = 0

    async def run(self, ctx: Context) -> Next[End]:
        return Next(End(self.number))


class End(Kept):
    policy = Policy(retry_limit=1, retry_delay=timedelta(0))
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        if self.number == 1 and ctx.attempt == 1:
            raise RuntimeError("not yet")
        if self.number == 2:
            raise RuntimeError("never")
        return Done()


class Plain(Task):
    """A task with the archive setting of its app."""


class Once(Plain):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        return Done()


class Secret(Task):
    archive = False


class Whisper(Secret):
    async def run(self, ctx: Context) -> Done:
        return Done()


app = App(Kept, Plain, Secret)
keeps_all = App(Kept, Plain, Secret, archive=True)
