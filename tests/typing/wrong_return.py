# ruff: noqa: RET503
"""Steps that do not return an outcome on every way out."""

from __future__ import annotations

from pgtask import Context, Done, Fail, Next, Task


class Greeter(Task):
    pass


class Forgets(Greeter):
    name: str

    async def run(self, ctx: Context) -> Done:  # wrong: mypy return, pyright reportReturnType
        print(f"Hello, {self.name}")


class ForgetsSometimes(Greeter):
    name: str

    async def run(self, ctx: Context) -> Next[Forgets] | Done:  # wrong: mypy return, pyright reportReturnType
        if self.name:
            return Next(Forgets(self.name))


class ReturnsNothing(Greeter):
    async def run(self, ctx: Context) -> Done:
        return  # wrong: mypy return-value, pyright reportReturnType


class ReturnsTheStep(Greeter):
    async def run(self, ctx: Context) -> Next[Forgets]:
        return Forgets("x")  # wrong: mypy return-value, pyright reportReturnType


class ReturnsTheClass(Greeter):
    async def run(self, ctx: Context) -> Done:
        return Done  # wrong: mypy return-value, pyright reportReturnType


class Fails(Greeter):
    async def run(self, ctx: Context) -> Done:
        return Fail("not declared")  # wrong: mypy return-value, pyright reportReturnType


class FailsWithoutText(Greeter):
    async def run(self, ctx: Context) -> Fail:
        return Fail(ValueError())  # wrong: mypy arg-type, pyright reportArgumentType
