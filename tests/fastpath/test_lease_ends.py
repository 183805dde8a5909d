"""The end of every lease, under random disturbances."""

from __future__ import annotations

import asyncio
import collections
from uuid import UUID

from dispatch_stage import Act, scripted, suspended
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jumping_loop import run_on
from step_programs import turns

from pgtask import Context, Done, Next

PHASES = tuple(set(Phase) - {Phase.explain})  # explaining takes a minute here


DISTURBANCES = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(["lose", "stop", "drain", "take back", "open"]), st.integers(0, 9)),
    max_size=8,
)


@settings(deadline=None, max_examples=150, phases=PHASES)
@given(
    st.lists(st.sampled_from(["done", "waits", "goes_on", "fails", "swallows", "suspended"]), min_size=1, max_size=10),
    DISTURBANCES,
    st.integers(1, 4),
)
def test_every_lease_ends_once_or_is_lost_or_released(
    names: list[str], disturbances: list[tuple[int, str, int]], concurrency: int
) -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        await turns(ctx.task_id.int % 3)
        return Next(Act("waits"))

    async def fails(ctx: Context) -> Done:
        raise ValueError

    async def main() -> None:
        async def swallows(ctx: Context) -> Done:
            while not scripts.gate.is_set():
                try:
                    await scripts.gate.wait()
                except asyncio.CancelledError:
                    await turns(2)
            return Done()

        runs = {"goes_on": goes_on, "fails": fails, "swallows": swallows, "suspended": suspended}
        with scripted(concurrency=concurrency, **runs) as (dispatch, scripts):
            leases = dispatch.claim(*map(Act, names))
            dispatch.admit(leases)
            ends: collections.Counter[UUID] = collections.Counter()
            lost: set[UUID] = set()
            given_back: set[UUID] = set()
            for turn in range(100):
                for when, what, number in disturbances:
                    lease = leases[number % len(leases)]
                    if when != turn:
                        continue
                    match what:
                        case "lose" if lease.is_open and lease.id not in given_back:
                            dispatch.drop_lost(lease)
                            lost.add(lease.id)
                        case "stop":
                            dispatch.cancel_step(lease)
                        case "drain":
                            dispatch.draining = True
                        case "take back":
                            given_back |= {lease.id for lease in dispatch.take_ready()}
                        case "open":
                            scripts.gate.set()
                if turn == 20:
                    scripts.gate.set()
                outcomes = dispatch.take_outcomes()
                dispatch.start_next_steps([lease for lease, _ in outcomes.continued])
                ends.update(lease.id for lease in [*outcomes.done, *[row.lease for row in outcomes.rescheduled]])
                assert dispatch.suspended <= concurrency
                assert not dispatch.broken
                await asyncio.sleep(0)
            assert dispatch.suspended == len(dispatch.ready) == len(dispatch.outcomes) == 0
            for lease in leases:
                if lease.is_open or lease.id in given_back:  # stopped, or never started: to be released
                    assert ends[lease.id] == 0
                elif lease.id in lost:
                    assert ends[lease.id] <= 1  # it may have ended just before it was lost
                else:
                    assert ends[lease.id] == 1

    run_on("asyncio", main())
