"""Outcomes that enqueue what is no new task."""

from __future__ import annotations

from pgtask import Context, Done, Enqueue, Fail, Next, Task


class Spread(Task):
    pass


class Begin(Spread):
    async def run(self, ctx: Context) -> Next[Begin] | Done | Fail:
        if ctx.attempt == 1:
            return Done(enqueue=[3])  # wrong: mypy list-item, pyright reportArgumentType
        if ctx.attempt == 2:
            return Next(Begin(), enqueue=[Begin])  # wrong: mypy list-item, pyright reportArgumentType
        if ctx.attempt == 3:
            return Done(enqueue=Begin())  # wrong: mypy arg-type, pyright reportArgumentType
        if ctx.attempt == 4:
            return Done(enqueue=[Done()])  # wrong: mypy list-item, pyright reportArgumentType
        if ctx.attempt == 5:
            return Done(enqueue=[Enqueue(Begin(), after=5)])  # wrong: mypy arg-type, pyright reportArgumentType
        if ctx.attempt == 6:
            return Done(1, [Begin()])  # wrong: mypy call-arg, pyright reportCallIssue
        return Fail("enough", enqueue=[Begin()])  # wrong: mypy call-arg, pyright reportCallIssue
