"""The new tasks of an outcome in the dispatcher: good ones beside their outcome, and bad ones the error of the try."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import flows
import pytest
from dispatch_stage import Act, Moved, rows_of, scripted
from jumping_loop import Clock, run_on
from reference import BufferedOutcome, NewTask
from step_programs import MAX_STEP_BYTES, Scene
from trees import Closes

from pgtask import Context, Done, Enqueue, Next, Task
from pgtask._worker import new_tasks
from pgtask.outcome import NO_TASKS


def outcome_of(clock: Clock, outcome: Any, tried: int = 0) -> BufferedOutcome:
    """Return what the buffer holds of one outcome of a step that is retried once more."""

    async def returns(ctx: Context) -> Any:
        return outcome

    async def main() -> BufferedOutcome:
        with scripted(returns=returns) as (dispatch, _):
            leases = dispatch.claim(Act("returns"), tried=tried)
            dispatch.admit(leases)
            entries = await dispatch.next_outcomes()
            (entry,) = rows_of(entries)
            assert len(entries.new_tasks) == bool(entry.new)
            return entry

    return run_on(clock, main())


def test_items_are_steps_of_any_family_and_enqueue(clock: Clock) -> None:
    at = datetime(2099, 1, 1, 12, tzinfo=UTC)
    items: list[Task | Enqueue] = [
        Closes("a"),
        Moved("b"),
        Enqueue(Moved("c"), after=timedelta(seconds=3), queue="q", priority=1),
        Enqueue(Closes("d"), at=at.astimezone(), key="k"),
    ]
    wanted = (
        NewTask('{"Tree":{"Closes":{"path":"a"}}}', None, None, "default", 0, None),
        NewTask('{"Script":{"Moved":{"name":"b"}}}', None, None, "other", 5, None),
        NewTask('{"Script":{"Moved":{"name":"c"}}}', None, 3.0, "q", 1, None),
        NewTask('{"Tree":{"Closes":{"path":"d"}}}', at, None, "default", 0, "Tree/k"),
    )
    for enqueue in (items, tuple(items), iter(items), (item for item in items)):
        done = outcome_of(clock, Done(enqueue=enqueue))
        assert (done.kind, done.new) == ("done", wanted)
    for kind, after in (("continued", None), ("rescheduled", timedelta(seconds=1))):
        goes_on = outcome_of(clock, Next(Act("done"), after=after, enqueue=items))
        assert (goes_on.kind, goes_on.new) == (kind, wanted)


def test_no_items_are_a_plain_outcome(clock: Clock) -> None:
    nothings: list[Any] = [NO_TASKS, [], iter(()), set()]
    for nothing in nothings:
        entry = outcome_of(clock, Done(enqueue=nothing))
        assert (entry.kind, entry.new) == ("done", ())


class NoRepr:
    def __repr__(self) -> str:
        raise ValueError("no repr")


class Hostile:
    def __iter__(self) -> Any:
        raise LookupError("no items today")


def endless() -> Any:
    return (Closes("x") for _ in itertools.count())


ITEM = "Script.Act: item 2 of enqueue= cannot be enqueued: "
BAD: dict[str, tuple[Any, str]] = {
    "a number": (5, f"{ITEM}a value of type int is not a step; enqueue an instance of a class that derives"),
    "nothing": (None, f"{ITEM}a value of type NoneType is not a step"),
    "a class": (Closes, f"{ITEM}Closes is a class: write Closes(...)"),
    "an outcome": (Done(), f"{ITEM}a value of type Done is not a step"),
    "a workflow": (flows.typed, f"{ITEM}typed is a workflow, not a step; start a run of it by trigger"),
    "without repr": (NoRepr(), f"{ITEM}a value of type NoRepr is not a step"),
    "enqueue of enqueue": (Enqueue(Enqueue(Closes("a"))), f"{ITEM}a value of type Enqueue is not a step"),  # type: ignore[arg-type]
    "a wrong field": (Closes(5), f"{ITEM}step Tree.Closes cannot be decoded: Expected `str`, got `int`"),  # type: ignore[arg-type]
    "a surrogate": (Closes("\ud800"), f"{ITEM}step Tree.Closes cannot be stored as JSON"),
    "an object": (Closes(object()), f"{ITEM}step Tree.Closes cannot be stored as JSON"),  # type: ignore[arg-type]
    "too large": (Closes("x" * MAX_STEP_BYTES), f"{ITEM}step Tree.Closes is {MAX_STEP_BYTES + 31} bytes, more than"),
}


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_item_is_the_error_of_the_try(clock: Clock, name: str, goes_on: bool) -> None:
    item, says = BAD[name]
    items = [Closes("good"), item, Closes("never reached")]
    entry = outcome_of(clock, Next(Act("done"), enqueue=items) if goes_on else Done(enqueue=items))
    assert (entry.kind, entry.step, entry.new, entry.tried) == ("rescheduled", None, (), 1)
    assert (entry.error or "").startswith(says)
    assert (entry.error or "").count("more than") <= 1, "the reason stands there twice"


NO_ITEMS: dict[str, tuple[Callable[[], Any], str]] = {
    "a step": (
        lambda: Closes("a"),
        "Script.Act: enqueue= takes the steps of new tasks, not one Closes; write enqueue=[Closes(...)]",
    ),
    "an enqueue": (lambda: Enqueue(Closes("a")), "not one Enqueue; write enqueue=[Enqueue(...)]"),
    "a number": (lambda: 5, "not one int; give a list"),
    "nothing": (lambda: None, "not one NoneType; give a list"),
    "a text": (lambda: "text", "not one str; give a list"),
    "a dict": (lambda: {"a": 1}, "not one dict; give a list"),
    "an iterable that raises": (Hostile, "LookupError: no items today"),
    "a generator that raises": (lambda: (1 / 0 for _ in range(1)), "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", NO_ITEMS)
def test_what_cannot_be_read_is_the_error_of_the_try(clock: Clock, name: str) -> None:
    items, says = NO_ITEMS[name]
    entry = outcome_of(clock, Done(enqueue=items()))
    assert (entry.kind, entry.new, entry.tried) == ("rescheduled", (), 1)
    assert says in (entry.error or "")


def test_iterable_that_exits_parks_only_its_task(clock: Clock) -> None:
    def exits() -> Any:
        yield Closes("a")
        raise SystemExit(3)

    entry = outcome_of(clock, Done(enqueue=exits()))
    assert (entry.kind, entry.new) == ("rescheduled", ())
    assert entry.error == "a Done of Script.Act raised SystemExit"


def test_items_are_bounded_in_number_and_bytes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_tasks.MAX_NEW_TASKS == 100_000
    monkeypatch.setattr(new_tasks, "MAX_NEW_TASKS", 50)
    monkeypatch.setattr(new_tasks, "MAX_NEW_BYTES", 4_000)
    assert len(outcome_of(clock, Done(enqueue=itertools.islice(endless(), 50))).new) == 50
    assert "Script.Act enqueues more than 50 tasks in one outcome; enqueue some that enqueue the others" in (
        outcome_of(clock, Done(enqueue=endless())).error or ""
    )
    assert "Script.Act enqueues more than 4000 bytes, at item 2; store the data elsewhere" in (
        outcome_of(clock, Done(enqueue=[Closes("x" * 3_000)] * 3)).error or ""
    )


def test_wrong_next_step_enqueues_nothing(clock: Clock) -> None:
    entry = outcome_of(clock, Next(Scene([], ["done"]), enqueue=[Closes("a")]))
    assert (entry.kind, entry.new, entry.tried) == ("rescheduled", (), 1)


def test_ids_of_new_tasks_are_new_in_each_try(clock: Clock) -> None:
    ids: set[Any] = set()

    async def returns(ctx: Context) -> Done:
        return Done(enqueue=[Closes("a"), Closes("b")])

    async def main() -> None:
        with scripted(returns=returns) as (dispatch, _):
            for _ in range(3):
                dispatch.admit(dispatch.claim(Act("returns")))
                outcomes = await dispatch.next_outcomes()
                for tasks in outcomes.new_tasks.values():
                    ids.update(task.id for task in tasks)

    run_on(clock, main())
    assert len(ids) == 6
    assert {id.version for id in ids} == {7}
