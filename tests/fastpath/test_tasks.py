"""Steps and their asyncio Tasks: each step sees the Task and the context that `create_task` would give it."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import asyncio
import collections
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from dispatch_stage import Act, Threaded, outcomes_of, scripted, suspended
from jumping_loop import Clock, run_on
from step_programs import VARIABLE, current_loop, me, turns

from pgtask import Context, Done, Next


def test_steps_without_suspension_share_a_task(clock: Clock) -> None:
    seen = set()

    async def looks(ctx: Context) -> Done:
        seen.add(me().get_name())
        return Done()

    assert {entry.kind for entry in outcomes_of(clock, *["looks"] * 50, looks=looks)} == {"done"}
    assert len(seen) < 10  # one for each slice of 5 ms


def test_suspended_step_keeps_its_own_task(clock: Clock) -> None:
    seen: list[tuple[asyncio.Task[Any], asyncio.Task[Any]]] = []

    async def looks(ctx: Context) -> Done:
        before = me()
        await asyncio.sleep(0)
        seen.append((before, me()))
        return Done()

    outcomes_of(clock, *["looks"] * 5, looks=looks)
    assert all(before is after for before, after in seen)
    assert len({id(task) for task, _ in seen}) == 5
    assert all(task.done() for task, _ in seen)


def test_stack_of_suspended_step_is_visible(clock: Clock) -> None:
    async def main() -> None:
        with scripted() as (dispatch, scripts):
            leases = dispatch.claim(Act("waits"))
            dispatch.admit(leases)
            await turns(2)
            (task,) = asyncio.all_tasks() - {asyncio.current_task()}
            assert [frame.f_code.co_qualname for frame in task.get_stack()] == ["Act.run"]
            scripts.gate.set()
            await dispatch.all_outcomes(leases)

    run_on(clock, main())


# Things that a step may do to its Task. The next step starts when it has ended, and must not share that Task.


def leaves_a_reference(kept: list[Any]) -> None:
    kept.append(me())


def leaves_a_weak_reference(kept: list[Any]) -> None:
    kept.append(weakref.ref(me()))


def leaves_a_weak_key(kept: list[Any]) -> None:
    kept.append(weakref.WeakKeyDictionary({me(): "state of the first step"}))


def leaves_a_handle(kept: list[Any]) -> None:
    current_loop().call_soon(me().cancel)


def leaves_a_timer(kept: list[Any]) -> None:
    current_loop().call_later(0, me().cancel)


def cancels(kept: list[Any]) -> None:
    me().cancel()


def cancels_and_takes_it_back(kept: list[Any]) -> None:
    me().cancel()
    me().uncancel()


def names_it(kept: list[Any]) -> None:
    me().set_name("named by the first step")


def adds_a_callback(kept: list[Any]) -> None:
    me().add_done_callback(kept.append)


TRACES = [
    leaves_a_reference,
    leaves_a_weak_reference,
    leaves_a_weak_key,
    leaves_a_handle,
    leaves_a_timer,
    cancels,
    cancels_and_takes_it_back,
    names_it,
    adds_a_callback,
]


@pytest.mark.parametrize("suspends_before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("leave", TRACES)
def test_step_traces_on_task_do_not_reach_later_steps(
    clock: Clock, leave: Callable[[list[Any]], None], fails: bool, suspends_before: bool
) -> None:
    kept: list[Any] = []
    ended = []

    async def first(ctx: Context) -> Done:
        if suspends_before:
            await asyncio.sleep(0)
        leave(kept)
        if fails:
            raise ValueError
        return Done()

    async def later(ctx: Context) -> Done:
        assert me().get_name() != "named by the first step"
        assert me().cancelling() == 0
        for thing in kept:
            if isinstance(thing, weakref.WeakKeyDictionary):
                assert me() not in thing
                continue
            task = thing() if isinstance(thing, weakref.ref) else thing
            assert task is not me()
            if task is not None:
                task.cancel()
        await suspended(ctx)
        ended.append(ctx.task_id)
        return Done()

    entries = outcomes_of(clock, "first", "later", "later", "done", concurrency=1, first=first, later=later)
    assert [(entry.kind, entry.error) for entry in entries[1:]] == [("done", None)] * 3
    assert len(ended) == 2


def test_task_callback_runs_when_step_ends(clock: Clock) -> None:
    async def main() -> None:
        called = asyncio.Event()

        async def first(ctx: Context) -> Done:
            me().add_done_callback(lambda task: called.set())
            return Done()

        async def later(ctx: Context) -> Done:
            async with asyncio.timeout(1):
                await called.wait()
            return Done()

        with scripted(first=first, later=later) as (dispatch, _):
            leases = dispatch.claim(Act("first"), Act("later"))
            dispatch.admit(leases)
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["done", "done"]

    run_on(clock, main())


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="eager tasks came with Python 3.12")
def test_eager_task_factory_does_not_disturb_dispatch() -> None:
    async def main() -> None:
        current_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009

        async def spawns(ctx: Context) -> Done:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(0))
                group.create_task(suspended(ctx))
            return Done()

        async def fails(ctx: Context) -> Done:
            async def at_once() -> None:
                raise ValueError

            async with asyncio.TaskGroup() as group:  # ends, cancelled and uncancelled, without suspending
                group.create_task(at_once())
            return Done()

        names = ["done", "spawns", "fails", "suspended"] * 5
        with scripted(concurrency=2, spawns=spawns, suspended=suspended, fails=fails) as (dispatch, _):
            leases = dispatch.claim(*map(Act, names))
            dispatch.admit(leases)
            entries = await dispatch.all_outcomes(leases)
        kinds = {entry.id: (entry.kind, entry.error is None) for entry in entries}
        expected = {"fails": ("rescheduled", False)}
        assert [kinds[lease.id] for lease in leases] == [expected.get(name, ("done", True)) for name in names]

    run_on("asyncio", main())


def test_dispatch_runs_in_debug_mode(clock: Clock) -> None:
    async def main() -> None:
        with scripted(suspended=suspended) as (dispatch, _):
            leases = dispatch.claim(*[Act("done"), Act("suspended")] * 5)
            dispatch.admit(leases)
            assert {entry.kind for entry in await dispatch.all_outcomes(leases)} == {"done"}

    run_on(clock, main(), debug=True)


def test_steps_see_context_of_lifespan(clock: Clock) -> None:
    """The worker makes the dispatcher before it enters the lifespan, and admits leases after that."""

    async def main() -> None:
        seen = []

        async def looks(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            await asyncio.sleep(0)
            return Done()

        def looks_in_thread(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            return Done()

        with scripted(concurrency=1, looks=looks, looks_in_thread=looks_in_thread) as (dispatch, _):
            VARIABLE.set("by the lifespan")
            leases = dispatch.claim(Act("looks"), Threaded("looks_in_thread"), Act("looks"))
            dispatch.admit(leases)
            await dispatch.all_outcomes(leases)
        assert seen == ["by the lifespan"] * 3

    run_on(clock, main())


def test_each_step_runs_in_its_own_copy_of_context(clock: Clock) -> None:
    async def main() -> None:
        VARIABLE.set("of the worker")
        seen = []

        async def sets(ctx: Context) -> Next[Act]:
            seen.append(VARIABLE.get())
            VARIABLE.set("of a step")
            await asyncio.sleep(0)
            seen.append(VARIABLE.get())
            return Next(Act("looks"))

        async def looks(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            VARIABLE.set("of a step that does not suspend")
            return Done()

        def in_thread(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            VARIABLE.set("of a thread")
            return Done()

        runs = {"sets": sets, "looks": looks, "in_thread": in_thread}
        with scripted(concurrency=1, **runs) as (dispatch, _):
            leases = dispatch.claim(
                Act("looks"), Threaded("in_thread"), Act("looks"), Act("sets"), Threaded("in_thread"), Act("looks")
            )
            dispatch.admit(leases)
            await dispatch.all_outcomes(leases)
        assert collections.Counter(seen) == {"of the worker": 7, "of a step": 1}
        assert VARIABLE.get() == "of the worker"

    run_on(clock, main())


@pytest.mark.parametrize(("name", "rounds"), [("done", 100), ("suspended", 20)])
def test_dispatcher_leaves_no_garbage(clock: Clock, name: str, rounds: int) -> None:
    """Reference counts free all that a step has used; the collector finds nothing."""

    async def main() -> None:
        with scripted(concurrency=100, suspended=suspended) as (dispatch, _):

            async def batch() -> None:
                leases = dispatch.claim(*[Act(name)] * 500)
                dispatch.admit(leases)
                await dispatch.all_outcomes(leases)
                for lease in leases:
                    dispatch.held.remove(lease)
                leases.clear()
                await turns(3)

            for _ in range(4):
                await batch()
            gc.collect()
            gc.disable()
            try:
                before = sys.getallocatedblocks()
                for _ in range(rounds):
                    await batch()
                after = sys.getallocatedblocks()
                garbage = gc.collect()
            finally:
                gc.enable()
            assert len(dispatch.held) == dispatch.suspended == 0
            assert garbage < 50
            assert after - before < rounds * 50, "blocks are left for each step"

    run_on(clock, main())
