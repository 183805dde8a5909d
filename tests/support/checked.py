"""An app, and changes of its code, some of which break what waits. Each change is an app: `checked:app_renamed_step`.

No `from __future__ import annotations`: the classes are made in functions, where only real annotations can be read.
"""

import enum
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from pgtask import App, BatchContext, Context, Done, Policy, Task, WorkflowContext, task, workflow
from pgtask.batch import Batch
from pgtask.workflow import Workflow

DAY = timedelta(days=1)
ONCE = Policy(retry_limit=0)


# --- the steps ----------------------------------------------------------------------------------------------


class Address(msgspec.Struct):
    city: str
    zip: int


class FullAddress(Address):
    country: str


class MoreAddress(Address):
    country: str = "DE"


class Level(enum.Enum):
    LOW = "low"
    HIGH = "high"


class FewerLevels(enum.Enum):
    LOW = "low"


class MoreLevels(enum.Enum):
    LOW = "low"
    HIGH = "high"
    TOP = "top"


async def run_step(self: Any, ctx: Context) -> Done:
    return Done()


def run_in_thread(self: Any, ctx: Context) -> Done:
    return Done()


async def run_batch(cls: Any, steps: Sequence[Any], ctx: BatchContext) -> Done:
    return Done()


class Step(NamedTuple):
    """A step class that is to be made."""

    fields: tuple[tuple[Any, ...], ...] = ()
    run: Any = run_step
    options: dict[str, Any] = {}  # noqa: RUF012
    namespace: dict[str, Any] = {}  # noqa: RUF012


STEPS = {
    "Send": Step((("to", str), ("body", str))),
    "Count": Step((("left", int),)),
    "Label": Step((("text", str | None),)),
    "Tag": Step((("tags", list[str]),)),
    "Grade": Step((("level", Level), ("mood", Literal["good", "bad"]))),
    "Visit": Step((("address", Address),)),
    "Wrap": Step((("value", int),), namespace={"transparent": True}),
    "Ping": Step(),
    "Index": Step((("page", int),), namespace={"run_batch": classmethod(run_batch), "policy": Policy(batch=Batch(10))}),
}
FILLED = (
    '{"Mail":{"Send":{"to":"ada","body":"hello"}}}',
    '{"Mail":{"Count":{"left":3}}}',
    '{"Mail":{"Label":{"text":null}}}',
    '{"Mail":{"Label":{"text":"long enough"}}}',
    '{"Mail":{"Tag":{"tags":["a","b"]}}}',
    '{"Mail":{"Grade":{"level":"high","mood":"bad"}}}',
    '{"Mail":{"Visit":{"address":{"city":"Bonn","zip":53111}}}}',
    '{"Mail":{"Wrap":7}}',
    '{"Mail":{"Ping":null}}',
    '{"Mail":{"Index":{"page":1}}}',
    '{"resize":{"Call":{"path":"a.png","width":10}}}',
)
"""Rows of the table that the app before each change has written."""


@task("resize")
async def resize(ctx: Context, path: str, width: int) -> Done:
    return Done()


@task("resize")
async def resize_by_size(ctx: Context, path: str, size: tuple[int, int]) -> Done:
    return Done()


@task("resize")
async def resize_by_default(ctx: Context, path: str, width: int, height: int = 10) -> Done:
    return Done()


def make_app(steps: dict[str, Step], flows: Sequence[Workflow[Any, Any]], function: Any, family: str = "Mail") -> App:
    parent = type(family, (Task,), {"policy": ONCE})
    made = [_make_step(parent, name, step) for name, step in steps.items()]
    assert made, "the classes live as long as the app"
    return App(parent, *flows, *([function] if function else []))


def _make_step(parent: type[Task], name: str, step: Step) -> type:
    namespace = dict(step.namespace)
    if "run_batch" not in namespace:
        namespace["run"] = step.run
    return msgspec.defstruct(name, step.fields, bases=(parent,), namespace=namespace, **step.options)


# --- the workflows ------------------------------------------------------------------------------------------


class Price(msgspec.Struct):
    cents: int


class PriceWithCurrency(Price):
    currency: str


class PriceWithDefault(Price):
    currency: str = "EUR"


async def reserve(number: int) -> str:
    return f"r{number}"


async def price(number: int) -> Price:
    return Price(number)


async def price_in_euros(number: int) -> PriceWithCurrency:
    return PriceWithCurrency(number, "EUR")


async def price_by_default(number: int) -> PriceWithDefault:
    return PriceWithDefault(number)


async def reserve_number(number: int) -> int:
    return number


def charge(number: int) -> str:
    return f"c{number}"


@workflow("order", policy=ONCE)
async def order(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve, number)
    cost = await ctx.step("price", price, number)
    await ctx.sleep("pause", DAY)
    return await ctx.step("charge", charge, cost.cents)


@workflow("fan", policy=ONCE)
async def fan(ctx: WorkflowContext) -> int:
    await ctx.gather(ctx.step("left", reserve, 1), ctx.step("right", reserve, 2))
    first = await ctx.wait_for_signal("go", int)
    await ctx.now()
    await ctx.wait_for_signal("go", int)
    return first


@workflow("kid", policy=ONCE)
async def kid(ctx: WorkflowContext, number: int) -> int:
    return number


@workflow("other", policy=ONCE)
async def other(ctx: WorkflowContext, number: int) -> int:
    return number


@workflow("parent", policy=ONCE)
async def parent(ctx: WorkflowContext) -> int:
    children = await ctx.spawn_many("kids", kid, [1, 2])
    sums = await ctx.results(children)
    await ctx.sleep("pause", DAY)
    return sum(sums)


FLOWS: tuple[Workflow[Any, Any], ...] = (order, fan, kid, parent, other)


def flows_with(*changed: Workflow[Any, Any], without: str = "") -> list[Workflow[Any, Any]]:
    names = {one.name for one in changed} | {without}
    return [*(one for one in FLOWS if one.name not in names), *changed]


# --- the changes --------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A change of the code: the app after it, and what it breaks, by the name of the step or workflow."""

    make: Callable[[], App]
    breaks: tuple[str, ...] = ()
    says: str = ""


CHANGES: dict[str, Change] = {"before": Change(lambda: make_app(STEPS, FLOWS, resize))}


def _change_steps(name: str, breaks: str = "", says: str = "", /, **changed: Step | None) -> None:
    kept = {step: how for step, how in {**STEPS, **changed}.items() if how is not None}
    broken = (f"Mail.{breaks}",) if breaks else ()
    CHANGES[name] = Change(lambda: make_app(kept, FLOWS, resize), broken, says)


def _change_flow(name: str, breaks: str = "", says: str = "", *, of: str) -> Callable[[Any], Any]:
    """Take a function for the workflow `of`, or several of its versions."""

    def take(function: Any) -> Any:
        flow = function if isinstance(function, Workflow) else workflow(of, policy=ONCE)(function)
        broken = (breaks,) if breaks else ()
        CHANGES[name] = Change(lambda: make_app(STEPS, flows_with(flow), resize), broken, says)
        return function

    return take


_change_steps("field_with_default", Send=Step((("to", str), ("body", str), ("cc", str, ""))))
_change_steps("new_step", Fetch=Step((("url", str),)))
_change_steps("reordered_fields", Send=Step((("body", str), ("to", str))))
_change_steps("field_renamed_with_option", Count=Step((("rest", int),), options={"rename": {"rest": "left"}}))
_change_steps("widened_to_union", Count=Step((("left", int | str),)))
_change_steps("widened_to_float", Count=Step((("left", float),)))
_change_steps("widened_to_optional", Send=Step((("to", str | None), ("body", str))))
_change_steps("dropped_field", Send=Step((("to", str),)))
_change_steps("more_enum_members", Grade=Step((("level", MoreLevels), ("mood", Literal["good", "bad", "ugly"]))))
_change_steps("nested_default", Visit=Step((("address", MoreAddress),)))
_change_steps("run_in_thread", Count=Step((("left", int),), run_in_thread))
_change_steps("other_queue", Count=Step((("left", int),), namespace={"policy": Policy(priority=5, retry_limit=0)}))
_change_steps("batch_to_single", Index=Step((("page", int),)))
_change_steps("tags_as_tuple", Tag=Step((("tags", tuple[str, ...]),)))
_change_steps("unit_with_default", "Ping", "Expected `object`, got `null`", Ping=Step((("times", int, 1),)))

_change_steps("removed_step", "Count", "unknown step Mail.Count", Count=None)
_change_steps("renamed_step", "Send", "unknown step Mail.Send", Send=None, SendMail=STEPS["Send"])
_change_steps("required_field", "Send", "missing required field `cc`", Send=Step((*STEPS["Send"].fields, ("cc", str))))
_change_steps("renamed_field", "Count", "missing required field `rest`", Count=Step((("rest", int),)))
_change_steps("other_type", "Count", "Expected `str`, got `int`", Count=Step((("left", str),)))
_change_steps("no_longer_optional", "Label", "Expected `str`, got `null`", Label=Step((("text", str),)))
_change_steps(
    "forbidden_fields",
    "Send",
    "unknown field `body`",
    Send=Step((("to", str),), options={"forbid_unknown_fields": True}),
)
_change_steps(
    "bounded_value",
    "Label",
    "length <= 3",
    Label=Step((("text", Annotated[str, msgspec.Meta(max_length=3)] | None),)),
)
_change_steps("other_items", "Tag", "Expected `int`, got `str`", Tag=Step((("tags", list[int]),)))
_change_steps("fewer_enum_members", "Grade", "Invalid enum value", Grade=Step((("level", FewerLevels), ("mood", str))))
_change_steps("narrowed_literal", "Grade", "Invalid", Grade=Step((("level", Level), ("mood", Literal["good"]))))
_change_steps("nested_required", "Visit", "missing required field `country`", Visit=Step((("address", FullAddress),)))
_change_steps("no_longer_transparent", "Wrap", "Expected `object`", Wrap=Step((("value", int),)))
_change_steps(
    "batch_field",
    "Index",
    "missing required field `url`",
    Index=Step((("url", str),), namespace=STEPS["Index"].namespace),
)
CHANGES["renamed_task"] = Change(
    lambda: make_app(STEPS, FLOWS, resize, "Post"), tuple(f"Mail.{step}" for step in STEPS), "unknown step"
)
CHANGES["removed_function"] = Change(lambda: make_app(STEPS, FLOWS, None), ("resize.Call",), "unknown step resize.Call")
CHANGES["function_parameter"] = Change(
    lambda: make_app(STEPS, FLOWS, resize_by_size), ("resize.Call",), "missing required field `size`"
)
CHANGES["function_default"] = Change(lambda: make_app(STEPS, FLOWS, resize_by_default))
CHANGES["removed_workflow"] = Change(
    lambda: make_app(STEPS, flows_with(without="fan"), resize), ("fan.Run",), "unknown step fan.Run"
)
CHANGES["new_workflow"] = Change(lambda: make_app(STEPS, [*FLOWS, workflow("late", policy=ONCE)(kid.function)], resize))


@_change_flow("step_at_end", of="order")
async def step_at_end(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve, number)
    cost = await ctx.step("price", price, number)
    await ctx.sleep("pause", DAY)
    await ctx.step("check", reserve, number)
    await ctx.step("charge", charge, cost.cents)
    return await ctx.step("thank", reserve, number)


@_change_flow("other_step_not_passed", of="order")
async def other_step_not_passed(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve, number)
    await ctx.step("price", price, number)
    await ctx.sleep("pause", DAY)
    return await ctx.step("invoice", charge, number)


@_change_flow("other_function_of_step", of="order")
async def other_function_of_step(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", charge, number + 1)
    cost = await ctx.step("price", price_by_default, number)
    await ctx.sleep("pause", 2 * DAY)
    return await ctx.step("charge", charge, cost.cents, policy=Policy(retry_limit=3))


CHANGES["raised_version"] = Change(
    lambda: make_app(
        STEPS,
        [*flows_with(without="order"), order, workflow("order", version=2, policy=ONCE)(step_inserted)],
        resize,
    )
)


async def step_inserted(ctx: WorkflowContext, number: int) -> str:
    if ctx.version >= 2:
        await ctx.step("check", reserve, number)
    await ctx.step("reserve", reserve, number)
    cost = await ctx.step("price", price, number)
    await ctx.sleep("pause", DAY)
    return await ctx.step("charge", charge, cost.cents)


_change_flow("branch_by_version", of="order")(workflow("order", version=2, since=1, policy=ONCE)(step_inserted))
_change_flow("dropped_version", "order", "unknown step order version 1", of="order")(
    workflow("order", version=2, policy=ONCE)(step_inserted)
)


@_change_flow("third_branch", of="fan")
async def third_branch(ctx: WorkflowContext) -> int:
    await ctx.gather(ctx.step("left", reserve, 1), ctx.step("right", reserve, 2), ctx.step("middle", reserve, 3))
    first = await ctx.wait_for_signal("go", int)
    await ctx.now()
    await ctx.wait_for_signal("go", int)
    return first


@_change_flow("wider_signal", of="fan")
async def wider_signal(ctx: WorkflowContext) -> int:
    await ctx.gather(ctx.step("left", reserve, 1), ctx.step("right", reserve, 2))
    first = await ctx.wait_for_signal("go", int | str)
    await ctx.now()
    await ctx.wait_for_signal("go", int)
    await ctx.step("insert", reserve, 1)
    return int(first)


@_change_flow("printing", of="order")
async def printing(ctx: WorkflowContext, number: int) -> str:
    print("pgtask: a print between the calls")
    return await order.function(ctx, number)  # type: ignore[no-any-return]


@_change_flow("inserted_step", "order", "step 'check' at place 1, where the journal has step 'reserve'", of="order")
async def inserted_step(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("check", reserve, number)
    return str(await order.function(ctx, number))


@_change_flow("renamed_workflow_step", "order", "step 'book' at place 1", of="order")
async def renamed_workflow_step(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("book", reserve, number)
    await ctx.step("price", price, number)
    await ctx.sleep("pause", DAY)
    return ""


@_change_flow("swapped_steps", "order", "step 'price' at place 1", of="order")
async def swapped_steps(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("price", price, number)
    await ctx.step("reserve", reserve, number)
    await ctx.sleep("pause", DAY)
    return ""


@_change_flow("removed_workflow_step", "order", "step 'price' at place 1", of="order")
async def removed_workflow_step(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("price", price, number)
    await ctx.sleep("pause", DAY)
    return ""


@_change_flow("sleep_to_signal", "order", "signal 'pause' at place 3, where the journal has sleep", of="order")
async def sleep_to_signal(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve, number)
    await ctx.step("price", price, number)
    await ctx.wait_for_signal("pause")
    return ""


@_change_flow("step_to_child", "order", "spawn 'price' at place 2, where the journal has step", of="order")
async def step_to_child(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve, number)
    await ctx.spawn("price", kid, number)
    return ""


@_change_flow("ends_early", "order", "ends without sleep 'pause'", of="order")
async def ends_early(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve, number)
    await ctx.step("price", price, number)
    return ""


@_change_flow("result_field", "order", "'price' cannot be decoded: Object missing required field", of="order")
async def result_field(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve, number)
    await ctx.step("price", price_in_euros, number)
    await ctx.sleep("pause", DAY)
    return ""


@_change_flow("result_type", "order", "'reserve' cannot be decoded: Expected `int`, got `str`", of="order")
async def result_type(ctx: WorkflowContext, number: int) -> str:
    await ctx.step("reserve", reserve_number, number)
    await ctx.step("price", price, number)
    await ctx.sleep("pause", DAY)
    return ""


@_change_flow("input_type", "order", "the input of workflow order cannot be decoded", of="order")
async def input_type(ctx: WorkflowContext, number: str) -> str:
    return await order.function(ctx, 1)  # type: ignore[no-any-return]


@_change_flow("raises", "order", "KeyError: 'r1'", of="order")
async def raises(ctx: WorkflowContext, number: int) -> str:
    found = await ctx.step("reserve", reserve, number)
    await ctx.step("price", price, {"r": 1}[found])
    await ctx.sleep("pause", DAY)
    return ""


@_change_flow("branches_swapped", "fan", "step 'right' at place 1.0.1", of="fan")
async def branches_swapped(ctx: WorkflowContext) -> int:
    await ctx.gather(ctx.step("right", reserve, 2), ctx.step("left", reserve, 1))
    return await ctx.wait_for_signal("go", int)


@_change_flow("branch_renamed", "fan", "step 'top' at place 1.0.1", of="fan")
async def branch_renamed(ctx: WorkflowContext) -> int:
    await ctx.gather(ctx.step("top", reserve, 2), ctx.step("right", reserve, 1))
    return await ctx.wait_for_signal("go", int)


@_change_flow("gather_to_steps", "fan", "step 'left' at place 1, and the journal has it at 1.0.1", of="fan")
async def gather_to_steps(ctx: WorkflowContext) -> int:
    await ctx.step("left", reserve, 1)
    await ctx.step("right", reserve, 1)
    return await ctx.wait_for_signal("go", int)


@_change_flow("gather_to_other_step", "fan", "passes step 'left'", of="fan")
async def gather_to_other_step(ctx: WorkflowContext) -> int:
    await ctx.step("both", reserve, 1)
    first = await ctx.wait_for_signal("go", int)
    await ctx.now()
    return first


@_change_flow("signal_renamed", "fan", "signal 'start' at place 2, where the journal has signal 'go'", of="fan")
async def signal_renamed(ctx: WorkflowContext) -> int:
    await ctx.gather(ctx.step("left", reserve, 1), ctx.step("right", reserve, 2))
    return await ctx.wait_for_signal("start", int)


@_change_flow("signal_type", "fan", "signal go cannot be read", of="fan")
async def signal_type(ctx: WorkflowContext) -> int:
    await ctx.gather(ctx.step("left", reserve, 1), ctx.step("right", reserve, 2))
    return len(await ctx.wait_for_signal("go", list[str]))


@_change_flow("value_inserted", "fan", "passes step 'left'", of="fan")
async def value_inserted(ctx: WorkflowContext) -> int:
    await ctx.random()
    await ctx.gather(ctx.step("left", reserve, 1), ctx.step("right", reserve, 2))
    return 0


@_change_flow("empty_gather_inserted", "fan", "value 'random' at place 2, where", of="fan")
async def empty_gather_inserted(ctx: WorkflowContext) -> int:
    await ctx.gather()
    await ctx.random()
    return 0


@_change_flow("other_child", "parent", "asks for 2 of other, and the journal has 2 of kid", of="parent")
async def other_child(ctx: WorkflowContext) -> int:
    return len(await ctx.results(await ctx.spawn_many("kids", other, [1, 2])))


@_change_flow("more_children", "parent", "asks for 3 of kid, and the journal has 2 of kid", of="parent")
async def more_children(ctx: WorkflowContext) -> int:
    return len(await ctx.results(await ctx.spawn_many("kids", kid, [1, 2, 3])))


@_change_flow("results_not_awaited", "parent", "sleep 'pause' at place 2, where the journal has children", of="parent")
async def results_not_awaited(ctx: WorkflowContext) -> int:
    await ctx.spawn_many("kids", kid, [1, 2])
    await ctx.sleep("pause", DAY)
    return 0


HARMLESS = [name for name, change in CHANGES.items() if not change.breaks]
BREAKING = [name for name, change in CHANGES.items() if change.breaks]


def __getattr__(name: str) -> App:
    """Return the app after a change."""
    if (change := CHANGES.get(name.removeprefix("app_"))) is None:
        raise AttributeError(name)
    return change.make()
