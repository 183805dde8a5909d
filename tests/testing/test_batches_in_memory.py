"""Batches in memory: the groups that a worker would make, and faults of one step of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import hypothesis
import pytest
from fix_database import run
from hypothesis import strategies as st

from pgtask import App, Batch, BatchContext, Context, Done, Next, Policy, Task
from pgtask.testing import MemoryWorker

calls: list[list[Any]] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


class Load(Task):
    pass


class Parse(Load):
    number: int

    async def run(self, ctx: Context) -> Next[Embed]:
        return Next(Embed(self.number))


class Embed(Load):
    policy = Policy(batch=Batch(4, linger=timedelta(hours=1)), retry_limit=1, timeout=timedelta(minutes=1))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Embed], ctx: BatchContext) -> Next[Store] | list[Next[Store]]:
        calls.append([step.number for step in steps])
        assert len(ctx.task_ids) == len(ctx.attempts) == len(steps)
        return [Next(Store(step.number)) for step in steps]


class Store(Load):
    policy = Policy(batch=Batch(100))
    number: int

    @classmethod
    def run_batch(cls, steps: Sequence[Store], ctx: BatchContext) -> Done:
        calls.append([f"store {step.number}" for step in steps])
        return Done()


class Grouped(Task):
    pass


class Weigh(Grouped):
    policy = Policy(batch=Batch(5, by="model", weight=lambda step: step.weight, max_weight=10))
    model: str
    weight: float

    @classmethod
    async def run_batch(cls, steps: Sequence[Weigh], ctx: BatchContext) -> Done:
        calls.append([(step.model, step.weight) for step in steps])
        return Done()


class Spread(Grouped):
    policy = Policy(batch=Batch(5))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Spread], ctx: BatchContext) -> Done:
        return Done(enqueue=[Weigh("a", 1)])


class Heavy(Grouped):
    policy = Policy(batch=Batch(5, weight="size", max_weight=10))
    size: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Heavy], ctx: BatchContext) -> Done:
        return Done()


class Faulty(Grouped):
    policy = Policy(batch=Batch(10, by=lambda step: step.value, weight="weight", max_weight=1))
    value: list[int]
    weight: float

    @classmethod
    async def run_batch(cls, steps: Sequence[Faulty], ctx: BatchContext) -> Done:
        calls.append(list(steps))
        return Done()


app = App(Load, Grouped)


async def work(steps: Sequence[Task], prepare: Any = lambda worker: None, **options: Any) -> MemoryWorker:
    async with MemoryWorker(app, **options) as worker:
        prepare(worker)
        for step in steps:
            await worker.client.enqueue(step)
        await worker.run()
    return worker


def test_worker_in_memory_makes_full_batches() -> None:
    worker = run(work([Embed(number) for number in range(10)]))
    assert [len(call) for call in calls if isinstance(call[0], int)] == [4, 4, 2]
    assert {task.state for task in worker.tasks} == {"done"}
    assert {len(task.tries) for task in worker.tasks} == {2}


def test_linger_passes_at_once_behind_single_steps() -> None:
    run(work([Parse(number) for number in range(6)], concurrency=6))
    assert sum(len(call) for call in calls if isinstance(call[0], int)) == 6


def test_error_of_one_step_is_met_by_each_call_with_it() -> None:
    worker = run(work([Embed(number) for number in range(4)], lambda w: w.fail(Embed, OSError("no"), item=Embed(2))))
    assert {task.state for task in worker.tasks} == {"done"}
    assert [task.tried for task in worker.tasks] == [0, 0, 0, 0]
    tries = [[one.attempt for one in task.tries if isinstance(one.step, Embed)] for task in worker.tasks]
    assert tries == [[1], [1], [1, 2], [1]]
    assert [call for call in calls if isinstance(call[0], int)] == [[0, 1], [3], [2]]


def test_error_without_an_item_is_that_of_one_step() -> None:
    worker = run(work([Embed(number) for number in range(4)], lambda w: w.fail(Embed, OSError("no"), times=2)))
    parked = [task for task in worker.tasks if task.state == "parked"]
    assert len(parked) <= 1
    assert sum(len(task.tries) for task in worker.tasks) == 4 + 2 + 4 - len(parked)


def test_fault_of_a_single_step_can_be_chosen_too() -> None:
    worker = run(work([Parse(1), Parse(2)], lambda w: w.fail(Parse, OSError("no"), item=lambda step: step.number == 2)))
    assert [task.state for task in worker.tasks] == ["done", "parked"]


def test_crash_and_timeout_of_a_batch() -> None:
    def prepare(worker: MemoryWorker) -> None:
        worker.crash(Embed, item=Embed(0))
        worker.time_out(Embed, item=Embed(3))

    worker = run(work([Embed(number) for number in range(4)], prepare))
    assert {task.state for task in worker.tasks} == {"done"}
    assert Counter(number for call in calls for number in call if isinstance(number, int))[0] >= 2
    assert "longer than its timeout of 60 s" in str([one.error for one in worker.tasks[3].tries])


def test_one_outcome_with_new_tasks_for_many_steps_is_refused() -> None:
    worker = run(work([Spread(1), Spread(2)]))
    assert {task.state for task in worker.tasks} == {"parked"}
    assert (worker.tasks[0].error or "").startswith("Grouped.Spread returned one outcome with enqueue= for 2 steps")


@hypothesis.given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 15)), max_size=60))
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_batch_is_mixed_or_too_heavy(steps: list[tuple[str, float]]) -> None:
    calls.clear()
    run(work([Weigh(model, weight) for model, weight in steps]))
    assert Counter(item for call in calls for item in call) == Counter(steps)
    for call in calls:
        assert len({model for model, _ in call}) == 1
        assert len(call) <= 5
        assert len(call) == 1 or sum(weight for _, weight in call) <= 10


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Faulty([1], 1), r"Grouped.Faulty: Batch(by=...) gives a list, which is not hashable"),
        (Heavy(10**400), f"Grouped.Heavy: Batch(weight=...) gives {'1':0<100}, which is no number of 0 or more"),
        (Weigh("a", -1), r"Grouped.Weigh: Batch(weight=...) gives -1.0, which is no number of 0 or more"),
    ],
)
def test_value_that_cannot_group_fails_its_step(step: Task, error: str) -> None:
    worker = run(work([step, Weigh("a", 1)]))
    assert [(task.state, (task.error or "").partition("\n")[0]) for task in worker.tasks] == [
        ("parked", error),
        ("done", ""),
    ]
