"""An app for tests of the commands: `greeter:app`."""

from __future__ import annotations

from pgtask import App, Context, Done, Next, Task


class Greeter(Task):
    pass


class ReadName(Greeter):
    filename: str
    encoding: str = "utf-8"

    async def run(self, ctx: Context) -> Next[SayHello]:
        return Next(SayHello("you"))


class SayHello(Greeter):
    name: str = "world"

    async def run(self, ctx: Context) -> Done:
        return Done()


class Mailer(Task):
    pass


class Flush(Mailer):
    async def run(self, ctx: Context) -> Done:
        return Done()


class Send(Mailer):
    transparent = True
    address: str

    async def run(self, ctx: Context) -> Done:
        return Done()


class Other(Task):
    pass


def _other_flush() -> type[Task]:
    class Flush(Other):
        async def run(self, ctx: Context) -> Done:
            return Done()

    return Flush


OtherFlush = _other_flush()
app = App(Greeter, Mailer, Other)
APP = "greeter:app"
HELLO = '{"Greeter":{"SayHello":{"name":"you"}}}'
