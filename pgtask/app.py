"""The app: which tasks exist, and the state machine that their annotations declare.

Invariant: an `App` that could be made can be run. Everything that can be wrong with a definition is found here, once,
without I/O, and named with its remedy.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncContextDecorator
from operator import attrgetter
from typing import Any

import msgspec

from pgtask._json_types import strange_class
from pgtask._place import one_line, place_of
from pgtask.errors import AppLoadError, DefinitionError
from pgtask.outcome import Done, Fail, Next
from pgtask.policy import Policy
from pgtask.task import Task

__all__ = ["App", "StepDefinition", "load_app"]

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]
_RESERVED = ("policy", "transparent", "run")


class StepDefinition(msgspec.Struct, frozen=True):
    """One step as the engine sees it. `edges` are the steps it may go on to; `finishes` says that it may be `Done`."""

    cls: type[Task]
    task: str
    name: str
    policy: Policy
    is_async: bool
    edges: tuple[type[Task], ...]
    finishes: bool
    fields: tuple[str, ...]
    transparent: bool

    @property
    def label(self) -> str:
        return f"{self.task}.{self.name}"


class App:
    """The tasks that a worker runs.

        app = App(Greeter, Mailer, lifespan=open_http_client)

    `lifespan` is a function without arguments that returns an async context manager (`@asynccontextmanager`); it is
    entered once in each worker process and what it yields is `ctx.resources`; it is left after the last step.

    Raises `DefinitionError` naming the class and the remedy: no steps, no `run`, a `run` whose annotation is missing
    or is no outcome, an edge to a step of another task, two tasks or steps of one name, a field that hides an
    attribute of `Task`, a field of a class that cannot be read from JSON, a lifespan that cannot be entered.
    """

    def __init__(self, *tasks: type[Task], lifespan: Lifespan | None = None) -> None:
        if not tasks:
            raise DefinitionError("App() has no tasks: pass the classes that derive from Task, as in App(Greeter)")
        if lifespan is not None and (reason := _lifespan_flaw(lifespan)) is not None:
            shown = getattr(lifespan, "__name__", None) or repr(lifespan)
            raise DefinitionError(
                f"App(lifespan={shown}): {reason}; define it as @asynccontextmanager async def lifespan() with a yield"
            )
        self.lifespan = lifespan
        self.tasks: dict[str, type[Task]] = {}
        self.steps: dict[type[Task], StepDefinition] = {}
        for task in tasks:
            self._add(task)

    def __iter__(self) -> Iterator[StepDefinition]:
        return iter(self.steps.values())

    def __repr__(self) -> str:
        return f"App({', '.join(self.tasks)})"

    def _add(self, task: type[Task]) -> None:
        if not (isinstance(task, type) and issubclass(task, Task)) or Task not in task.__bases__:
            raise DefinitionError(f"App({_name(task)}): not a task; pass a class that derives directly from Task")
        if task.__name__ in self.tasks:
            raise DefinitionError(f"App: two tasks are named {task.__name__}; rename one, rows store the name")
        steps = _subclasses(task)
        if not steps:
            raise DefinitionError(f"task {task.__name__} has no steps; derive at least one class with a run() from it")
        by_name: dict[str, type[Task]] = {}
        for cls in steps:
            if cls.__name__ in by_name:
                raise DefinitionError(
                    f"task {task.__name__} has two steps named {cls.__name__}; rename one, rows store the name"
                )
            by_name[cls.__name__] = cls
        self.tasks[task.__name__] = task
        for cls in steps:
            self.steps[cls] = _define(task, cls, by_name)


def load_app(reference: str) -> App:
    """Import `module:attribute` and return the `App` it names. Raises `AppLoadError` with one readable line."""
    import importlib

    module_name, separator, attribute = reference.partition(":")
    if not (module_name and separator and attribute):
        raise AppLoadError(f"app {reference!r} is not of the form module:attribute, as in greetings:app")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise AppLoadError(f"app {reference!r}: {_failure(error, module_name)}") from error
    try:
        found = attrgetter(attribute)(module)
    except AttributeError as error:
        raise AppLoadError(f"app {reference!r}: {error}") from error
    if not isinstance(found, App):
        raise AppLoadError(f"app {reference!r} is of type {type(found).__name__}, not a pgtask.App")
    return found


def _failure(error: BaseException, module: str) -> str:
    """One line for what importing a module has raised, with the place."""
    match error:
        case ModuleNotFoundError(name=str(name)):
            if module == name or module.startswith(name + "."):
                return f"no module named {name!r} here or on the path"
            return f"importing it failed: no module named {name!r}{place_of(error)}"
        case SystemExit(code=code):
            return f"importing it called sys.exit({code!r}){place_of(error)}"
        case DefinitionError():
            return f"{error}{place_of(error)}"
    return f"importing it failed: {one_line(error)}"


def _lifespan_flaw(lifespan: Any) -> str | None:
    """Why calling this cannot give an async context manager, as far as that can be known without calling it."""
    if isinstance(lifespan, AsyncContextDecorator) or (hasattr(lifespan, "__aenter__") and not callable(lifespan)):
        return "it is what that function returns: pass the function, without calling it"
    if not callable(lifespan):
        return "it is not a function"
    if isinstance(lifespan, type) and not hasattr(lifespan, "__aenter__"):
        return f"the class {lifespan.__name__} is not an async context manager"
    if inspect.isasyncgenfunction(lifespan) or inspect.iscoroutinefunction(lifespan):
        return "it lacks the decorator" + ("" if inspect.isasyncgenfunction(lifespan) else ", or the yield")
    if inspect.isgeneratorfunction(inspect.unwrap(lifespan)):
        return "it is not async"
    try:
        signature = inspect.signature(lifespan)
    except (TypeError, ValueError):  # compiled code may have none
        return None
    try:
        signature.bind()
    except TypeError:
        return f"it must not need arguments, and takes {signature}"
    return None


def _name(thing: object) -> str:
    return thing.__name__ if isinstance(thing, type) else repr(thing)


def _subclasses(cls: type[Task]) -> list[type[Task]]:
    """All that derive from a class, each once, also one that derives from two of them."""
    found = [step for sub in cls.__subclasses__() for step in (sub, *_subclasses(sub))]
    return list(dict.fromkeys(found))


def _define(task: type[Task], cls: type[Task], family: dict[str, type[Task]]) -> StepDefinition:
    label = f"{task.__name__}.{cls.__name__}"
    fields = _fields(label, cls)
    run = getattr(cls, "run", None)
    if run is None:
        raise DefinitionError(f"step {label} has no run(); add: async def run(self, ctx: Context) -> Done")
    if not inspect.isfunction(run):
        raise DefinitionError(f"step {label}: run must be a plain method, async def run(self, ctx: Context)")
    if inspect.isasyncgenfunction(run) or inspect.isgeneratorfunction(run):
        raise DefinitionError(f"step {label}: run() is a generator; return one outcome instead of yielding")
    if inspect.iscoroutinefunction(inspect.unwrap(run)) and not inspect.iscoroutinefunction(run):
        raise DefinitionError(
            f"step {label}: the decorator of run() hides that it is async; make its wrapper async def"
        )
    _check_signature(label, run)
    if not isinstance(cls.policy, Policy):
        raise DefinitionError(f"step {label}: policy must be a pgtask.Policy, not {cls.policy!r}")
    members = _return_members(label, run, family)
    return StepDefinition(
        cls=cls,
        task=task.__name__,
        name=cls.__name__,
        policy=cls.policy,
        is_async=inspect.iscoroutinefunction(run),
        edges=_edges(label, members, family),
        finishes=Done in members,
        fields=fields,
        transparent=_transparent(label, cls),
    )


def _check_signature(label: str, run: Callable[..., Any]) -> None:
    try:
        inspect.signature(run).bind(None, None)
    except TypeError:
        raise DefinitionError(
            f"step {label}: run{inspect.signature(run)} must take self and one context: run(self, ctx: Context)"
        ) from None


def _fields(label: str, cls: type[Task]) -> tuple[str, ...]:
    for name in _RESERVED:
        if name in cls.__struct_fields__:
            raise DefinitionError(f"step {label}: a field cannot be named {name!r}, Task uses that name; rename it")
    try:
        msgspec.json.Decoder(cls)
        strange = strange_class(cls)
    except (TypeError, NameError) as error:
        raise DefinitionError(f"step {label}: a field has a type that cannot be decoded: {error}") from error
    if strange is not None:
        field, stranger = strange
        raise DefinitionError(
            f"step {label}: the field {field!r} needs the class {_text(stranger)}, which cannot be read from JSON; "
            "make it a msgspec.Struct, a dataclass or an Enum, or store plain values that it can be made from"
        )
    return cls.__struct_fields__


def _transparent(label: str, cls: type[Task]) -> bool:
    if cls.transparent and len(cls.__struct_fields__) != 1:
        raise DefinitionError(
            f"step {label}: transparent = True needs exactly one field, it has {len(cls.__struct_fields__)}"
        )
    return bool(cls.transparent)


def _return_members(label: str, run: Callable[..., Any], family: dict[str, type[Task]]) -> Sequence[Any]:
    """The outcomes that the return annotation of `run` names, in its order."""
    annotation = _return_annotation(label, run, family)
    members = _members(annotation)
    if not all(member is Done or member is Fail or typing.get_origin(member) is Next for member in members):
        raise DefinitionError(
            f"step {label}: run() is annotated -> {_text(annotation)}; "
            "annotate it with outcomes, as in -> Next[SomeStep] | Done"
        )
    return members


def _edges(label: str, members: Sequence[Any], family: dict[str, type[Task]]) -> tuple[type[Task], ...]:
    """The steps that `Next[...]` names among the members of an annotation."""
    edges: list[type[Task]] = []
    for member in members:
        if typing.get_origin(member) is not Next:
            continue
        for step in _members(typing.get_args(member)[0]):
            name = step.__forward_arg__ if isinstance(step, typing.ForwardRef) else getattr(step, "__name__", "")
            known = family.get(name)
            if known is None or not (known is step or isinstance(step, typing.ForwardRef)):
                raise DefinitionError(
                    f"step {label}: the edge Next[{_text(step)}] does not lead to a step of the same task "
                    f"({', '.join(family)})"
                )
            edges.append(known)
    return tuple(dict.fromkeys(edges))


def _return_annotation(label: str, run: Callable[..., Any], family: dict[str, type[Task]]) -> Any:
    annotations = _annotations(run)
    if "return" not in annotations:
        raise DefinitionError(f"step {label}: run() has no return annotation; add one, as in -> Next[SomeStep] | Done")
    annotation = annotations["return"]
    if not isinstance(annotation, str):
        return annotation
    # Classes made inside a function are not in the globals; the family and the outcomes are all an edge can name.
    known = {"Next": Next, "Done": Done, "Fail": Fail, "Outcome": Next | Done | Fail, **family}
    scope = {**known, **run.__globals__, **family}
    try:
        return eval(annotation, scope)
    except Exception as error:
        raise DefinitionError(f"step {label}: the annotation -> {annotation} cannot be read: {error}") from error


def _annotations(run: Callable[..., Any]) -> dict[str, Any]:
    try:
        from annotationlib import Format, get_annotations  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return dict(run.__annotations__)
    found: dict[str, Any] = get_annotations(run, format=Format.FORWARDREF)  # Python 3.14: names only known to checkers
    return found


def _members(annotation: Any) -> Sequence[Any]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def _text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
