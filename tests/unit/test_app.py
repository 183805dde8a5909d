"""App definitions: what is read from the classes, and every definition that is refused, named with its remedy.

Most tasks are made inside a function, so that this also shows that local classes work as well as a module's.
"""

# mypy: disable-error-code="valid-type,name-defined"

from __future__ import annotations

import functools
import sys
import textwrap
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Optional, Union
from uuid import UUID

import msgspec
import pytest

import pgtask
from pgtask import App, Context, DefinitionError, Done, Fail, Next, Outcome, Policy, Task
from pgtask.app import load_app
from pgtask.errors import AppLoadError
from pgtask.task import family_of

NAMES_IN_ANNOTATIONS = Optional, Union, typing, pgtask  # that are evaluated in this module


class Greeter(Task):
    """A module's task: its steps lead on to steps that are defined below them."""

    policy = Policy(retry_limit=3)


class ReadName(Greeter):
    policy = Policy(retry_limit=5, queue="files")
    filename: str

    async def run(self, ctx: Context) -> Next[SayHello] | Next[ReadName]:
        raise NotImplementedError


class SayHello(Greeter):
    name: str
    times: int = 1

    def run(self, ctx: Context) -> Done | Fail:
        raise NotImplementedError


class Mailer(Task):
    pass


class Send(Mailer):
    transparent = True
    address: str

    async def run(self, ctx: Context) -> Outcome[Send]:
        raise NotImplementedError


# --- what an app knows --------------------------------------------------------------------------------------------


def test_an_app_knows_its_steps() -> None:
    app = App(Greeter, Mailer)
    assert list(app.tasks) == ["Greeter", "Mailer"]
    assert repr(app) == "App(Greeter, Mailer)"
    assert [definition.label for definition in app] == ["Greeter.ReadName", "Greeter.SayHello", "Mailer.Send"]
    read, say, send = app
    assert app.steps == {ReadName: read, SayHello: say, Send: send}
    assert (read.cls, read.task, read.name, read.fields) == (ReadName, "Greeter", "ReadName", ("filename",))
    assert (read.edges, read.is_async, read.transparent) == ((SayHello, ReadName), True, False)
    assert (say.edges, say.is_async, say.fields) == ((), False, ("name", "times"))
    assert (send.edges, send.transparent) == ((Send,), True)
    assert read.policy == Policy(retry_limit=5, queue="files")
    assert say.policy == Policy(retry_limit=3)  # the family's
    assert send.policy == Policy()


def test_an_app_keeps_its_lifespan() -> None:
    def lifespan() -> Any:
        raise AssertionError("an app does no I/O")

    assert App(Greeter, lifespan=lifespan).lifespan is lifespan
    assert App(Greeter).lifespan is None


@asynccontextmanager
async def opened() -> AsyncIterator[int]:
    yield 5


@contextmanager
def opened_without_async() -> Iterator[int]:
    yield 5


class Opened(AbstractAsyncContextManager[int]):
    async def __aexit__(self, *_: object) -> None:
        pass


class Reopened(Opened):
    """One that gives itself, each time that it is called."""

    def __call__(self) -> Reopened:
        return self


@pytest.mark.parametrize("lifespan", [opened, Opened, Reopened(), lambda: opened(), functools.partial(opened)])
def test_what_makes_an_async_context_manager_may_be_a_lifespan(lifespan: Any) -> None:
    assert App(Greeter, lifespan=lifespan).lifespan is lifespan


async def generator() -> AsyncIterator[int]:
    yield 5


async def coroutine() -> None:
    raise NotImplementedError


def plain_generator() -> Iterator[int]:
    yield 5


@pytest.mark.parametrize(
    ("lifespan", "reason"),
    [
        (3, "it is not a function"),
        (opened(), "it is what that function returns: pass the function, without calling it"),
        (Opened(), "it is what that function returns: pass the function, without calling it"),
        (generator, "it lacks the decorator"),
        (coroutine, "it lacks the decorator, or the yield"),
        (plain_generator, "it is not async"),
        (opened_without_async, "it is not async"),
        (int, "the class int is not an async context manager"),
        (asynccontextmanager(lambda app: generator()), "it must not need arguments, and takes (app)"),
        (lambda app, *, more: opened(), "it must not need arguments, and takes (app, *, more)"),
    ],
)
def test_a_lifespan_that_cannot_be_entered_is_refused(lifespan: Any, reason: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        App(Greeter, lifespan=lifespan)
    assert str(caught.value).startswith("App(lifespan=")
    assert str(caught.value).endswith(
        f": {reason}; define it as @asynccontextmanager async def lifespan() with a yield"
    )


def test_the_family_of_a_step() -> None:
    assert family_of(ReadName) is Greeter
    assert family_of(Greeter) is Greeter
    assert family_of(Task) is None


def a_step(annotation: Any) -> type[Task]:
    """A task with the steps A and B; the run() of A is annotated so."""

    class Family(Task):
        pass

    class A(Family):
        async def run(self, ctx: Context) -> Any:
            raise NotImplementedError

    class B(Family):
        async def run(self, ctx: Context) -> Done:
            raise NotImplementedError

    class Other(Task):
        pass

    class C(Other):
        async def run(self, ctx: Context) -> Done:
            raise NotImplementedError

    if callable(annotation):
        annotation = annotation(A, B, C)
    A.run.__annotations__["return"] = annotation
    Family.made = A, B, C  # type: ignore[attr-defined]  # classes know their subclasses only weakly
    return Family


EDGES: list[tuple[Any, list[str]]] = [
    ("Done", []),
    ("Fail", []),
    ("Done | Fail", []),
    ("Next[A]", ["A"]),
    ("Next[B] | Next[A]", ["B", "A"]),
    ("Next[A | B]", ["A", "B"]),
    ("Next[A] | Next[A] | Done", ["A"]),
    ("Outcome[B]", ["B"]),
    ("Outcome[A | B]", ["A", "B"]),
    ("Union[Next[B], Done]", ["B"]),
    ("typing.Union[Next[A], Fail]", ["A"]),
    ("pgtask.Next[B] | pgtask.Done", ["B"]),
    ('Next["B"]', ["B"]),
    ('Next["A"] | Next["B"] | Done', ["A", "B"]),
    (lambda a, b, c: Done, []),
    (lambda a, b, c: Next[b] | Done, ["B"]),
    (lambda a, b, c: Union[Next[a], Next[b], Done], ["A", "B"]),  # noqa: UP007
    (lambda a, b, c: Next["B"], ["B"]),
    (lambda a, b, c: "Next[B]", ["B"]),
]


@pytest.mark.parametrize(
    ("annotation", "edges"), EDGES, ids=lambda value: "objects" if callable(value) else str(value)[:40]
)
def test_edges_are_read_from_the_annotation(annotation: Any, edges: list[str]) -> None:
    definition = next(iter(App(a_step(annotation))))
    assert [edge.__name__ for edge in definition.edges] == edges


def test_a_step_inherits_run_and_fields() -> None:
    class Family(Task):
        common: int = 0

        async def run(self, ctx: Context) -> Next[First] | Done:
            raise NotImplementedError

    class First(Family):
        pass

    class Second(First):
        more: str = ""

    first, second = App(Family)
    assert (first.cls, second.cls) == (First, Second)
    assert first.edges == second.edges == (First,)
    assert (first.fields, second.fields) == (("common",), ("common", "more"))


def test_a_decorated_run_is_read_through() -> None:
    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        async def wrapper(self: Any, ctx: Context) -> Any:
            return await run(self, ctx)

        return wrapper

    class Family(Task):
        pass

    class A(Family):
        @decorate
        async def run(self, ctx: Context) -> Next[B]:
            raise NotImplementedError

    class B(Family):
        async def run(self, ctx: Context, verbose: bool = False) -> Done:
            raise NotImplementedError

    first, _ = App(Family)
    assert (first.edges, first.is_async) == ((B,), True)


def test_a_decorator_that_hides_an_async_handles_is_refused() -> None:
    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def wrapper(self: Any, ctx: Context) -> Any:
            return run(self, ctx)

        return wrapper

    async def run(self: Any, ctx: Context) -> Done:
        raise NotImplementedError

    message = refused(step_with(run=decorate(run)))
    assert message == "step Family.Step: the decorator of run() hides that it is async; make its wrapper async def"


def test_a_step_that_derives_from_two_steps_is_one_step() -> None:
    class Family(Task):
        pass

    class A(Family):
        async def run(self, ctx: Context) -> Done:
            raise NotImplementedError

    class B(Family):
        async def run(self, ctx: Context) -> Done:
            raise NotImplementedError

    class Both(A, B):
        pass

    assert {definition.name for definition in App(Family)} == {"A", "B", "Both"}


def test_class_known_to_checkers_only_is_found_by_its_name() -> None:
    """`if TYPE_CHECKING: from pgtask import Next` leaves no name at run time."""
    names: dict[str, Any] = {"Task": Task, "Context": Context}
    exec(
        textwrap.dedent("""
            from __future__ import annotations

            class Quiet(Task):
                pass

            class Begin(Quiet):
                async def run(self, ctx: Context) -> Next[End] | Done | Fail: ...

            class End(Quiet):
                async def run(self, ctx: Context) -> Done: ...
        """),
        names,
    )
    begin, end = App(names["Quiet"])
    assert begin.edges == (end.cls,)


def test_annotations_that_are_not_text() -> None:
    """A module without `from __future__ import annotations`."""
    names: dict[str, Any] = {}
    exec(
        compile(
            textwrap.dedent("""
                from pgtask import Context, Done, Next, Task

                class Plain(Task):
                    pass

                class End(Plain):
                    async def run(self, ctx: Context) -> Done: ...

                class Begin(Plain):
                    async def run(self, ctx: Context) -> Next[End] | Done: ...

                class Ahead(Plain):
                    async def run(self, ctx: Context) -> "Next[Later]": ...

                class AheadToo(Plain):
                    async def run(self, ctx: Context) -> Next["Later"] | Done: ...

                class Later(Plain):
                    async def run(self, ctx: Context) -> Done: ...
            """),
            "plain.py",
            "exec",
            dont_inherit=True,
        ),
        names,
    )
    edges = {definition.name: [edge.__name__ for edge in definition.edges] for definition in App(names["Plain"])}
    assert edges == {"End": [], "Begin": ["End"], "Ahead": ["Later"], "AheadToo": ["Later"], "Later": []}


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(*tasks: Any) -> str:
    with pytest.raises(DefinitionError) as caught:
        App(*tasks)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_app_needs_tasks() -> None:
    assert refused() == "App() has no tasks: pass the classes that derive from Task, as in App(Greeter)"


@pytest.mark.parametrize(
    ("thing", "name"),
    [(int, "int"), (Task, "Task"), (ReadName, "ReadName"), (5, "5"), (None, "None"), (Greeter.__name__, "'Greeter'")],
)
def test_what_is_no_task_is_named(thing: Any, name: str) -> None:
    assert refused(thing) == f"App({name}): not a task; pass a class that derives directly from Task"


def test_a_task_needs_steps() -> None:
    class Empty(Task):
        pass

    assert refused(Empty) == "task Empty has no steps; derive at least one class with a run() from it"


def test_two_tasks_of_one_name() -> None:
    def make() -> type[Task]:
        class Twin(Task):
            pass

        class Step(Twin):
            async def run(self, ctx: Context) -> Done:
                raise NotImplementedError

        Twin.made = Step  # type: ignore[attr-defined]  # classes know their subclasses only weakly
        return Twin

    assert refused(make(), make()).startswith("App: two tasks are named Twin; rename one")
    twin = make()
    assert refused(twin, twin).startswith("App: two tasks are named Twin; rename one")


def test_two_steps_of_one_name() -> None:
    class Family(Task):
        pass

    def make() -> type[Task]:
        class Same(Family):
            async def run(self, ctx: Context) -> Done:
                raise NotImplementedError

        return Same

    both = make(), make()
    assert refused(Family).startswith("task Family has two steps named Same; rename one")
    assert len(both) == 2


def step_with(**namespace: Any) -> type[Task]:
    """A task with one step, Step, of which these are the attributes."""

    class Family(Task):
        pass

    async def run(self: Any, ctx: Context) -> Done:
        raise NotImplementedError

    namespace = {"run": run, "__module__": __name__, **namespace}
    if namespace["run"] is None:
        del namespace["run"]
    made = types.new_class("Step", (Family,), exec_body=lambda body: body.update(namespace))
    Family.made = made  # type: ignore[attr-defined]  # as above
    return Family


def test_a_step_needs_a_run() -> None:
    message = refused(step_with(run=None))
    assert message == "step Family.Step has no run(); add: async def run(self, ctx: Context) -> Done"


@pytest.mark.parametrize("run", [5, classmethod(lambda cls, ctx: 0), functools.partial(print), print])
def test_run_must_be_a_method(run: Any) -> None:
    message = refused(step_with(run=run))
    assert message == "step Family.Step: run must be a plain method, async def run(self, ctx: Context)"


def test_run_must_not_be_a_generator() -> None:
    def generator(self: Any, ctx: Context) -> Any:
        yield Done()

    async def async_generator(self: Any, ctx: Context) -> Any:
        yield Done()

    for run in (generator, async_generator):
        message = refused(step_with(run=run))
        assert message == "step Family.Step: run() is a generator; return one outcome instead of yielding"


def test_run_takes_a_context() -> None:
    async def nothing(self: Any) -> Done:
        raise NotImplementedError

    async def two(self: Any, ctx: Context, more: int) -> Done:
        raise NotImplementedError

    async def by_name(self: Any, *, ctx: Context) -> Done:
        raise NotImplementedError

    async def none_at_all() -> Done:
        raise NotImplementedError

    for run in (nothing, two, by_name, none_at_all, staticmethod(nothing)):
        message = refused(step_with(run=run))
        assert message.startswith("step Family.Step: run(")
        assert message.endswith("must take self and one context: run(self, ctx: Context)")


def test_run_needs_a_return_annotation() -> None:
    async def run(self, ctx):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    message = refused(step_with(run=run))
    assert message == "step Family.Step: run() has no return annotation; add one, as in -> Next[SomeStep] | Done"


NOT_OUTCOMES: list[tuple[Any, str]] = [
    ("None", "None"),
    ("Done | None", "Done | None"),
    ("Optional[Done]", "Done"),
    ("int", "int"),
    ("A", "A"),
    ("A | Done", "A"),
    ("Next", "Next"),
    ("Any", "Any"),
    ("typing.NoReturn", "NoReturn"),
    ("list[Done]", "list"),
    ("Task", "Task"),
    ("type[Done]", "type"),
    (lambda a, b, c: None, "None"),
    (lambda a, b, c: b, "B"),
]


@pytest.mark.parametrize(
    ("annotation", "shown"), NOT_OUTCOMES, ids=lambda value: "objects" if callable(value) else str(value)
)
def test_the_annotation_must_name_outcomes(annotation: Any, shown: str) -> None:
    message = refused(a_step(annotation))
    assert message.startswith("step Family.A: run() is annotated -> ")
    assert shown in message
    assert message.endswith("; annotate it with outcomes, as in -> Next[SomeStep] | Done")


@pytest.mark.parametrize(
    ("annotation", "edge"),
    [
        ("Next[int]", "int"),
        ("Next[Task]", "Task"),
        ("Next[Any]", "Any"),
        ("Next[None]", "None"),
        ("Next[A | int]", "int"),
        ("Outcome", "StepT"),
        ("Next[SayHello]", "SayHello"),
        ('Next["Nowhere"]', "Nowhere"),
        (lambda a, b, c: Next[c], "C"),
        (lambda a, b, c: Next[c] | Next[b] | Done, "C"),
    ],
    ids=lambda value: "objects" if callable(value) else str(value),
)
def test_an_edge_leads_to_a_step_of_the_same_task(annotation: Any, edge: str) -> None:
    message = refused(a_step(annotation))
    assert message.startswith("step Family.A: the edge Next[")
    assert edge in message
    assert "(A, B" in message  # where it may lead
    assert "Family" in message


def test_an_edge_to_the_task_itself_is_refused() -> None:
    class Family(Task):
        pass

    class A(Family):
        async def run(self, ctx: Context) -> Next[Family]:
            raise NotImplementedError

    A.run.__annotations__["return"] = Next[Family]
    assert "Next[Family]" in refused(Family)


def test_an_edge_to_a_class_of_the_same_name_is_refused() -> None:
    """A step of this name is in the family, but it is another class."""

    def make() -> tuple[type[Task], type[Task]]:
        class Family(Task):
            pass

        class B(Family):
            async def run(self, ctx: Context) -> Done:
                raise NotImplementedError

        return Family, B

    other_family, stranger = make()
    message = refused(a_step(lambda a, b, c: Next[stranger]))
    assert "Next[" in message
    assert other_family.__subclasses__()


@pytest.mark.parametrize("annotation", ["Nxt[B]", "Next[Nowhere]", "Next[A, B]", "1/0", "Next[A] |", "Next[A"])
def test_an_annotation_that_cannot_be_read_is_shown(annotation: str) -> None:
    message = refused(a_step(annotation))
    assert message.startswith("step Family.A: ")
    assert annotation in message or "cannot be read" in message


def test_a_policy_must_be_a_policy() -> None:
    for policy in (5, None, {"retry_limit": 5}, Policy):
        message = refused(step_with(policy=policy))
        assert message.startswith("step Family.Step: policy must be a pgtask.Policy, not ")


@pytest.mark.parametrize("name", ["policy", "transparent", "run"])
def test_a_field_cannot_hide_what_task_uses(name: str) -> None:
    message = refused(step_with(**{"__annotations__": {name: Policy}, name: Policy()}))
    assert message == f"step Family.Step: a field cannot be named {name!r}, Task uses that name; rename it"


@pytest.mark.parametrize("fields", [{}, {"a": int, "b": int}])
def test_transparent_needs_exactly_one_field(fields: dict[str, Any]) -> None:
    message = refused(step_with(transparent=True, __annotations__=fields))
    assert message == f"step Family.Step: transparent = True needs exactly one field, it has {len(fields)}"


@pytest.mark.parametrize("kind", [complex | int | object, list[int] | tuple[int, ...], "Nowhere"], ids=str)
def test_a_field_must_be_decodable(kind: Any) -> None:
    message = refused(step_with(__annotations__={"field": kind}))
    assert message.startswith("step Family.Step: a field has a type that cannot be decoded: ")


class Money:
    """A plain class: msgspec would ask a hook for it, and there is none."""


class Coin(str):
    pass


class Purse(msgspec.Struct):
    content: list[Money]


class Tree(msgspec.Struct):
    branches: list[Tree]


@pytest.mark.parametrize("kind", [Money, Money | None, list[Money], dict[str, tuple[Money, int]], Purse, complex, Coin])
def test_a_field_of_a_class_that_cannot_be_decoded_is_refused(kind: Any) -> None:
    shown = {complex: "complex", Coin: "Coin"}.get(kind, "Money")
    assert refused(step_with(__annotations__={"good": int, "price": kind})) == (
        f"step Family.Step: the field 'price' needs the class {shown}, which cannot be read from JSON; "
        "make it a msgspec.Struct, a dataclass or an Enum, or store plain values that it can be made from"
    )


@pytest.mark.parametrize("kind", [Any, object, Iterable[int], Tree, UUID, timedelta, Decimal | None, set[bytes]])
def test_a_field_may_be_whatever_can_be_read_from_json(kind: Any) -> None:
    (definition,) = App(step_with(__annotations__={"field": kind}))
    assert definition.fields == ("field",)


def test_a_class_variable_is_no_field() -> None:
    class Family(Task):
        pass

    class Step(Family):
        limit: ClassVar[int] = 5

        async def run(self, ctx: Context) -> Done:
            raise NotImplementedError

    (definition,) = App(Family)
    assert definition.fields == ()


# --- loading an app by name ---------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write the module `some_app`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_app", raising=False)

    def write(text: str) -> None:
        (tmp_path / "some_app.py").write_text(textwrap.dedent(text))

    return write


GOOD = """
    from pgtask import App, Context, Done, Task

    class Family(Task): ...
    class Step(Family):
        async def run(self, ctx: Context) -> Done: ...

    app = App(Family)
    class holder:
        inner = app
"""


@pytest.mark.parametrize("reference", ["some_app:app", "some_app:holder.inner"])
def test_an_app_is_loaded_by_name(module: Callable[[str], None], reference: str) -> None:
    module(GOOD)
    assert repr(load_app(reference)) == "App(Family)"


@pytest.mark.parametrize(
    ("reference", "text", "message"),
    [
        ("some_app", GOOD, "app 'some_app' is not of the form module:attribute: did you mean some_app:app?"),
        (":app", GOOD, "app ':app' is not of the form module:attribute, as in greetings:app"),
        ("some_app:", GOOD, "app 'some_app:' is not of the form module:attribute: did you mean some_app:app?"),
        ("no_such_app:app", GOOD, "app 'no_such_app:app': no module named 'no_such_app' here or on the path"),
        ("some_app.sub:app", GOOD, "app 'some_app.sub:app': "),
        ("some_app:other", GOOD, "app 'some_app:other': module 'some_app' has no attribute 'other'"),
        ("some_app:Family", GOOD, "app 'some_app:Family' is of type StructMeta, not a pgtask.App"),
        ("some_app:Family.x", GOOD, "app 'some_app:Family.x': type object 'Family' has no attribute 'x'"),
    ],
)
def test_an_app_that_cannot_be_loaded_is_one_readable_line(
    module: Callable[[str], None], reference: str, text: str, message: str
) -> None:
    module(text)
    with pytest.raises(AppLoadError) as caught:
        load_app(reference)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert reference in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nimport no_such_module", "importing it failed: no module named 'no_such_module' (at HERE:2 in <module>)"),
        ("1/0", "importing it failed: ZeroDivisionError: division by zero (at HERE:1 in <module>)"),
        ("\n\ndef x", "importing it failed: SyntaxError: expected '(' (at HERE:3)"),
        ("import json\njson.loads('')", "(at HERE:2 in <module>)"),  # not in json
        ("import json\njson.nothing", "has no attribute 'nothing' (at HERE:2 in <module>)"),
        ("def f():\n    raise KeyError\nf()", "importing it failed: KeyError (at HERE:2 in f)"),
        ("raise ValueError('a\\n b')", "importing it failed: ValueError: a b (at HERE:1 in <module>)"),
        ("import sys; sys.exit(7)", "importing it called sys.exit(7) (at HERE:1 in <module>)"),
        ("from pgtask import App\napp = App()", "as in App(Greeter) (at HERE:2 in <module>)"),
        ("from pgtask import Policy\nPolicy(jitter=9)", "must be a number from 0 to 1 (at HERE:2 in <module>)"),
        (
            "from pgtask import workflow\n@workflow\nasync def hello(ctx): ...",
            '@workflow without a name: write @workflow("hello") before hello(), with the name that rows are to store'
            " (at HERE:2 in <module>)",
        ),
        ("def f(x=missing): ...", "NameError: name 'missing' is not defined (at HERE:1 in <module>)"),
        ("class A:\n    x: int = missing", "NameError: name 'missing' is not defined (at HERE:2 in A)"),
        ("def f():\n    x: Later = missing\nf()", "name 'missing' is not defined (at HERE:2 in f)"),
    ],
)
def test_what_fails_in_the_import_is_shown_with_its_place(
    module: Callable[[str], None], tmp_path: Path, text: str, message: str
) -> None:
    module(text)
    with pytest.raises(AppLoadError) as caught:
        load_app("some_app:app")
    assert str(caught.value).startswith("app 'some_app:app': ")
    assert str(caught.value).endswith(message.replace("HERE", str(tmp_path / "some_app.py")))
    assert "\n" not in str(caught.value)


MISSING = "; is `from __future__ import annotations` missing there?"


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="annotations are not evaluated at an import any more")
@pytest.mark.parametrize(
    "text",
    [
        "class B:\n    def run(self, ctx) -> list[Later]: ...\nclass Later: ...",
        "class B:\n    def run(\n        self, ctx: Later\n    ) -> None: ...",
        "class B:\n    x: Later | None",
        "class B:\n    x: (\n        Later\n    ) = None",
        "async def flow(ctx, *rest: Later): ...",
        "def f(): \n    class B:\n        x: dict[str, Later]\nf()",
    ],
)
def test_name_that_an_annotation_needs_early_has_its_remedy(module: Callable[[str], None], text: str) -> None:
    module(f"from typing import *\n{text}")
    with pytest.raises(AppLoadError, match="NameError: name 'Later' is not defined") as caught:
        load_app("some_app:app")
    assert str(caught.value).endswith(MISSING)


@pytest.mark.parametrize("text", ["def create_app(): return app", "create_app = lambda: app"])
def test_a_function_that_makes_an_app_is_not_called(module: Callable[[str], None], text: str) -> None:
    module(f"{GOOD}\n    {text}")
    with pytest.raises(AppLoadError) as caught:
        load_app("some_app:create_app")
    assert str(caught.value) == (
        "app 'some_app:create_app' is a function, which is not called: put app = create_app() into its module, "
        "and name that app; did you mean some_app:app?"
    )
