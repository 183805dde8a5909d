"""Values that JSON cannot hold are refused wherever they are stored; every other value arrives unchanged."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest
from fix_database import run
from fix_stores import Stores

from pgtask import App, Context, Done, EnqueueError, Next, StepFailed, Task, WorkflowContext, workflow
from pgtask.testing import MemoryClient, MemoryWorker, run_task


class Colour(enum.Enum):
    RED = "red"


class Point(msgspec.Struct):
    x: float | None = None
    tags: list[str | None] = []


@dataclass
class Pair:
    left: float | None
    right: Any = None


class Post(Task):
    pass


class Anything(Post):
    value: Any = None

    async def run(self, ctx: Context) -> Done:
        return Done()


class Bare(Post):
    transparent = True
    value: Any

    async def run(self, ctx: Context) -> Done:
        return Done()


class Loose(Post):
    table: dict[str, Any]
    rows: list[dict[str, Any]] | None = None
    thing: object = None

    async def run(self, ctx: Context) -> Done:
        return Done()


class Typed(Post):
    mean: float | None = None
    name: str | None = None
    point: Point | None = None
    pairs: tuple[Pair, ...] = ()
    by_name: dict[str, float | None] = msgspec.field(default_factory=dict)
    by_number: dict[int, str] = msgspec.field(default_factory=dict)
    day: datetime | None = None
    colour: Colour | None = None
    some: tuple[int, ...] | None = None
    raw: bytes = b""
    exact: Decimal | None = None

    async def run(self, ctx: Context) -> Done:
        return Done()


class Sure(Post):
    """Has no place where null could be read: there is nothing to look for."""

    mean: float

    async def run(self, ctx: Context) -> Done:
        return Done()


NUMBERS = [math.nan, math.inf, -math.inf]


def places(number: Any) -> Iterator[tuple[Task, str]]:
    """Steps that have it somewhere, and where."""
    yield Typed(mean=number), "$.mean"
    yield Typed(name=number), "$.name"  # as a table of pandas has it
    yield Typed(point=Point(number)), "$.point.x"
    yield Typed(point=Point(tags=["a", number])), "$.point.tags[1]"
    yield Typed(pairs=(Pair(1.0), Pair(number))), "$.pairs[1].left"
    yield Typed(pairs=(Pair(1.0, {"a": (number,)}),)), "$.pairs[0].right['a'][0]"
    yield Typed(by_name={"a": 1.0, "b": number}), "$.by_name['b']"
    yield Anything(number), "$.value"
    yield Anything([{"a": [number]}]), "$.value[0]['a'][0]"
    yield Bare(number), "$.value"
    yield Loose({"a": number}), "$.table['a']"
    yield Loose({}, [{"a": number}]), "$.rows[0]['a']"
    yield Loose({}, None, number), "$.thing"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_json_cannot_hold_is_not_enqueued(stores: Stores, number: float) -> None:
    async def main() -> None:
        async with stores() as world:
            client = world.client
            for step, place in places(number):
                with pytest.raises(EnqueueError) as caught:
                    await client.enqueue(step)
                assert f"{place} is {number}, which JSON cannot hold" in str(caught.value), step
                with pytest.raises(EnqueueError):
                    await client.enqueue_many([step])
            with pytest.raises(EnqueueError, match="got `null`"):
                await client.enqueue(Sure(number))
            for step, _ in places(None):
                await client.enqueue(step)

    run(main())


STRANGERS = [
    b"bytes",
    (1, 2),
    {1, 2},
    datetime.now(UTC),
    UUID(int=1),
    Decimal(1),
    Colour.RED,
    Point(1.0),
    Pair(1.0),
    {1: "a"},
]


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda value: type(value).__name__)
def test_only_json_fits_where_anything_may_be(stranger: Any) -> None:
    """Another process would read it back as something else."""

    async def main() -> None:
        client = MemoryClient()
        for step in (Anything(stranger), Anything([1, {"a": [stranger]}]), Bare(stranger), Loose({"a": stranger})):
            with pytest.raises(EnqueueError, match=r"\$\..*annotate it"):
                await client.enqueue(step)

    run(main())


def test_annotated_and_plain_values_arrive_unchanged() -> None:
    everything = Typed(
        1.5,
        "x",
        Point(None, ["a", None]),
        (Pair(None, [1]),),
        {"a": None},
        {1: "one"},
        datetime.now(UTC),
        Colour.RED,
        (1, 2),
        b"raw",
        Decimal("NaN"),
    )
    plain: list[Any] = [None, True, 1, 2**70, 1.5, "x", [], {}, [{"a": [None, {"b": 1}]}], "null"]
    steps = [
        everything,
        Sure(1.5),
        *map(Anything, plain),
        *map(Bare, plain),
        Loose({"a": plain}, [{"b": plain}], plain),
    ]

    async def main() -> None:
        client = MemoryClient()
        for step in steps:
            await client.enqueue(step)
            if step is not everything:  # Decimal("NaN") is not equal to itself
                assert client.enqueued[-1].step == step

    run(main())


# --- the next step -------------------------------------------------------------------------------------------


class Chain(Task):
    pass


class Measure(Chain):
    kind: str

    async def run(self, ctx: Context) -> Next[Store]:
        values: dict[str, Any] = {"nan": math.nan, "inf": [math.inf], "tuple": (1,), "number": 1.5, "none": None}
        return Next(Store(values[self.kind], math.nan if self.kind == "mean" else None))


class Store(Chain):
    value: Any
    mean: float | None

    async def run(self, ctx: Context) -> Done:
        return Done()


@pytest.mark.parametrize("kind", ["nan", "inf", "tuple", "number", "none"])
def test_a_next_step_is_refused_like_a_first_one(kind: str) -> None:
    task = run_task(App(Chain), Measure(kind))
    if kind in ("number", "none"):
        assert task.state == "done"
    else:
        assert task.state == "parked"
        assert "the next step Chain.Store cannot be stored: $.value" in (task.error or "")


# --- workflows -----------------------------------------------------------------------------------------------


def give(value: str) -> Any:
    return {"nan": math.nan, "inside": {"a": [math.inf]}, "pair": (1, 2)}[value]


def typed(value: str) -> float | None:
    return math.nan if value == "nan" else None


@workflow("takes")
async def takes(ctx: WorkflowContext, table: dict[str, float | None]) -> int:
    return len(table)


@workflow("untyped")
async def untyped(ctx: WorkflowContext, value) -> Any:  # type: ignore[no-untyped-def]
    return value


@workflow("returns")
async def returns(ctx: WorkflowContext, value: str) -> float | None:
    return typed(value)


@workflow("steps")
async def steps(ctx: WorkflowContext, value: str) -> str:
    try:
        return str(await ctx.step("give", give, value))
    except StepFailed as error:
        return error.error


@workflow("typed steps")
async def typed_steps(ctx: WorkflowContext, value: str) -> str:
    try:
        return str(await ctx.step("typed", typed, value))
    except StepFailed as error:
        return error.error


@workflow("parent")
async def parent(ctx: WorkflowContext) -> str:
    table: dict[str, float | None] = {"a": math.nan}
    try:
        await ctx.spawn("child", takes, table)
    except EnqueueError as error:
        return str(error)
    return "spawned"


@workflow("waits")
async def waits(ctx: WorkflowContext) -> Any:
    return await ctx.wait_for_signal("go")


app = App(takes, untyped, returns, steps, typed_steps, parent, waits)
CANNOT = "which JSON cannot hold"


def test_an_input_is_refused_like_a_step(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            client = world.client
            tables: list[dict[str, float | None]] = [{"a": math.nan}, {"a": 1.0, "b": -math.inf}]
            for table in tables:
                with pytest.raises(EnqueueError, match=f"workflow takes: its input .*{CANNOT}"):
                    await client.trigger(takes, table)
                with pytest.raises(EnqueueError, match=CANNOT):
                    await client.trigger_many(takes, [{}, table])
            for value in ((1, 2), {1: 2}, math.nan, [datetime.now(UTC)]):
                with pytest.raises(EnqueueError, match="workflow untyped: its input"):
                    await client.trigger(untyped, value)
            assert await client.runs() == []
            tables[0]["a"] = None
            await client.trigger(takes, tables[0])
            await client.trigger(untyped, [{"a": None}, "x"])

    run(main())


def test_values_that_a_workflow_stores_are_refused_too() -> None:
    async def main() -> None:
        async with MemoryWorker(app) as worker:
            client = worker.client
            failing = {
                "nan": (steps, "$ is nan"),
                "inside": (steps, "$['a'][0] is inf"),
            }
            for value, (flow, text) in failing.items():
                started = await client.trigger(flow, value)
                await worker.run()
                assert f"cannot be recorded: {text}, {CANNOT}" in await started.result(1)
            started = await client.trigger(typed_steps, "nan")
            child = await client.trigger(parent)
            wrong = await client.trigger(returns, "nan")
            right = await client.trigger(returns, "none")
            await worker.run()
            assert CANNOT in await started.result(1)
            assert CANNOT in await child.result(1)
            assert CANNOT in ((await wrong.status()).error or "")
            assert await right.result(1) is None
            # The first time too a result without an annotation is what its JSON is: a replay sees the same.
            loose = await client.trigger(steps, "pair")
            await worker.run()
            assert await loose.result(1) == "[1, 2]"

    run(main())


def test_a_signal_is_refused_too() -> None:
    async def main() -> None:
        async with MemoryWorker(app) as worker:
            started = await worker.client.trigger(waits)
            await worker.run()
            for value in (math.nan, {"a": [1, math.inf]}, Point(math.nan)):
                with pytest.raises(EnqueueError, match=f"signal go: its value .*{CANNOT}"):
                    await started.signal("go", value)
            await started.signal("go", Point(1.0))
            await worker.run()
            assert await started.result(1) == {"x": 1.0, "tags": []}

    run(main())
