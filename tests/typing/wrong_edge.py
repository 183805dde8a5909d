"""A step that goes on to a step its annotation does not name."""

from __future__ import annotations

from pgtask import Context, Done, Next, Outcome, Task


class Greeter(Task):
    pass


class ReadName(Greeter):
    filename: str

    async def run(self, ctx: Context) -> Next[SayHello]:
        return Next(ReadName("again"))  # wrong: mypy arg-type, pyright reportReturnType


class SayHello(Greeter):
    name: str

    async def run(self, ctx: Context) -> Next[ReadName] | Done:
        if self.name:
            return Next(SayHello(""))  # wrong: mypy arg-type, pyright reportReturnType
        return Next("ReadName")  # wrong: mypy arg-type, pyright reportReturnType


class Last(Greeter):
    def run(self, ctx: Context) -> Done:
        return Next(ReadName(""))  # wrong: mypy return-value, pyright reportReturnType


class Any(Greeter):
    def run(self, ctx: Context) -> Outcome[Last]:
        return Next(ReadName(""))  # wrong: mypy arg-type, pyright reportReturnType


class Unknown(Greeter):
    async def run(self, ctx: Context) -> Next[Missing]:  # wrong: mypy name-defined, pyright reportUndefinedVariable  # noqa: F821
        raise NotImplementedError
