"""`@task` makes a task of one step from a function: its step, its row, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest
from fix_database import run

from pgtask import (
    App,
    Context,
    DefinitionError,
    Done,
    EnqueueError,
    Fail,
    Next,
    Outcome,
    Policy,
    Task,
    WorkflowContext,
    task,
    workflow,
)
from pgtask._cli.commands.graph import mermaid
from pgtask.testing import MemoryClient, MemoryWorker, run_task

CONTEXT = Context(UUID(int=1), 1, None, [])


@task("greet", policy=Policy(retry_limit=2, queue="mail"), archive=True)
async def greet(ctx: Context, name: str, times: int = 1) -> Done | Fail:
    """Say hello."""
    if not name:
        return Fail("nameless")
    ctx.resources.append((name, times))
    return Done()


@task("send a mail: now")
def send(ctx: Context, to: Address, *, subject: str = "", urgent: bool) -> Done:
    ctx.resources.append((to.text, subject, urgent))
    return Done()


@task("nothing")
async def nothing(ctx: Context, /) -> Done:
    return Done()


class Address(msgspec.Struct):
    """Defined after the function that names it."""

    text: str


app = App(greet, send, nothing)


# --- a call makes the step


@pytest.mark.parametrize(
    ("step", "raw", "seen"),
    [
        (greet("Ada"), '{"greet":{"Call":{"name":"Ada","times":1}}}', ("Ada", 1)),
        (greet(times=3, name="Ada"), '{"greet":{"Call":{"name":"Ada","times":3}}}', ("Ada", 3)),
        (
            send(Address("a@b"), urgent=True),
            '{"send a mail: now":{"Call":{"to":{"text":"a@b"},"subject":"","urgent":true}}}',
            ("a@b", "", True),
        ),
        (
            send(to=Address("a@b"), urgent=False, subject="x"),
            '{"send a mail: now":{"Call":{"to":{"text":"a@b"},"subject":"x","urgent":false}}}',
            ("a@b", "x", False),
        ),
    ],
    ids=repr,
)
def test_call_makes_a_step_that_calls_the_function(step: Task, raw: str, seen: Any) -> None:
    calls: list[Any] = []
    done = run_task(app, step, resources=calls)
    assert (done.state, done.raw, calls) == ("done", raw, [seen])


def test_step_without_fields_is_stored_as_null() -> None:
    assert run_task(app, nothing()).raw == '{"nothing":{"Call":null}}'


def test_steps_of_equal_calls_are_equal_and_shown_as_calls() -> None:
    assert greet("Ada") == greet(name="Ada", times=1) != greet("Bob")
    assert repr(greet("Ada")) == "greet(name='Ada', times=1)"
    assert repr(greet) == "<task greet>"
    assert (greet.__name__, greet.__doc__) == ("greet", "Say hello.")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: greet(), r"greet\(\): .*'name'"),  # type: ignore[call-arg]
        (lambda: greet("Ada", 1, 2), r"greet\(\): "),  # type: ignore[call-arg]
        (lambda: greet("Ada", nam="x"), r"greet\(\): .*'nam'"),  # type: ignore[call-arg]
        (lambda: send(Address("a")), r"send a mail: now\(\): .*'urgent'"),  # type: ignore[call-arg]
        (lambda: send(Address("a"), "x", urgent=True), r"send a mail: now\(\): "),  # type: ignore[call-arg]
    ],
)
def test_call_with_wrong_arguments_is_a_type_error(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=f"^{says}"):
        call()


def test_value_of_a_wrong_type_is_refused_at_the_enqueue() -> None:
    with pytest.raises(EnqueueError, match=r"greet\.Call cannot be decoded: Expected `str`, got `int`"):
        run(MemoryClient().enqueue(greet(7)))  # type: ignore[arg-type]


def test_task_that_is_not_called_is_refused_at_the_enqueue() -> None:
    with pytest.raises(EnqueueError, match=r"^greet is a task: call it to make a step, greet\(\.\.\.\)$"):
        run(MemoryClient().enqueue(greet))  # type: ignore[arg-type]


def test_function_is_called_by_itself_in_a_unit_test() -> None:
    assert run(greet.run(CONTEXT, "Ada")) == Done()
    assert run(greet.run(CONTEXT, name="")) == Fail("nameless")
    assert send.run(CONTEXT, Address("a@b"), urgent=True) == Done()


# --- its app


def test_app_knows_the_step_by_its_names_and_settings() -> None:
    definition = app.steps[greet.step]
    assert (definition.label, definition.fields) == ("greet.Call", ("name", "times"))
    assert (definition.policy.queue, definition.archive) == ("mail", True)
    assert (definition.is_async, definition.finishes, definition.fails) == (True, True, True)
    assert not app.steps[send.step].is_async
    assert list(app.tasks) == list(app.functions) == ["greet", "send a mail: now", "nothing"]


def test_app_takes_functions_beside_classes_and_workflows() -> None:
    class Other(Task):
        pass

    class Step(Other):
        async def run(self, ctx: Context) -> Done:
            return Done()

    @workflow("flow")
    async def flow(ctx: WorkflowContext) -> None: ...

    assert repr(App(greet, Other, flow)) == "App(greet, Other, flow)"


@pytest.mark.parametrize("kind", ["function", "class", "workflow"])
def test_two_tasks_of_one_name_are_refused(kind: str) -> None:
    @task("greet")
    async def other(ctx: Context) -> Done:
        return Done()

    @workflow("greet")
    async def flow(ctx: WorkflowContext) -> None: ...

    cls = type("greet", (Task,), {})
    type("Step", (cls,), {"run": greet.step.run})  # type: ignore[attr-defined]
    second: Any = {"function": other, "class": cls, "workflow": flow}[kind]
    with pytest.raises(DefinitionError, match="are named greet; rename one, rows store"):
        App(greet, second)


def test_graph_shows_each_function_as_one_state() -> None:
    assert mermaid(app).splitlines()[1:6] == [
        '    state "parked" as task0__parked',
        '    state "greet (queue mail)" as task0',
        "    [*] --> task0",
        "    task0 --> [*]",
        "    task0 --> task0__parked: Fail",
    ]
    assert '    state "send a mail: now" as task1' in mermaid(app).splitlines()


# --- in memory


def test_faults_and_assertions_take_the_function() -> None:
    async def main() -> None:
        async with MemoryWorker(app, resources=[]) as worker:
            worker.fail(greet, OSError("no"), times=2)
            worker.crash(send)
            id = await worker.client.enqueue(greet("Ada"), key="once")
            await worker.client.delay(send(Address("a"), urgent=True), timedelta(days=1))
            await worker.run()
            assert [(one.step, one.attempt) for one in worker.task(id).tries] == [(greet("Ada"), n) for n in (1, 2, 3)]
            assert {one.state for one in worker.tasks} == {"done"}
            worker.client.assert_enqueued(greet("Ada"), queue="mail", key="once")
            assert worker.client.assert_enqueued(greet, times=1).step == greet("Ada")
            worker.client.assert_not_enqueued(nothing)
            with pytest.raises(AssertionError):
                worker.client.assert_not_enqueued(send)
            with pytest.raises(DefinitionError, match="its policy has no timeout"):
                worker.time_out(greet)

    run(main())


# --- what is refused


async def without_return(ctx: Context, name: str): ...  # type: ignore[no-untyped-def]
async def without_annotation(ctx: Context, name) -> Done: ...  # type: ignore[no-untyped-def,empty-body]
async def any_number(ctx: Context, *names: str) -> Done: ...  # type: ignore[empty-body]
async def any_names(ctx: Context, **names: str) -> Done: ...  # type: ignore[empty-body]
async def positional(ctx: Context, name: str, /) -> Done: ...  # type: ignore[empty-body]
async def no_context() -> Done: ...  # type: ignore[empty-body]
async def only_keywords(*, ctx: Context) -> Done: ...  # type: ignore[empty-body]
async def reserved(ctx: Context, policy: str) -> Done: ...  # type: ignore[empty-body]
async def shared(ctx: Context, names: list[str] = ["x"]) -> Done: ...  # type: ignore[empty-body]  # noqa: B006
async def yields(ctx: Context) -> Done:  # type: ignore[misc]
    yield Done()


@functools.wraps(greet.function)
def hides(*args: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (without_return, r"without_return\(\) has no return annotation; add -> Done, or -> Done | Fail"),
        (without_annotation, r"the parameter name of without_annotation\(\) has no annotation; add one, as in name: "),
        (any_number, r"the parameter names of any_number\(\) takes any number of arguments; name each one"),
        (any_names, r"the parameter names of any_names\(\) takes any number of arguments; name each one"),
        (positional, r"the parameter name of positional\(\) has no name to be stored by; put the / "),
        (no_context, r"no_context\(\) must take the context first: \(ctx: Context, \.\.\.\)"),
        (only_keywords, r"only_keywords\(\) must take the context first"),
        (reserved, r"the parameter policy of reserved\(\) has a name that Task uses; rename it"),
        (shared, r"a default value cannot be kept: .*\['x'\]"),
        (yields, r"yields\(\) is a generator; return one outcome instead of yielding"),
        (hides, r"the decorator of greet\(\) hides that it is async; make its wrapper async def"),
        (Address, r"<class .*> is not a function"),
    ],
)
def test_function_that_cannot_be_a_step_is_refused(function: Any, says: str) -> None:
    with pytest.raises(DefinitionError, match=f"^task t: {says}"):
        task("t")(function)


async def goes_on(ctx: Context) -> Next[Any] | Done: ...  # type: ignore[empty-body]
async def anything(ctx: Context) -> Outcome[Any]: ...  # type: ignore[empty-body]
async def none(ctx: Context) -> None: ...
async def later(ctx: Context) -> Undefined: ...  # type: ignore[name-defined]  # noqa: F821
async def strange(ctx: Context, value: Undefined) -> Done: ...  # type: ignore[name-defined,empty-body]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (goes_on, r"task t: goes_on\(\) is annotated -> .*; a task of one step is done or fails: annotate it -> Done"),
        (anything, r"task t: anything\(\) is annotated -> .*for further steps derive a class from Task$"),
        (none, r"task t: none\(\) is annotated -> None; a task of one step"),
        (later, r"step t\.Call: the annotation -> Undefined cannot be read: name 'Undefined' is not defined"),
        (strange, r"step t\.Call: a field has a type that cannot be decoded: name 'Undefined' is not defined"),
    ],
)
def test_annotation_that_cannot_be_is_refused_by_the_app(function: Any, says: str) -> None:
    with pytest.raises(DefinitionError, match=f"^{says}"):
        App(task("t")(function))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: task(none), r'^@task without a name: write @task\("none"\) before none\(\)'),  # type: ignore[arg-type]
        (lambda: task(""), "^task '' must be named by 1 to 255 printable characters$"),
        (lambda: task("a\nb"), "must be named by"),
        (lambda: task("t", policy=3), "^task t: policy must be a pgtask.Policy, not 3$"),  # type: ignore[arg-type]
    ],
)
def test_wrong_use_of_the_decorator_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(DefinitionError, match=says):
        make()


def test_annotation_of_a_decorated_function_is_read_at_home() -> None:
    """The decorator stands in a module that does not know the names."""
    scope: dict[str, Any] = {"functools": functools}
    exec("def plain(f):\n @functools.wraps(f)\n def g(*a, **k): return f(*a, **k)\n return g", scope)

    def local(ctx: Context, address: Address) -> Finished:
        return Done()

    done = run_task(App(one := task("one")(scope["plain"](local))), one(Address("x")))
    assert done.state == "done"


Finished = Done
