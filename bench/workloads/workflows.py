"""Workflows that are benchmarked. Their steps do nothing, so that the journal is what costs."""

from __future__ import annotations

from datetime import timedelta

from pgtask import WorkflowContext, workflow

__all__ = ["FIVE", "five_steps", "many_steps", "one_step", "sleeper"]

FIVE = ("one", "two", "three", "four", "five")
"""The steps of `five_steps`."""


async def nothing(number: int) -> int:
    return number


@workflow("bench_one")
async def one_step(ctx: WorkflowContext, number: int) -> int:
    return await ctx.step("one", nothing, number)


@workflow("bench_five")
async def five_steps(ctx: WorkflowContext, number: int) -> int:
    for name in FIVE:
        number = await ctx.step(name, nothing, number)
    return number


@workflow("bench_many")
async def many_steps(ctx: WorkflowContext, steps: int) -> int:
    """Record many steps, wait for a signal, and so be replayed when it arrives."""
    for number in range(steps):
        await ctx.step(f"step {number}", nothing, number)
    return await ctx.wait_for_signal("go", int)


@workflow("bench_sleep")
async def sleeper(ctx: WorkflowContext) -> None:
    await ctx.sleep("a day", timedelta(days=1))
