"""Held leases: tasks whose rows a transaction has locked, beside those that are leased."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import reference
from dispatch_stage import SCRIPT, Act, Stage, Threaded, scripted
from jumping_loop import Clock, run_on

from pgtask import Context, Done, Task
from pgtask._fastpath import Marks, TaskLease, executing_held, lease_executing

PROVEN = 100  # runs of a class without suspending


def hold(dispatch: Stage, *steps: Task, claims: int = 0) -> list[TaskLease]:
    rows = [(uuid4(), reference.encode(SCRIPT.steps[type(step)], step), 0, claims, None, 0.0) for step in steps]
    leases, displaced = dispatch.held.hold(rows, UUID(int=7))
    assert displaced == []
    return leases


async def prove(dispatch: Stage) -> None:
    """Have the class `Act` end so often without suspending that it may be held."""
    await dispatch.all_outcomes(admit(dispatch, dispatch.claim(*[Act("ends")] * PROVEN)))


def admit(dispatch: Stage, leases: list[TaskLease]) -> list[TaskLease]:
    dispatch.admit(leases)
    return leases


async def until_started(dispatch: Stage) -> None:
    while dispatch.ready:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def ends(ctx: Context) -> Done:
    return Done()


async def pauses(ctx: Context) -> Done:
    await asyncio.sleep(0)
    return Done()


def test_outcomes_of_held_leases_have_a_buffer_of_their_own(clock: Clock) -> None:
    async def main(dispatch: Stage) -> None:
        await prove(dispatch)
        leases = admit(dispatch, hold(dispatch, Act("ends"), Act("ends")))
        await until_started(dispatch)
        assert len(dispatch.outcomes) == 0
        outcomes, unended, unstarted = dispatch.take_held()
        assert (outcomes.done, unended, unstarted) == (leases, [], [])
        assert [dispatch.held.get(lease.id) for lease in leases] == [None, None], "no row names their token"

    run_stage(clock, main)


def test_class_that_is_not_proven_does_not_run_while_held(clock: Clock) -> None:
    async def main(dispatch: Stage) -> None:
        leases = admit(dispatch, hold(dispatch, Act("ends"), Threaded("ends")))
        await until_started(dispatch)
        outcomes, unended, _ = dispatch.take_held()
        assert (len(outcomes), unended, dispatch.steps) == (0, leases, 0)
        dispatch.held.lease(unended, 1.0)
        assert [lease.in_turn for lease in unended] == [False, False]
        assert len(dispatch.held) == 2

    run_stage(clock, main)


def test_held_step_that_ends_after_a_pause_is_of_its_turn(clock: Clock) -> None:
    async def main(dispatch: Stage) -> None:
        await prove(dispatch)
        (lease,) = admit(dispatch, hold(dispatch, Act("pauses")))
        while lease.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0)
        outcomes, unended, _ = dispatch.take_held()
        assert (outcomes.done, unended) == ([lease], [])

    run_stage(clock, main)


def test_held_step_that_suspends_is_to_be_leased(clock: Clock) -> None:
    async def main(dispatch: Stage) -> None:
        await prove(dispatch)
        (lease,) = admit(dispatch, hold(dispatch, Act("comes")))
        while not lease.is_executing:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert dispatch.marks.held() == [lease.id.bytes]
        outcomes, unended, _ = dispatch.take_held()
        assert (len(outcomes), unended) == (0, [lease])
        dispatch.held.lease(unended, 1.0)
        go.set()
        assert (await dispatch.next_outcomes()).done == [lease]
        again = admit(dispatch, hold(dispatch, Act("ends")))
        await until_started(dispatch)
        assert dispatch.take_held()[1] == again, "its class is not proven any more"

    async def waits(ctx: Context) -> Done:
        await go.wait()
        return Done()

    go = asyncio.Event()
    run_stage(clock, main, comes=waits)


def test_unstarted_held_leases_leave_the_others_in_place(clock: Clock) -> None:
    async def main(dispatch: Stage) -> None:
        leases = hold(dispatch, Act("ends"))
        others = dispatch.claim(Act("ends"))
        dispatch.admit(leases + others)
        assert dispatch.take_held()[2] == leases
        assert list(dispatch.ready) == others
        await dispatch.all_outcomes(others)

    run_stage(clock, main)


def test_suspects_among_held_rows_make_no_lease(clock: Clock) -> None:
    async def main(dispatch: Stage) -> None:
        assert hold(dispatch, Act("ends"), claims=1) == []

    run_stage(clock, main)


def test_held_step_has_a_mark_that_the_end_of_its_turn_clears(clock: Clock) -> None:
    async def looks(ctx: Context) -> Done:
        seen.append((dispatch_marks[0].held(), dispatch_marks[0].executing(), dispatch_marks[0].holding_loop()))
        return Done()

    async def main(dispatch: Stage) -> None:
        dispatch_marks.append(dispatch.marks)
        await prove(dispatch)
        assert dispatch.marks.held() == []
        (lease,) = admit(dispatch, hold(dispatch, Act("looks")))
        await until_started(dispatch)
        id = lease.id.bytes
        assert seen == [([id], [id], id)]
        assert dispatch.marks.held() == [id], "what it left behind may kill the process"
        assert id in dispatch.marks.implicated()
        dispatch.marks.forget_held()
        assert dispatch.marks.held() == []
        assert id not in dispatch.marks.implicated()

    seen: list[Any] = []
    dispatch_marks: list[Marks] = []
    run_stage(clock, main, looks=looks)


def test_lease_of_executing_step_takes_it_out_of_its_turn(clock: Clock) -> None:
    async def blocks(ctx: Context) -> Done:
        (lease,) = executing_held()
        assert lease is not None
        assert lease_executing(stages[0].held, [lease], 5.0) == []
        assert lease_executing(stages[0].held, [lease], 5.0) == [lease]
        return Done()

    async def main(dispatch: Stage) -> None:
        stages.append(dispatch)
        await prove(dispatch)
        (lease,) = admit(dispatch, hold(dispatch, Act("blocks")))
        assert (await dispatch.next_outcomes()).done == [lease]
        assert len(dispatch.take_held()[0]) == 0
        assert lease.renewed == 5.0
        assert executing_held() == []

    stages: list[Stage] = []
    run_stage(clock, main, blocks=blocks)


def run_stage(clock: Clock, main: Any, **runs: Any) -> None:
    """Run a scenario with a stage whose steps have these functions."""

    async def play() -> None:
        with scripted(ends=ends, pauses=pauses, **runs) as (dispatch, _):
            await main(dispatch)

    run_on(clock, play())
