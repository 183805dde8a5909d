"""A function goes on before the commit of what it has seen; nothing with an effect begins before that commit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import flows
import pytest
from fix_acts import act, act_late, did
from fix_database import run
from fix_stores import Stores, in_postgres
from watched import watch, watch_statements

from bench.workloads.workflows import five_steps, one_step
from pgtask import App, Policy, RunFailed, WorkflowContext, workflow

DAY = timedelta(days=1)
ONCE = Policy(retry_limit=0)


# --- commits


@workflow("gathering")
async def gathering(ctx: WorkflowContext, number: int) -> list[str]:
    return await ctx.gather(*(ctx.step(name, act_late, name) for name in "abc"))


@workflow("timely")
async def timely(ctx: WorkflowContext, number: int) -> float:
    return (await ctx.now()).timestamp()


@workflow("raising", policy=ONCE)
async def raising(ctx: WorkflowContext, number: int) -> None:
    await ctx.step("a", act, "a")
    raise ValueError("of the function")


@workflow("failing", policy=ONCE)
async def failing(ctx: WorkflowContext, number: int) -> None:
    await ctx.step("a", act, "a")
    await ctx.step("b", flows.refuse)


COMMITS = [(one_step, 0), (five_steps, 4), (gathering, 0), (timely, 0), (raising, 0), (failing, 1)]


@pytest.mark.parametrize(("flow", "before"), COMMITS, ids=lambda value: getattr(value, "name", ""))
def test_last_checkpoints_share_the_commit_of_the_end(dsn: str, flow: Any, before: int) -> None:
    async def main() -> None:
        async with in_postgres(dsn) as world:
            sent = watch_statements(world)
            started = await world.client.trigger(flow, 1)
            await world.drive(App(flow))
            assert sent == ["load", *["record"] * before, "end"]
            status = await started.status()
            assert (status.state in ("SUCCESS", "ERROR"), status.version) == (True, 1)
            assert status.started_at is not None
            assert status.recorded == {gathering: 3, five_steps: 5}.get(flow, 1)

    run(main())


def test_checkpoint_is_handed_over_before_its_commit(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            events = watch(world).events

            async def do(name: str) -> str:
                events.append(f"do {name}")
                return name

            @workflow("two")
            async def two(ctx: WorkflowContext) -> str:
                for name in "ab":
                    events.append(f"{await ctx.step(name, do, name)} is seen")
                return "ab"

            started = await world.client.trigger(two)
            await world.drive(App(two))
            assert await started.result() == "ab"
            assert events == [
                *("do a", "a is seen", "record a", "record a: durable"),
                *("do b", "b is seen", "end with b", "end with b: durable"),
            ]
            recorded = await world.recorded(started.id)
            assert [(one.number, one.name, one.result) for one in recorded] == [(1, "a", '"a"'), (2, "b", '"b"')]

    run(main())


# --- what waits


ASKS: dict[str, Callable[[WorkflowContext], Awaitable[Any]]] = {
    "do next": lambda ctx: ctx.step("next", ctx.resources, "next"),
    "record next": lambda ctx: ctx.sleep("next", DAY),
    "record now": lambda ctx: ctx.now(),
    "take next": lambda ctx: ctx.wait_for_signal("next"),
    "spawn next": lambda ctx: ctx.spawn("next", one_step, 1),
    "do in a branch": lambda ctx: ctx.gather(ctx.step("next", ctx.resources, "in a branch")),
}


@pytest.mark.parametrize("follows", ASKS)
@pytest.mark.parametrize("first", ["step", "value", "failure"])
def test_nothing_begins_before_what_was_seen_is_durable(stores: Stores, follows: str, first: str) -> None:
    async def main() -> None:
        async with stores() as world:
            events = watch(world).events

            async def do(name: str) -> None:
                events.append(f"do {name}")

            @workflow("asking")
            async def asking(ctx: WorkflowContext) -> None:
                if first == "step":
                    await ctx.step("first", act, "first")
                elif first == "value":
                    await ctx.random()
                else:
                    await ctx.gather(ctx.step("first", flows.refuse), return_exceptions=True)
                events.append("seen")
                await ASKS[follows](ctx)
                await ctx.step("after", act, "after")

            await world.client.trigger(asking)
            await world.drive(App(asking, one_step), resources=do)
            name = "random" if first == "value" else "first"
            assert events[:4] == ["seen", f"record {name}", f"record {name}: durable", follows]

    run(main())


def test_branch_waits_for_what_another_has_shown_meanwhile(stores: Stores) -> None:
    """Branches share variables: while B waits for its own commit, the function sees the result of A."""

    async def main() -> None:
        async with stores() as world:
            journal = watch(world)
            events = journal.events
            journal.may_answer.clear()

            async def end_behind_b0() -> None:
                async with asyncio.timeout(20):
                    while "record b0" not in events:  # noqa: ASYNC110
                        await asyncio.sleep(0)

            async def begin_b1() -> None:
                events.append("b1 begins")

            @workflow("two")
            async def two(ctx: WorkflowContext) -> None:
                async def branch_a() -> None:
                    await ctx.step("a", end_behind_b0)
                    events.append("a is seen")
                    journal.may_answer.set()

                async def branch_b() -> None:
                    await ctx.step("b0", act, "b0")
                    await ctx.step("b1", begin_b1)

                await ctx.gather(branch_a(), branch_b())

            await world.client.trigger(two)
            await world.drive(App(two))
            assert events.index("a is seen") < events.index("record a: durable") < events.index("b1 begins")

    run(main())


def test_run_is_suspended_after_its_checkpoints_are_durable(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            events = watch(world).events

            async def end_last() -> None:
                did.append("a")
                async with asyncio.timeout(20):
                    while "take go: durable" not in events:  # noqa: ASYNC110
                        await asyncio.sleep(0)

            @workflow("patient")
            async def patient(ctx: WorkflowContext) -> list[Any]:
                return await ctx.gather(ctx.wait_for_signal("go", int), ctx.step("a", end_last))

            started = await world.client.trigger(patient)
            await world.drive(App(patient))
            assert events[-4:] == ["record a", "record a: durable", "suspend", "suspend: durable"]
            await started.signal("go", 7)
            await world.drive(App(patient))
            assert (await started.result(), did) == ([7, None], ["a"])

    run(main())


def test_try_that_failed_is_durable_before_the_next_one(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            events = watch(world).events

            async def shaky() -> int:
                events.append("try")
                if events.count("try") < 3:
                    raise OSError("not now")
                return events.count("try")

            @workflow("trying")
            async def trying(ctx: WorkflowContext) -> int:
                return await ctx.step("a", shaky, policy=Policy(retry_limit=5, retry_delay=timedelta(0)))

            started = await world.client.trigger(trying)
            await world.drive(App(trying))
            assert await started.result() == 3
            assert [one for one in events if one != "suspend" and "suspend:" not in one] == [
                *("try", "record a", "record a: durable") * 2,
                *("try", "end with a", "end with a: durable"),
            ]
            assert [(one.number, one.result, one.due_at, one.tried) for one in await world.recorded(started.id)] == [
                (1, "3", None, 2)
            ]

    run(main())


def test_function_that_does_something_else_holds_nothing_back(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            events = watch(world).events

            @workflow("idle")
            async def idle(ctx: WorkflowContext) -> None:
                await ctx.step("a", act, "a")
                async with asyncio.timeout(20):
                    while "record a: durable" not in events:  # noqa: ASYNC110
                        await asyncio.sleep(0)
                events.append("goes on")

            await world.client.trigger(idle)
            await world.drive(App(idle))
            assert events == ["record a", "record a: durable", "goes on", "end", "end: durable"]

    run(main())


@pytest.mark.parametrize("is_first", [True, False])
def test_branch_does_not_begin_when_another_is_cut_off(stores: Stores, is_first: bool) -> None:
    """Both wait for the commit of a third one."""

    async def main() -> None:
        async with stores() as world:
            journal = watch(world)
            journal.may_answer.clear()

            @workflow("cut")
            async def cut(ctx: WorkflowContext) -> None:
                async def ask(name: str, seconds: float | None) -> None:
                    while "record a" not in journal.events:  # noqa: ASYNC110
                        await asyncio.sleep(0)
                    async with asyncio.timeout(seconds):
                        await ctx.step(name, act, name)

                asks = [ask("cut off", 0.05), ask("beside", None)]
                await ctx.gather(ctx.step("a", act, "a"), *(asks if is_first else reversed(asks)))

            started = await world.client.trigger(cut)
            await world.drive(App(cut))
            with pytest.raises(RunFailed, match=r"step 'cut off' was cut off by asyncio\.timeout"):
                await started.result(timeout=20)
            assert did == ["a"]

    run(main())


# --- tries and claims


def test_run_that_is_tried_again_has_its_last_checkpoint(stores: Stores) -> None:
    @workflow("stumbling", policy=Policy(retry_limit=1, retry_delay=timedelta(0)))
    async def stumbling(ctx: WorkflowContext) -> str:
        found = await ctx.step("a", act, "a")
        did.append("function")
        if did.count("function") == 1:
            raise OSError("not now")
        return found

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(stumbling)
            await world.drive(App(stumbling))
            assert (await started.result(), did) == ("a", ["a", "function", "function"])

    run(main())


@pytest.mark.parametrize("is_durable", [False, True])
def test_result_counts_the_tries_anew_before_its_commit_too(stores: Stores, is_durable: bool) -> None:
    async def main() -> None:
        async with stores() as world:
            events = watch(world).events

            @workflow("advancing", policy=Policy(retry_limit=1, retry_delay=timedelta(0)))
            async def advancing(ctx: WorkflowContext) -> None:
                did.append("function")
                if did.count("function") == 2:
                    await ctx.step("a", act, "a")
                    while is_durable and "record a: durable" not in events:  # noqa: ASYNC110
                        await asyncio.sleep(0)
                raise OSError("not now")

            started = await world.client.trigger(advancing)
            await world.drive(App(advancing))
            with pytest.raises(RunFailed):
                await started.result(timeout=20)
            # The second try has a result, so the one after it is the first again.
            assert did == ["function", "function", "a", "function"]
            assert (await started.status()).tried == 2

    run(main())


def test_claims_count_until_the_commit(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            seen: list[int] = []

            @workflow("claimed")
            async def claimed(ctx: WorkflowContext) -> None:
                for name in "ab":
                    await ctx.step(name, act, name)
                    seen.append(len(world.cleared))

            await world.client.trigger(claimed)
            await world.drive(App(claimed))
            assert seen == [0, 1]

    run(main())
