"""Wrong arguments of tasks that are functions, and functions that cannot be one."""

from __future__ import annotations

from datetime import timedelta

from pgtask import Context, Done, Fail, Next, Task, Throttled, task


class Other(Task):
    pass


class Step(Other):
    async def run(self, ctx: Context) -> Done:
        return Done()


@task("greet")
async def greet(ctx: Context, name: str, *, times: int = 1) -> Done | Fail:
    return Done()


greet()  # wrong: mypy call-arg, pyright reportCallIssue
greet(1)  # wrong: mypy arg-type, pyright reportArgumentType
greet("Ada", 2)  # wrong: mypy call-arg, pyright reportCallIssue
greet(nam="Ada")  # wrong: mypy call-arg, pyright reportCallIssue
greet("Ada").name  # wrong: mypy attr-defined, pyright reportAttributeAccessIssue  # noqa: B018


@task("none")  # wrong: mypy type-var, pyright reportArgumentType
async def none(ctx: Context, name: str) -> None:
    pass


@task("next")  # wrong: mypy type-var, pyright reportArgumentType
def goes_on(ctx: Context, name: str) -> Next[Step]:
    return Next(Step())


@task("name first")  # wrong: mypy arg-type, pyright reportArgumentType
async def name_first(name: str, ctx: Context) -> Done:
    return Done()


@task("policy", policy=3)  # wrong: mypy arg-type, pyright reportArgumentType
async def policy(ctx: Context) -> Done:
    if ctx.attempt:
        raise Throttled("soon")  # wrong: mypy arg-type, pyright reportArgumentType
    await greet.run("Ada", "Ada")  # wrong: mypy arg-type, pyright reportArgumentType
    await greet.run(ctx)  # wrong: mypy call-arg, pyright reportCallIssue
    raise Throttled(timedelta(seconds=1), 2)  # wrong: mypy arg-type, pyright reportArgumentType
