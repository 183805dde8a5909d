"""Batches that return something else than their annotation says, or are described by something that is no batch."""

from __future__ import annotations

from collections.abc import Sequence

from pgtask import Batch, BatchContext, Done, Fail, Next, Policy, Task


class Docs(Task):
    pass


class Embed(Docs):
    policy = Policy(batch=Batch("256"))  # wrong: mypy arg-type, pyright reportArgumentType
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Embed], ctx: BatchContext) -> list[Next[Store] | Fail]:
        if len(steps) > 5:
            return [Done()]  # wrong: mypy list-item, pyright reportReturnType
        return Next(Store(1))  # wrong: mypy return-value, pyright reportReturnType


class Store(Docs):
    policy = Policy(batch=Batch(10, linger=0.5))  # wrong: mypy arg-type, pyright reportArgumentType
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Store], ctx: BatchContext) -> Done:
        print(ctx.task_id)  # wrong: mypy attr-defined, pyright reportAttributeAccessIssue
        return [Done()]  # wrong: mypy return-value, pyright reportReturnType
