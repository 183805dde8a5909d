"""The decorator `@task`, which makes a task of one step from a function.

Invariant: the function and the class that it becomes have the same parameters, so that a call of the one makes the
other; what cannot be a field is refused at the definition, by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import msgspec

from pgtask._annotations import annotation_text, read_annotations, return_annotation, union_members
from pgtask.errors import DefinitionError
from pgtask.outcome import Done, Fail
from pgtask.policy import Policy
from pgtask.task import RESERVED, Context, Task
from pgtask.workflow import check_name

__all__ = ["CALL", "TaskFunction", "step_of", "task"]

CALL = "Call"
"""The one step of such a task: `{"<task>":{"Call":{fields}}}`. Not `Run`: that is the step of a workflow, so the row
would look like a run that has not begun."""

P = ParamSpec("P")
ResultT = TypeVar("ResultT", bound=Awaitable[Done | Fail] | Done | Fail)

_Kind = inspect.Parameter


class TaskFunction(Generic[P, ResultT]):
    """A task of one step, made by `@task`. A call makes the step, for you to enqueue; `run` calls the function.

    - `family`, `step`: the class that derives from `Task`, and its one step.
    """

    def __init__(
        self, function: Callable[Concatenate[Context, P], ResultT], name: str, policy: Policy, archive: bool | None
    ) -> None:
        self.function: Callable[..., ResultT] = function
        self.name = name
        self._parameters = _parameters_of(name, function)
        attributes = {"__module__": function.__module__, "__doc__": function.__doc__}
        self.family: type[Task] = type(name, (Task,), {**attributes, "policy": policy, "archive": archive})
        self.step = self._define_step()
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Make the step that calls the function with these arguments. Raises `TypeError`."""
        try:
            if self._has_keywords_only and args:
                bound = self._signature.bind(*args, **kwargs).arguments
                return self.step(**bound)
            return self.step(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}(): {error}") from None

    def run(self, ctx: Context, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Call the function itself, as in a unit test of it."""
        return self.function(ctx, *args, **kwargs)

    @property
    def _has_keywords_only(self) -> bool:
        return any(parameter.kind is _Kind.KEYWORD_ONLY for parameter in self._parameters)

    @property
    def _signature(self) -> inspect.Signature:
        return inspect.Signature(self._parameters)

    def _define_step(self) -> type[Task]:
        annotations = read_annotations(self.function)
        fields = [
            (one.name, annotations[one.name], *(() if one.default is _Kind.empty else (one.default,)))
            for one in self._parameters
        ]
        try:
            return msgspec.defstruct(  # type: ignore[return-value]
                CALL,
                fields,
                bases=(self.family,),
                namespace={"run": _run_method(self.function), "__repr__": _repr_call},
                module=self.function.__module__,
                kw_only=self._has_keywords_only,
            )
        except TypeError as error:
            raise DefinitionError(f"task {self.name}: a default value cannot be kept: {error}") from None

    def _check(self) -> None:
        """Raise `DefinitionError` unless the function returns outcomes that a task of one step may have."""
        annotation = return_annotation(f"{self.name}.{CALL}", self.step.run, {})  # type: ignore[attr-defined]
        if not all(member in (Done, Fail) for member in union_members(annotation)):
            raise DefinitionError(
                f"task {self.name}: {_shown(self.function)} is annotated -> {annotation_text(annotation)}; "
                "a task of one step is done or fails: annotate it -> Done, or -> Done | Fail; "
                "for further steps derive a class from Task"
            )


class task:  # noqa: N801 - a decorator
    """Make a task of one step from a function. It takes the context, and the fields of the step as arguments.

        @task("greet")
        async def greet(ctx: Context, name: str) -> Done: ...

        await client.enqueue(greet(name="Ada"))

    - `name`: stored in rows. You may rename the function, but not the name.
    - `policy`, `archive`: as in `Task`.

    An `async def` runs on the worker's loop, a plain function in a thread. Each parameter needs an annotation. Raises
    `DefinitionError`.
    """

    def __init__(self, name: str, *, policy: Policy = Task.policy, archive: bool | None = None) -> None:
        if inspect.isfunction(name):
            raise DefinitionError(
                f'@task without a name: write @task("{name.__name__}") before {name.__name__}(), '
                "with the name that rows are to store"
            )
        check_name("task", name, DefinitionError)
        if not isinstance(policy, Policy):
            raise DefinitionError(f"task {name}: policy must be a pgtask.Policy, not {policy!r:.80}")
        self._options = (name, policy, archive)

    def __call__(self, function: Callable[Concatenate[Context, P], ResultT]) -> TaskFunction[P, ResultT]:
        return TaskFunction(function, *self._options)


def step_of(wanted: Any) -> Any:
    """Return the step of a `TaskFunction`; anything else unchanged."""
    return wanted.step if isinstance(wanted, TaskFunction) else wanted


def _shown(function: Any) -> str:
    return f"{getattr(function, '__name__', function)}()"


def _parameters_of(name: str, function: Any) -> Sequence[inspect.Parameter]:
    """Return the parameters behind the context. Raises `DefinitionError` for those that cannot be fields."""
    _check_function(name, function)
    annotations = read_annotations(function)
    every = list(_signature_of(function).parameters.values())
    if not every or every[0].kind not in (_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD):
        raise DefinitionError(f"task {name}: {_shown(function)} must take the context first: (ctx: Context, ...)")
    for one in every[1:]:
        where = f"task {name}: the parameter {one.name} of {_shown(function)}"
        if one.kind in (_Kind.VAR_POSITIONAL, _Kind.VAR_KEYWORD):
            raise DefinitionError(
                f"{where} takes any number of arguments; name each one, or take a list[...] or dict[...]"
            )
        if one.kind is _Kind.POSITIONAL_ONLY:
            raise DefinitionError(f"{where} has no name to be stored by; put the / behind the context or leave it out")
        if one.name not in annotations:
            raise DefinitionError(f"{where} has no annotation; add one, as in {one.name}: str")
        if one.name in RESERVED:
            raise DefinitionError(f"{where} has a name that Task uses; rename it")
    if "return" not in annotations:
        where = f"task {name}: {_shown(function)}"
        raise DefinitionError(f"{where} has no return annotation; add -> Done, or -> Done | Fail")
    return every[1:]


def _check_function(name: str, function: Any) -> None:
    if not inspect.isfunction(function):
        raise DefinitionError(f"task {name}: {function!r:.80} is not a function")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise DefinitionError(f"task {name}: {_shown(function)} is a generator; return one outcome instead of yielding")
    if inspect.iscoroutinefunction(inspect.unwrap(function)) and not inspect.iscoroutinefunction(function):
        raise DefinitionError(
            f"task {name}: the decorator of {_shown(function)} hides that it is async; make its wrapper async def"
        )


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    try:
        from annotationlib import Format  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return inspect.signature(function)
    return inspect.signature(function, annotation_format=Format.FORWARDREF)  # type: ignore[call-arg,unused-ignore]


def _run_method(function: Callable[..., Any]) -> Callable[[Task, Context], Any]:
    """Return the `run` of the step: it calls the function with the fields, and is annotated as the function is."""
    run: Any
    if inspect.iscoroutinefunction(function):

        async def run_async(self: Task, ctx: Context) -> Any:
            return await function(ctx, **msgspec.structs.asdict(self))

        run = run_async
    else:

        def run_plain(self: Task, ctx: Context) -> Any:
            return function(ctx, **msgspec.structs.asdict(self))

        run = run_plain
    run.__signature__ = inspect.signature(run)
    run.__wrapped__ = function  # whose module its annotation is read in
    run.__annotations__ = {"return": read_annotations(function)["return"]}
    return run  # type: ignore[no-any-return]


def _repr_call(self: Task) -> str:
    """Show a step as the call that made it."""
    fields = ", ".join(f"{name}={value!r}" for name, value in msgspec.structs.asdict(self).items())
    return f"{type(self).__mro__[1].__name__}({fields})"
