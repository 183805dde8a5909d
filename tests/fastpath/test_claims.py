"""The counts of a step: failed tries, and claims without an outcome."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg
from dispatch_stage import Act, Timed, scripted
from jumping_loop import Clock, run_on

from pgtask import Context, Done, Next


async def raises_value_error(ctx: Context) -> Done:
    raise ValueError(f"attempt {ctx.attempt}")


async def loses_its_connection(ctx: Context) -> Done:
    raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def test_next_step_starts_with_fresh_counts(clock: Clock) -> None:
    """Failed tries, and claims without an outcome, belong to a step, not to its task."""

    async def fails_next(ctx: Context) -> Next[Timed]:
        return Next(Timed("raises"))

    async def interrupted_next(ctx: Context) -> Next[Act]:
        return Next(Act("loses"))

    runs: dict[str, Any] = {"raises": raises_value_error, "loses": loses_its_connection}

    async def main() -> None:
        with scripted(fails_next=fails_next, interrupted_next=interrupted_next, **runs) as (dispatch, _):
            leases = dispatch.claim(Act("fails_next"), Act("interrupted_next"), tried=3, claims=9)
            dispatch.admit(leases)
            entries = [entry for entry in await dispatch.all_outcomes(leases) if entry.kind == "rescheduled"]
            failed, interrupted = sorted(entries, key=lambda entry: entry.id != leases[0].id)
            assert (failed.tried, failed.error, failed.claims) == (1, None, None)  # the first of two tries
            assert (interrupted.tried, interrupted.error, interrupted.claims) == (0, None, 0)

    run_on(clock, main())


def test_lost_connection_is_excused_four_times(clock: Clock) -> None:
    async def main() -> None:
        with scripted(loses=loses_its_connection) as (dispatch, _):
            entries = []
            for _ in range(5):  # of one task that was in two crashes before: these stay counted
                leases = dispatch.claim(Act("loses"), tried=2, claims=3, id=UUID(int=1))
                dispatch.admit(leases)
                entries += await dispatch.all_outcomes(leases)
            *excused, fifth = entries
            for entry in excused:
                assert (entry.tried, entry.error, entry.delay, entry.claims) == (2, None, 1.0, 2)
            assert (fifth.tried, fifth.claims) == (3, None)
            assert "ConnectionDoesNotExistError" in (fifth.error or "")
            assert dispatch.errors == 1

    run_on(clock, main())
