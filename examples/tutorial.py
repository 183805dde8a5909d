"""Greet the person who is named in a file. You run it in the README; docs/tutorial.md explains it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pgtask import App, Context, Done, Next, Policy, Task


class Greeter(Task):
    """A task is a closed family of steps; this class names the family."""


class ReadName(Greeter):
    policy = Policy(retry_limit=5, retry_delay=timedelta(seconds=1))
    filename: str

    async def run(self, ctx: Context) -> Next[SayHello]:
        name = Path(self.filename).read_text().strip()
        return Next(SayHello(name))


class SayHello(Greeter):
    name: str

    async def run(self, ctx: Context) -> Done:
        print(f"Hello, {self.name}")
        return Done()


app = App(Greeter)
