"""Return values that are no outcome, and objects of the user that raise: the task fails, and no other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dispatch_stage import Timed, outcomes_of, scripted, stage, suspended
from jumping_loop import Clock, run_on
from step_programs import MAX_STEP_BYTES, Scene, World, turns

from pgtask import Context, Fail


class NoRepr:
    def __repr__(self) -> str:
        raise ValueError("no repr")


@pytest.mark.parametrize("wrong", [NoRepr(), Fail(NoRepr())], ids=["outcome", "reason"])  # type: ignore[arg-type]
@pytest.mark.parametrize("suspends", [False, True])
def test_outcome_without_repr_parks_only_its_task(clock: Clock, wrong: Any, suspends: bool) -> None:
    async def returns(ctx: Context) -> Any:
        await turns(suspends)
        return wrong

    first, *others = outcomes_of(clock, "returns", "done", "suspended", returns=returns, suspended=suspended)
    assert first.kind == "rescheduled"
    assert first.error is not None
    assert first.error.startswith("Script.Act")
    assert [entry.kind for entry in others] == ["done", "done"]


class ExitsWhenAsked(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


def test_outcome_without_repr_after_timeout_is_reported(clock: Clock) -> None:
    async def returns(ctx: Context) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return NoRepr()

    async def main() -> None:
        with scripted(returns=returns) as (dispatch, _):
            leases = dispatch.claim(Timed("returns"), tried=1)
            dispatch.admit(leases)
            (entry,) = await dispatch.all_outcomes(leases)
            assert (entry.error or "").startswith("Script.Timed returned ")

    run_on(clock, main())


def test_error_whose_str_exits_parks_only_its_task(clock: Clock) -> None:
    async def raises(ctx: Context) -> Any:
        raise ExitsWhenAsked

    first, second = outcomes_of(clock, "raises", "done", raises=raises)
    assert first.error is not None
    assert first.error.startswith("test_wrong_outcomes.ExitsWhenAsked: ")
    assert second.kind == "done"


def test_fail_reason_of_str_subclass_is_stored_as_text(clock: Clock) -> None:
    class Reason(str):
        """A text like the members of an `enum.StrEnum`."""

    async def fails(ctx: Context) -> Fail:
        return Fail(Reason("no money"))

    (entry,) = outcomes_of(clock, "fails", fails=fails)
    assert entry.error == "no money"


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ("nothing", "Play.Scene returned None: a return is missing; return Next(...), Done() or Fail(...)"),
        ("number", "Play.Scene returned 5; return Next(...), Done() or Fail(...)"),
        ("undeclared", "Play.Scene returned Next(Undeclared), but its annotation allows Elsewhere, Scene, Urgent"),
        ("next of nothing", "Play.Scene returned Next(NoneType), but its annotation allows"),
        ("too large", f"the next step Play.Scene is 10047 bytes, more than the {MAX_STEP_BYTES} allowed"),
        ("not encodable", "the next step Play.Scene cannot be stored: Encoding objects of type object is unsupported"),
        ("wrong field", "the next step Play.Scene cannot be decoded: Expected `array`, got `int` - at `$.acts`"),
        ("next of a class", "Play.Scene: Scene is a class: write Next(Scene(...))"),
        ("delay as a number", "Next(after=5): use a timedelta, zero or more"),
        ("fail without text", "Play.Scene: Fail() takes a reason as text, not 5"),
        ("negative delay", "Next(after="),
    ],
)
def test_wrong_outcome_is_explained(end: str, text: str) -> None:
    async def main() -> None:
        with stage(resources=World()) as dispatch:
            leases = dispatch.claim(Scene([], [end]), tried=1)
            dispatch.admit(leases)
            (entry,) = await dispatch.all_outcomes(leases)
            assert entry.error is not None
            assert entry.error.startswith(text)
            assert entry.error.count("got `int`") == text.count("got `int`"), "the reason stands there twice"
            assert entry.tried == 2

    run_on("asyncio", main())
