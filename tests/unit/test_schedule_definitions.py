"""The definition of schedules: one clear error for each mistake; and the ids of their occurrences."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from paths import PYTHONPATH

from pgtask import App, BatchContext, Context, DefinitionError, Done, Policy, Schedule, Task, WorkflowContext, workflow
from pgtask._ids import first_id
from pgtask._occurrences import occurrence_id, scheduled_time

NIGHT = datetime(2026, 3, 29, 1, tzinfo=UTC)


class Nights(Task):
    policy = Policy(queue="night", priority=3)


class Plan(Nights):
    day: float = 0.0

    async def run(self, ctx: Context) -> Done:
        return Done()


class Other(Task):
    pass


class Elsewhere(Other):
    async def run(self, ctx: Context) -> Done:
        return Done()


@workflow("count")
async def count(ctx: WorkflowContext, number: int) -> int:
    return number


def made(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: Schedule(*args, **options)


def app(*schedules: Any) -> Callable[[], Any]:
    return lambda: App(Nights, schedules=schedules)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (made("", "@daily", Plan()), "schedule '' must be named by 1 to 255 printable characters"),
        (made("n", "0 3 * *", Plan()), "schedule n: cron='0 3 * *': wrong number of fields; write it as minute hour"),
        (made("n", "0 0 30 2 *", Plan()), "schedule n: cron='0 0 30 2 *': bad day-of-month"),
        (made("n", 3, Plan()), "schedule n: cron=3 must be a string"),
        (made("n", "@daily", Plan(), zone="Mars"), "schedule n: zone='Mars': this computer knows no such time zone"),
        (made("n", "@daily", Plan(), missed="some"), 'schedule n: missed=\'some\' must be "skip" or "latest" or "all"'),
        (made("n", "@daily", Plan(), overlap="no"), 'schedule n: overlap=\'no\' must be "skip" or "allow"'),
        (made("n", "@daily", Plan(), max_missed=0), "schedule n: max_missed=0 must be a whole number from 1 to 10,000"),
        (made("n", "@daily", Plan(), queue="a,b"), "schedule n: queue 'a,b' must be"),
        (made("n", "@daily", Plan), "schedule n: Plan is a class: write Plan(...)"),
        (made("n", "@daily", Plan(float("nan"))), "schedule n: step Nights.Plan cannot be decoded"),
        (made("n", "@daily", Plan(), 3), "schedule n: input= is for a workflow"),
        (made("n", "@daily", count, "three"), "schedule n: workflow count: its input cannot be stored"),
        (app(3), "App(schedules=...): 3 is no schedule; pass a list of them"),
        (app(Schedule("n", "@daily", Elsewhere())), "schedule n: Elsewhere is not in this app; pass it to App(...)"),
        (app(Schedule("n", "@daily", count, 3)), "schedule n: count is not in this app; pass it to App(...)"),
        (app(*[Schedule("n", "@daily", Plan())] * 2), "App: two schedules are named n; rename one"),
    ],
)
def test_mistake_has_one_clear_error(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(DefinitionError) as raised:
        make()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_lane_is_that_of_the_policy_or_of_the_schedule() -> None:
    declared = Schedule("n", "@daily", Plan())._declared()
    assert (declared.queue, declared.priority, declared.step) == ("night", 3, '{"Nights":{"Plan":{"day":0.0}}}')
    declared = Schedule("n", "@daily", Plan(), queue="q", priority=-1)._declared()
    assert (declared.queue, declared.priority) == ("q", -1)
    declared = Schedule("n", "@daily", count, 3)._declared()
    assert (declared.workflow, declared.step) == ("count", '{"count":{"Run":3}}')


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "cronsim":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DefinitionError, match=r"schedules need the package cronsim: pip install 'pgtask-supervisor\[schedules\]'"
    ):
        Schedule("n", "1 2 3 4 5", Plan())  # its result is kept nowhere


def test_import_loads_neither_the_library_nor_zones() -> None:
    code = (
        "import sys, pgtask, pgtask.testing; print([name for name in ('cronsim', 'zoneinfo') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_id_of_an_occurrence_tells_its_time() -> None:
    id = occurrence_id("nightly", NIGHT)
    assert (id.version, id.variant) == (7, UUID(int=first_id()).variant)
    assert scheduled_time(id) == NIGHT
    assert id == occurrence_id("nightly", NIGHT + timedelta(milliseconds=900)), "whole seconds count"
    assert id < occurrence_id("nightly", NIGHT + timedelta(seconds=1)), "ids are in the order of their times"
    assert id != occurrence_id("daily", NIGHT)
    assert id.int >> 64 & 0xFFF == 0, "the bits for the cell of a task are free"
    names = {occurrence_id(f"schedule {number}", NIGHT) for number in range(20_000)}
    assert len(names) == 20_000


def test_other_ids_tell_no_time() -> None:
    others = [UUID(int=first_id()) for _ in range(10_000)] + [uuid4() for _ in range(10_000)]
    assert [id for id in others if scheduled_time(id) is not None] == []
    whole_second = occurrence_id("n", NIGHT).int
    assert scheduled_time(UUID(int=whole_second + (1 << 80))) is None, "not a whole second"
    assert scheduled_time(UUID(int=whole_second ^ (1 << 61))) is None, "as a client makes them"
    assert scheduled_time(UUID(int=whole_second ^ (0x3 << 76))) is None, "of version 4"


def test_contexts_tell_the_time() -> None:
    ids = [occurrence_id("n", NIGHT), UUID(int=first_id())]
    assert [Context(id, 1, None, None).scheduled_for for id in ids] == [NIGHT, None]
    assert BatchContext(ids, [1, 1], None, None).scheduled_for == [NIGHT, None]


def test_schedule_beside_a_list_is_refused() -> None:
    with pytest.raises(DefinitionError, match="must be a list"):
        App(Nights, schedules=Schedule("nightly", "0 3 * * *", Plan()))  # type: ignore[arg-type]
