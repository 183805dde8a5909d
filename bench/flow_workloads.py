"""The workflows that are benchmarked. Their steps do nothing: what is measured is the journal."""

from __future__ import annotations

from datetime import timedelta

from pgtask import WorkflowContext, workflow

__all__ = ["five_steps", "many_steps", "one_step", "sleeper"]


async def nothing(number: int) -> int:
    return number


@workflow("bench_one")
async def one_step(ctx: WorkflowContext, number: int) -> int:
    return await ctx.step("one", nothing, number)


@workflow("bench_five")
async def five_steps(ctx: WorkflowContext, number: int) -> int:
    for name in ("one", "two", "three", "four", "five"):
        number = await ctx.step(name, nothing, number)
    return number


@workflow("bench_many")
async def many_steps(ctx: WorkflowContext, steps: int) -> int:
    """Records many steps, pauses, and is replayed when the signal comes."""
    for number in range(steps):
        await ctx.step(f"step {number}", nothing, number)
    return await ctx.wait_for_signal("go", int)


@workflow("bench_sleep")
async def sleeper(ctx: WorkflowContext) -> None:
    await ctx.sleep("a day", timedelta(days=1))
