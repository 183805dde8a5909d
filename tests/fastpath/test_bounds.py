"""The bounds of the dispatcher: suspended steps, time in a turn of the loop, transitions under one lease."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import pytest
import reference
from dispatch_stage import Act, Moved, rows_of, scripted, suspended
from jumping_loop import Clock, run_on
from step_programs import turns

from pgtask import Context, Done, Next


@pytest.mark.parametrize("concurrency", [1, 3])
def test_suspended_steps_are_bounded_by_concurrency(clock: Clock, concurrency: int) -> None:
    async def main() -> None:
        with scripted(concurrency=concurrency) as (dispatch, scripts):
            leases = dispatch.claim(*[Act("waits")] * 20)
            dispatch.admit(leases)
            await turns(50)
            assert (dispatch.suspended, scripts.waiting) == (concurrency, concurrency)
            assert len(dispatch.ready) == 20 - concurrency
            scripts.gate.set()
            assert len(await dispatch.all_outcomes(leases)) == 20
            assert scripts.max_waiting == concurrency
            assert dispatch.suspended == 0

    run_on(clock, main())


def test_steps_without_suspension_pass_a_suspended_one(clock: Clock) -> None:
    async def main() -> None:
        with scripted(concurrency=2) as (dispatch, scripts):
            (waits,) = dispatch.claim(Act("waits"))
            others = dispatch.claim(*[Act("done")] * 20)
            dispatch.admit([waits, *others])
            assert len(await dispatch.all_outcomes(others)) == 20
            assert waits.is_open
            scripts.gate.set()
            await dispatch.all_outcomes([waits])

    run_on(clock, main())


def test_steps_without_suspension_yield_to_loop(clock: Clock) -> None:
    async def main() -> int:
        async def works(ctx: Context) -> Done:
            until = time.perf_counter() + 0.002
            while time.perf_counter() < until:
                pass
            return Done()

        with scripted(works=works) as (dispatch, _):
            leases = dispatch.claim(*[Act("works")] * 40)
            dispatch.admit(leases)
            count = 0
            while any(lease.is_open for lease in leases):
                await asyncio.sleep(0)
                count += 1
            assert len(dispatch.take_outcomes().done) == 40
            return count

    # 80 ms in slices of 5 ms, each of which ends at most one step of 2 ms too late.
    assert run_on(clock, main()) >= 11


@pytest.mark.parametrize("then_suspends", [False, True])
def test_runners_share_the_slice_of_a_turn(clock: Clock, then_suspends: bool) -> None:
    """Steps that await bring many runners. If each started a step that computes, they would hold the loop for long."""

    async def main() -> list[int]:
        turn = 0
        started: list[int] = []

        async def works(ctx: Context) -> Done:
            started.append(turn)
            until = time.perf_counter() + 0.006
            while time.perf_counter() < until:
                pass
            if then_suspends:
                await asyncio.sleep(0)
            return Done()

        with scripted(concurrency=50, suspended=suspended, works=works) as (dispatch, _):
            leases = dispatch.claim(*[Act("suspended")] * 100, *[Act("works")] * 20)
            dispatch.admit(leases)
            while any(lease.is_open for lease in leases):
                await asyncio.sleep(0)
                turn += 1
            assert len(dispatch.take_outcomes().done) == 120
        return started

    started = run_on(clock, main())
    assert len(started) == 20
    # One step of 6 ms is longer than a slice: no other starts in its turn of the loop. Our count may begin amid a turn.
    assert max(map(started.count, started)) <= 2


def test_task_is_rescheduled_after_max_transitions(clock: Clock) -> None:
    async def main() -> None:
        async def goes_on(ctx: Context) -> Next[Act]:
            return Next(Act("goes_on"))

        with scripted(goes_on=goes_on) as (dispatch, _):
            leases = dispatch.claim(Act("goes_on"), tried=3)
            dispatch.admit(leases)
            *kept, last = await dispatch.all_outcomes(leases)
            assert [entry.kind for entry in kept] == ["continued"] * reference.MAX_TRANSITIONS
            assert (last.kind, last.step, last.tried) == ("rescheduled", '{"Script":{"Act":{"name":"goes_on"}}}', 0)
            assert (last.error, last.delay, last.queue, last.priority) == (None, 0.0, None, None)
            assert dispatch.steps == reference.MAX_TRANSITIONS + 1

    run_on(clock, main())


def test_draining_reschedules_continued_task(clock: Clock) -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        return Next(Act("done"))

    async def main() -> None:
        with scripted(goes_on=goes_on) as (dispatch, _):
            dispatch.draining = True
            leases = dispatch.claim(Act("goes_on"))
            dispatch.admit(leases)
            (entry,) = await dispatch.all_outcomes(leases)
            assert (entry.kind, entry.step) == ("rescheduled", '{"Script":{"Act":{"name":"done"}}}')
            assert (entry.tried, entry.error, entry.delay) == (0, None, 0.0)

    run_on(clock, main())


def test_next_step_of_another_lane_reschedules_task(clock: Clock) -> None:
    async def to_other(ctx: Context) -> Next[Moved]:
        return Next(Moved("back"))

    async def back(ctx: Context) -> Next[Act]:
        return Next(Act("done"), after=timedelta(seconds=2))

    async def main() -> None:
        with scripted(to_other=to_other, back=back) as (dispatch, _):
            leases = dispatch.claim(Act("to_other"), Moved("back"))
            dispatch.admit(leases)
            outcomes = await dispatch.next_outcomes()
            assert outcomes.parameters()[-1], "other workers are told"
            there, back_again = rows_of(outcomes)
            assert (there.queue, there.priority, there.delay) == ("other", 5, 0.0)
            assert (back_again.queue, back_again.priority, back_again.delay) == ("default", 0, 2.0)

    run_on(clock, main())
