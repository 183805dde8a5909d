"""Tasks whose steps decide by themselves if and when they are tried again."""

from __future__ import annotations

from datetime import timedelta

from pgtask import App, Context, Done, Next, Permanent, Policy, Task, Transient


class Retry(Task):
    policy = Policy(retry_limit=4, retry_delay=timedelta(milliseconds=20))


class Waits(Retry):
    """Raises `Transient` so often, with this time in seconds."""

    seconds: float
    times: int = 1

    async def run(self, ctx: Context) -> Done:
        if ctx.attempt <= self.times:
            raise Transient(f"try {ctx.attempt}", retry_after=timedelta(seconds=self.seconds))
        return Done()


class WaitsInThread(Retry):
    seconds: float

    def run(self, ctx: Context) -> Done:
        if ctx.attempt == 1:
            raise Transient("in a thread", retry_after=timedelta(seconds=self.seconds))
        return Done()


class AsThePolicySays(Retry):
    async def run(self, ctx: Context) -> Done:
        if ctx.attempt == 1:
            raise Transient("no time of its own")
        return Done()


class Refuses(Retry):
    async def run(self, ctx: Context) -> Done:
        raise Permanent("it cannot be")


class RefusesInThread(Retry):
    def run(self, ctx: Context) -> Done:
        raise Permanent("it cannot be")


class RefusesLater(Retry):
    async def run(self, ctx: Context) -> Next[Refuses]:
        return Next(Refuses())


class Hides(Retry):
    """Only the exception itself counts, not its cause."""

    kind: str

    async def run(self, ctx: Context) -> Done:
        if ctx.attempt > 1:
            return Done()
        try:
            raise Permanent("inside") if self.kind == "permanent" else Transient("x", retry_after=timedelta(days=1))
        except Exception as error:
            raise ValueError("outside") from error


app = App(Retry)
