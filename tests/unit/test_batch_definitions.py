"""Definitions of steps with `run_batch`: what an app reads from them, and what it refuses, with the remedy."""

# mypy: disable-error-code="valid-type,name-defined"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest

from pgtask import App, Batch, BatchContext, Context, DefinitionError, Done, Fail, Next, Policy, Task

BATCH = Policy(batch=Batch(10))
wrong: Any = Batch
wrong_batch: Any = 5


class Docs(Task):
    policy = Policy(batch=Batch(7), retry_limit=2)


class Embed(Docs):
    number: int

    @classmethod
    async def run_batch(
        cls, steps: Sequence[Embed], ctx: BatchContext
    ) -> list[Next[Store] | Fail | Exception] | tuple[Fail, ...]:
        raise NotImplementedError


class Store(Docs):
    policy = Policy(batch=Batch(500))
    number: int

    @classmethod
    def run_batch(cls, steps: Sequence[Store], ctx: BatchContext) -> Done:
        raise NotImplementedError


class Check(Docs):
    async def run(self, ctx: Context) -> Done:
        raise NotImplementedError


def test_app_reads_batches_and_edges_of_its_steps() -> None:
    steps = App(Docs).steps
    embed, store, check = steps[Embed], steps[Store], steps[Check]
    assert (embed.batch, embed.is_async, embed.edges) == (Batch(7), True, (Store,))
    assert (embed.finishes, embed.fails) == (False, True)
    assert (store.batch, store.is_async, store.finishes) == (Batch(500), False, True)
    assert check.batch is None, "the batch of the task is for its steps with run_batch"


async def for_all(cls: Any, steps: Any, ctx: Any) -> Done:
    raise NotImplementedError


def app_with(body: dict[str, Any]) -> App:
    task = type("T", (Task,), {})
    type("S", (task,), {"__annotations__": {"number": int}, **body})
    return App(task)


async def unannotated(cls: Any, steps: Any, ctx: Any):  # type: ignore[no-untyped-def]
    raise NotImplementedError


async def of_numbers(cls: Any, steps: Any, ctx: Any) -> list[int]:
    raise NotImplementedError


async def of_exceptions(cls: Any, steps: Any, ctx: Any) -> list[ValueError]:
    raise NotImplementedError


async def generator(cls: Any, steps: Any, ctx: Any) -> Done:  # type: ignore[misc]
    yield


async def without_context(cls: Any, steps: Any) -> Done:
    raise NotImplementedError


async def alone(self: Any, ctx: Context) -> Done:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"run_batch": classmethod(for_all)}, r"step T.S has run_batch\(\) and no batch; add: policy = Policy"),
        ({"run": alone, "policy": BATCH}, r"step T.S: Policy\(batch=...\) is for a step with run_batch\(\); add: "),
        ({"run": alone, "run_batch": classmethod(for_all), "policy": BATCH}, r"T.S has both run\(\) and run_batch"),
        ({"run_batch": for_all, "policy": BATCH}, "T.S: run_batch must be a class method, @classmethod async def"),
        ({"run_batch": staticmethod(for_all), "policy": BATCH}, "T.S: run_batch must be a class method"),
        (
            {"run_batch": classmethod(without_context), "policy": BATCH},
            "must take the class, the steps and one",
        ),
        ({"run_batch": classmethod(unannotated), "policy": BATCH}, r"unannotated\(\) has no return annotation"),
        ({"run_batch": classmethod(of_numbers), "policy": BATCH}, r"run_batch\(\) is annotated -> list\[int\]; "),
        ({"run_batch": classmethod(of_exceptions), "policy": BATCH}, "annotate it with an outcome for all steps"),
        ({"run_batch": classmethod(generator), "policy": BATCH}, r"run_batch\(\) is a generator; return outcomes"),
        (
            {"run_batch": classmethod(for_all), "policy": Policy(batch=Batch(5, by="modell"))},
            r"step T.S: Batch\(by='modell'\) names no field or property of it",
        ),
        (
            {"run_batch": classmethod(for_all), "policy": Policy(batch=Batch(5, weight="size", max_weight=5))},
            r"Batch\(weight='size'\) names no field",
        ),
    ],
)
def test_definition_that_cannot_work_is_refused(body: dict[str, Any], error: str) -> None:
    with pytest.raises(DefinitionError, match=error):
        app_with(body)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Batch(0), r"Batch\(size=0\) must be a whole number from 1 to 10,000"),
        (lambda: Batch(10_001), r"Batch\(size=10001\)"),
        (lambda: Batch(True), r"Batch\(size=True\)"),
        (lambda: wrong("5"), r"Batch\(size='5'\)"),
        (lambda: Batch(5, linger=timedelta(seconds=-1)), r"Batch\(linger=.*\) must be"),
        (lambda: wrong(5, linger=0.05), r"Batch\(linger=0.05\) must be"),
        (lambda: wrong(5, by=5), r"Batch\(by=5\) must be the name of a field or property, or a function of the step"),
        (lambda: Batch(5, weight="size"), r"Batch\(weight=...\) does nothing without max_weight=; give both, or none"),
        (lambda: Batch(5, max_weight=5), r"Batch\(max_weight=...\) does nothing without weight="),
        (lambda: Batch(5, weight=len, max_weight=0), r"Batch\(max_weight=0\) must be a number greater than 0"),
        (lambda: Batch(5, weight=len, max_weight=float("nan")), r"Batch\(max_weight=nan\)"),
        (lambda: Policy(batch=wrong_batch), r"Policy\(batch=5\) must be a Batch, as in Batch\(256\), or None"),
    ],
)
def test_batch_that_cannot_work_is_refused(make: Callable[[], Any], error: str) -> None:
    with pytest.raises(DefinitionError, match=error):
        make()
