"""Steps that do not come to their own end: a timeout, a lost lease, a worker that leaves."""

from __future__ import annotations

import asyncio

import pytest
from dispatch_stage import Act, Timed, scripted, suspended
from jumping_loop import Clock, run_on
from step_programs import turns

from pgtask import Context, Done, Next


def test_timeout_cancels_step_and_counts_as_failed_try(clock: Clock) -> None:
    async def main() -> None:
        with scripted() as (dispatch, scripts):
            first, second = [dispatch.claim(Timed("waits"), tried=tried)[0] for tried in (0, 1)]
            dispatch.admit([first, second])
            retried, parked = await dispatch.all_outcomes([first, second])
            assert (retried.id, retried.tried, retried.error, retried.delay) == (first.id, 1, None, 1.0)
            assert (parked.id, parked.tried) == (second.id, 2)
            text = "Script.Timed ran longer than its timeout of 0.005 s"
            assert parked.error == text
            assert scripts.cancelled == 2
            assert (dispatch.errors, dispatch.suspended) == (2, 0)

    run_on(clock, main())


def test_step_that_ends_in_time_is_not_cancelled_later() -> None:
    async def main() -> None:
        with scripted(concurrency=1, suspended=suspended) as (dispatch, _):
            leases = dispatch.claim(Timed("suspended"), Act("sleeps"))
            dispatch.resources["sleeps"] = lambda ctx: asyncio.sleep(0.02, Done())
            dispatch.admit(leases)
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["done", "done"]

    run_on("asyncio", main())


def test_timeout_does_not_apply_to_the_next_step() -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        await asyncio.sleep(0)
        return Next(Act("sleeps"))

    async def sleeps(ctx: Context) -> Done:
        await asyncio.sleep(0.02)
        return Done()

    async def main() -> None:
        with scripted(goes_on=goes_on, sleeps=sleeps) as (dispatch, _):
            leases = dispatch.claim(Timed("goes_on"))
            dispatch.admit(leases)
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["continued", "done"]

    run_on("asyncio", main())


def test_outcome_returned_during_timeout_counts(clock: Clock) -> None:
    async def insists(ctx: Context) -> Done:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return Done()
        raise AssertionError

    async def breaks(ctx: Context) -> Done:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("while cleaning up") from None
        raise AssertionError

    async def main() -> None:
        with scripted(insists=insists, breaks=breaks) as (dispatch, _):
            (first,), (second,) = dispatch.claim(Timed("insists")), dispatch.claim(Timed("breaks"), tried=5)
            dispatch.admit([first, second])
            entries = {entry.id: entry for entry in await dispatch.all_outcomes([first, second])}
            assert entries[first.id].kind == "done"
            assert (entries[second.id].error or "").startswith("ValueError: while cleaning up")

    run_on(clock, main())


def test_survived_timeout_does_not_mark_the_next_step(clock: Clock) -> None:
    async def survives(ctx: Context) -> Next[Act]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return Next(Act("cancels_itself"))
        raise AssertionError

    async def cancels_itself(ctx: Context) -> Done:
        raise asyncio.CancelledError

    async def main() -> None:
        with scripted(survives=survives, cancels_itself=cancels_itself) as (dispatch, _):
            leases = dispatch.claim(Timed("survives"))
            dispatch.admit(leases)
            kept, parked = await dispatch.all_outcomes(leases)
            assert kept.kind == "continued"
            text = "Script.Act was cancelled from within: it raised CancelledError"
            assert parked.error == text

    run_on(clock, main())


def test_lost_lease_is_not_started(clock: Clock) -> None:
    async def main() -> None:
        with scripted(concurrency=1) as (dispatch, scripts):
            leases = dispatch.claim(Act("waits"), Act("done"), Act("done"))
            dispatch.admit(leases)
            await turns(2)
            dispatch.drop_lost(leases[1])
            assert dispatch.held.get(leases[1].id) is None
            assert not leases[1].is_open
            scripts.gate.set()
            entries = await dispatch.all_outcomes(leases)
            assert [entry.id for entry in entries] == [leases[0].id, leases[2].id]
            assert dispatch.steps == 2

    run_on(clock, main())


@pytest.mark.parametrize("how", ["is cancelled", "swallows it", "raises another"])
def test_lost_step_is_cancelled_and_its_outcome_dropped(clock: Clock, how: str) -> None:
    async def lasts(ctx: Context) -> Next[Act]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if how == "is cancelled":
                raise
            if how == "raises another":
                raise ValueError from None
        return Next(Act("done"))

    async def main() -> None:
        with scripted(concurrency=1, lasts=lasts) as (dispatch, _):
            lost, other = leases = dispatch.claim(Act("lasts"), Act("done"))
            dispatch.admit(leases)
            await turns(2)
            dispatch.drop_lost(lost)
            assert [entry.id for entry in await dispatch.all_outcomes(leases)] == [other.id]
            assert (dispatch.suspended, dispatch.errors) == (0, 0)
            assert len(dispatch.held) == 1

    run_on(clock, main())


def test_lease_lost_after_its_step_is_not_continued(clock: Clock) -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        return Next(Act("done"))

    async def main() -> None:
        with scripted(goes_on=goes_on) as (dispatch, _):
            (lease,) = dispatch.claim(Act("goes_on"))
            dispatch.admit([lease])
            outcomes = await dispatch.next_outcomes()
            dispatch.drop_lost(lease)
            dispatch.start_next_steps([lease for lease, _ in outcomes.continued])
            await turns(5)
            assert (dispatch.steps, len(dispatch.outcomes), len(dispatch.ready)) == (1, 0, 0)

    run_on(clock, main())


def test_stopped_step_leaves_its_lease_open() -> None:
    async def main() -> None:
        with scripted(concurrency=2) as (dispatch, scripts):
            leases = dispatch.claim(Act("waits"), Timed("waits"), Act("done"), tried=2)
            running, hurried, ready = leases
            dispatch.admit(leases)
            await turns(3)
            dispatch.cancel_step(running)
            dispatch.cancel_step(hurried)
            dispatch.cancel_step(ready)
            await turns(3)
            assert scripts.cancelled == 2
            outcomes = dispatch.take_outcomes()
            assert [lease.id for lease in outcomes.done] == [ready.id]  # it had not started, so it was not cancelled
            assert not outcomes.rescheduled
            assert dispatch.held.list_open() == [running, hurried]
            assert [lease.tried for lease in (running, hurried)] == [2, 2]
            assert (dispatch.suspended, dispatch.errors, len(dispatch.ready)) == (0, 0, 0)

    run_on("asyncio", main())


@pytest.mark.parametrize("end", ["drop_lost", "cancel_step"])
def test_step_end_without_outcome_wakes_the_pump(clock: Clock, end: str) -> None:
    async def main() -> None:
        with scripted() as (dispatch, _):
            (lease,) = dispatch.claim(Act("waits"))
            dispatch.admit([lease])
            await turns(2)
            dispatch.woken.clear()
            getattr(dispatch, end)(lease)
            async with asyncio.timeout(1):
                await dispatch.woken.wait()
            assert (dispatch.suspended, len(dispatch.outcomes)) == (0, 0)

    run_on(clock, main())


def test_stopped_step_may_still_return_an_outcome(clock: Clock) -> None:
    async def finishes(ctx: Context) -> Done:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return Done()
        raise AssertionError

    async def main() -> None:
        with scripted(finishes=finishes) as (dispatch, _):
            leases = dispatch.claim(Act("finishes"))
            dispatch.admit(leases)
            await turns(2)
            dispatch.cancel_step(leases[0])
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["done"]

    run_on(clock, main())


def test_unstarted_leases_can_be_taken_back(clock: Clock) -> None:
    async def main() -> None:
        with scripted(concurrency=1) as (dispatch, scripts):
            leases = dispatch.claim(*[Act("waits")] * 4)
            dispatch.admit(leases)
            await turns(2)
            dispatch.drop_lost(leases[2])
            assert dispatch.take_ready() == [leases[1], leases[3]]
            assert not dispatch.ready
            assert dispatch.take_ready() == []
            scripts.gate.set()
            assert len(await dispatch.all_outcomes(leases[:1])) == 1

    run_on(clock, main())
