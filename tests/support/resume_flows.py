"""Workflows that fail as long as a file is missing. Each call of a step leaves a mark."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from flows import mark

from pgtask import App, Permanent, RunFailed, StepFailed, WorkflowContext, workflow


def need(file: str, name: str) -> None:
    if not Path(file).exists():
        raise Permanent(f"{name} is down")


async def fragile(db: Any, run: UUID, name: str, file: str) -> str:
    await mark(db, run, name)
    need(file, name)
    return name


async def ask(ctx: WorkflowContext, name: str, file: str) -> str:
    return await ctx.step(name, fragile, ctx.db, ctx.run_id, name, file)


async def undo(ctx: WorkflowContext, name: str) -> None:
    await ctx.step(f"undo {name}", mark, ctx.db, ctx.run_id, f"undo {name}")


@workflow("undoing")
async def undoing(ctx: WorkflowContext, file: str) -> None:
    """Undoes what it did, and fails all the same."""
    await ctx.step("book", mark, ctx.db, ctx.run_id, "book")
    try:
        await ask(ctx, "pay", file)
    except StepFailed:
        await undo(ctx, "book")
        raise
    await ctx.step("ship", mark, ctx.db, ctx.run_id, "ship")


@workflow("noting")
async def noting(ctx: WorkflowContext, file: str) -> str:
    """Catches a failure, and raises it again without having asked for anything."""
    try:
        return await ask(ctx, "pay", file)
    except StepFailed as failure:
        failure.add_note("it is noted")
        raise


@workflow("many")
async def many(ctx: WorkflowContext, file: str) -> list[Any]:
    return await ctx.gather(ask(ctx, "a", file), ctx.gather(ask(ctx, "b", file), ask(ctx, "c", file)))


@workflow("many_by_hand")
async def many_by_hand(ctx: WorkflowContext, file: str) -> list[Any]:
    found = await ctx.gather(ask(ctx, "a", file), ask(ctx, "b", file), return_exceptions=True)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


@workflow("one_undone")
async def one_undone(ctx: WorkflowContext, file: str) -> list[Any]:
    """Of two branches that fail, one has undone what it did."""

    async def undone() -> str:
        try:
            return await ask(ctx, "b", file)
        except StepFailed:
            await undo(ctx, "b")
            raise

    return await ctx.gather(ask(ctx, "a", file), undone())


@workflow("all_undone")
async def all_undone(ctx: WorkflowContext, file: str) -> list[Any]:
    try:
        return await ctx.gather(ask(ctx, "a", file), ask(ctx, "b", file))
    except StepFailed:
        await undo(ctx, "both")
        raise


@workflow("child_of")
async def child_of(ctx: WorkflowContext, file: str) -> str:
    return await ask(ctx, "child", file)


@workflow("parent_of")
async def parent_of(ctx: WorkflowContext, file: str) -> str:
    child = await ctx.spawn("child", child_of, file)
    return await child


@workflow("parent_undoing")
async def parent_undoing(ctx: WorkflowContext, file: str) -> str:
    child = await ctx.spawn("child", child_of, file)
    try:
        return await child
    except RunFailed:
        await undo(ctx, "child")
        raise


@workflow("hearing")
async def hearing(ctx: WorkflowContext) -> int:
    return await ctx.wait_for_signal("go", int)


@workflow("hearing_soon")
async def hearing_soon(ctx: WorkflowContext, seconds: float) -> int:
    return await ctx.wait_for_signal("go", int, timeout=timedelta(seconds=seconds))


_SAGAS = (undoing, noting, many, many_by_hand, one_undone, all_undone)
app = App(*_SAGAS, child_of, parent_of, parent_undoing, hearing, hearing_soon)
