"""The app: the tasks that exist, and the state machine that their annotations declare.

Invariant: an `App` that could be made can be run. This module finds every error of a definition once, without I/O, and
names it with its remedy.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from operator import attrgetter
from types import ModuleType
from typing import Any
from uuid import UUID

import msgspec

from pgtask._annotations import annotation_text, batch_members, edges_among, is_of_annotation, return_members
from pgtask._dsn import names_database, quoted, redact
from pgtask._error_text import one_line, place_of
from pgtask._json_types import undecodable_field
from pgtask._lifespan import lifespan_error
from pgtask._occurrences import EPOCH, occurrence_id
from pgtask.batch import Batch
from pgtask.errors import AppLoadError, DefinitionError
from pgtask.limits import Limit
from pgtask.outcome import Done, Fail
from pgtask.policy import Policy
from pgtask.schedules import Schedule
from pgtask.task import RESERVED, Task
from pgtask.task_function import TaskFunction
from pgtask.workflow import STEP, Workflow

__all__ = ["App", "StepDefinition", "check_reference", "load_app"]

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]


class StepDefinition(msgspec.Struct, frozen=True):
    """One step as the engine sees it. `edges` are the steps that may follow it; `finishes` says that it may return
    `Done`, `archive` that its task is then kept, and `fails` that it may return `Fail`. `batch` is None unless the step
    has `run_batch`."""

    cls: type[Task]
    task: str
    name: str
    policy: Policy
    is_async: bool
    edges: tuple[type[Task], ...]
    finishes: bool
    fields: tuple[str, ...]
    transparent: bool
    archive: bool
    fails: bool
    batch: Batch | None = None

    @property
    def label(self) -> str:
        return f"{self.task}.{self.name}"


class App:
    """The tasks and workflows that a worker runs.

        app = App(Greeter, Mailer, greet, zip_files, lifespan=open_http_client)

    `lifespan` is a function without arguments that returns an async context manager (`@asynccontextmanager`). Each
    worker process enters it once, passes the value that it yields as `ctx.resources`, and leaves it after the last
    step. `archive` keeps finished tasks in the table `pg_task_archive`, unless their class says otherwise. `schedules`
    are started by the workers of the app.

    Raises `DefinitionError` naming the class and the remedy: no steps, no `run`, a `run` whose annotation is missing
    or is no outcome, an edge to a step of another task, two tasks, steps or limits of one name, a field that hides an
    attribute of `Task`, a field of a class that cannot be read from JSON, a lifespan that cannot be entered, a schedule
    of a step that is none of the app.
    """

    def __init__(
        self,
        *tasks: type[Task] | TaskFunction[..., Any] | Workflow[Any, Any],
        lifespan: Lifespan | None = None,
        archive: bool = False,
        schedules: Iterable[Schedule] = (),
    ) -> None:
        if not tasks:
            raise DefinitionError("App() has no tasks: pass the classes that derive from Task, as in App(Greeter)")
        if lifespan is not None and (reason := lifespan_error(lifespan)) is not None:
            shown = getattr(lifespan, "__name__", None) or repr(lifespan)
            raise DefinitionError(
                f"App(lifespan={shown}): {reason}; define it as @asynccontextmanager async def lifespan() with a yield"
            )
        self.lifespan = lifespan
        self.archive = archive
        self.tasks: dict[str, type[Task]] = {}
        self.steps: dict[type[Task], StepDefinition] = {}
        self.functions: dict[str, TaskFunction[..., Any]] = {}
        self.workflows: dict[str, list[Workflow[Any, Any]]] = {}
        self.limits: dict[str, Limit] = {}
        for task in tasks:
            if isinstance(task, Workflow):
                self._add_workflow(task)
            elif isinstance(task, TaskFunction):
                task._check()
                self._add_task(task.family)
                self.functions[task.name] = task
            else:
                self._add_task(task)
        self.schedules: dict[str, Schedule] = {}
        ids: dict[UUID, str] = {}
        if isinstance(schedules, (Schedule, str)):
            raise DefinitionError(f"App(schedules={schedules!r:.80}) must be a list, as in App(..., schedules=[...])")
        for schedule in schedules:
            self._add_schedule(schedule)
            if (other := ids.setdefault(occurrence_id(schedule.name, EPOCH), schedule.name)) != schedule.name:
                raise DefinitionError(f"App: schedules {other} and {schedule.name} make the same ids; rename one")

    def __iter__(self) -> Iterator[StepDefinition]:
        return iter(self.steps.values())

    def __repr__(self) -> str:
        return f"App({', '.join(self.tasks)})"

    def _add_task(self, task: type[Task]) -> None:
        if not (isinstance(task, type) and issubclass(task, Task)) or Task not in task.__bases__:
            raise DefinitionError(
                f"App({_display_name(task)}): not a task; pass a class that derives directly from Task"
            )
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
            self.steps[cls] = _define_step(task, cls, by_name, self.archive)
            if (limit := self.steps[cls].policy.limit) is not None:
                self._add_limit(cls, limit)

    def _add_limit(self, cls: type[Task], limit: Limit) -> None:
        """Add the limit of a step, which may be that of others too."""
        if self.limits.setdefault(limit.name, limit) is not limit:
            raise DefinitionError(
                f"step {cls.__name__}: another limit is named {limit.name}; make one object, and use it in all policies"
            )
        if limit.cost is not None and limit.cost.of not in cls.__struct_fields__:
            raise DefinitionError(
                f"step {cls.__name__}: its limit {limit.name} counts a field {limit.cost.of!r}, which it does not have"
            )

    def _add_workflow(self, flow: Workflow[Any, Any]) -> None:
        """Add a workflow: a family of tasks with one step. Its versions are functions for the same step."""
        flow._check()
        if flow.policy.limit is not None:
            raise DefinitionError(
                f"workflow {flow.name}: a run has no limit; have it enqueue tasks, and give the limit to their steps"
            )
        flows = self.workflows.setdefault(flow.name, [])
        if not flows:
            if flow.name in self.tasks:
                raise DefinitionError(f"App: a task and a workflow are named {flow.name}; rename one, rows store it")
            definition = _define_workflow(flow)
            self.tasks[flow.name] = definition.cls.__mro__[1]
            self.steps[definition.cls] = definition
        for other in flows:
            if flow.since <= other.version and other.since <= flow.version:
                raise DefinitionError(
                    f"App: workflow {flow.name} is there twice for version {max(flow.since, other.since)}; "
                    "give one of them another version= or since="
                )
        flows.append(flow)
        flows.sort(key=attrgetter("version"))

    def _add_schedule(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise DefinitionError(
                f"App(schedules=...): {schedule!r:.80} is no schedule; pass a list of them, as in "
                '[Schedule("nightly", "0 3 * * *", Plan())]'
            )
        name, step = schedule.name, schedule.step
        if name in self.schedules:
            raise DefinitionError(f"App: two schedules are named {name}; rename one, their rows have the name")
        is_known = step in self.workflows.get(step.name, ()) if isinstance(step, Workflow) else type(step) in self.steps
        if not is_known:
            shown = step.name if isinstance(step, Workflow) else type(step).__name__
            raise DefinitionError(f"schedule {name}: {shown} is not in this app; pass it to App(...), or its task")
        self.schedules[name] = schedule


def load_app(reference: str) -> App:
    """Import `module:attribute` and return the `App` it names. Raises `AppLoadError` with one readable line."""
    import importlib

    check_reference(reference)
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise AppLoadError(f"app {reference!r}: {_import_failure(error, module_name)}") from error
    try:
        found = attrgetter(attribute)(module)
    except AttributeError as error:
        raise AppLoadError(f"app {reference!r}: {error}{_suggest_apps(module)}") from error
    if not isinstance(found, App):
        raise AppLoadError(f"app {reference!r} is {_describe_object(found, attribute)}{_suggest_apps(module)}")
    return found


def check_reference(reference: str) -> None:
    """Raise `AppLoadError` for a text that cannot name an app, with a guess of the intended name."""
    if "@" in reference or names_database(reference):
        raise AppLoadError(f"app {redact(reference)!r} is not of the form module:attribute; a database goes into --dsn")
    if _is_well_formed(reference):
        return
    module, _, attribute = reference.partition(":")
    guess = f"{module.removeprefix('./').removesuffix('.py').replace('/', '.')}:{attribute or 'app'}"
    is_shown = quoted(reference) == repr(reference)
    hint = f": did you mean {guess}?" if is_shown and _is_well_formed(guess) else ", as in greetings:app"
    raise AppLoadError(f"app {quoted(reference)} is not of the form module:attribute{hint}")


def _is_well_formed(reference: str) -> bool:
    module, _, attribute = reference.partition(":")
    return (
        not re.search(r"[/@=\s]", reference)
        and not module.endswith(".py")
        and all([*module.split("."), *attribute.split(".")])
    )


def _describe_object(found: object, attribute: str) -> str:
    """Describe an object that was given as an app."""
    if callable(found) and not isinstance(found, (type, Workflow)):
        return f"a function, which is not called: put app = {attribute}() into its module, and name that app"
    return f"of type {type(found).__name__}, not a pgtask.App"


def _suggest_apps(module: ModuleType) -> str:
    names = [f"{module.__name__}:{name}" for name, value in vars(module).items() if isinstance(value, App)]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _import_failure(error: BaseException, module: str) -> str:
    """Describe in one line, with the place, the exception that importing a module has raised."""
    match error:
        case ModuleNotFoundError(name=str(name)):
            if module == name or module.startswith(name + "."):
                return f"no module named {name!r} here or on the path"
            return f"importing it failed: no module named {name!r}{place_of(error)}"
        case SystemExit(code=code):
            return f"importing it called sys.exit({code!r}){place_of(error)}"
        case DefinitionError():
            return f"{error}{place_of(error)}"
        case NameError() if is_of_annotation(error):
            return f"importing it failed: {one_line(error)}; is `from __future__ import annotations` missing there?"
    return f"importing it failed: {one_line(error)}"


def _display_name(thing: object) -> str:
    return thing.__name__ if isinstance(thing, type) else repr(thing)


def _subclasses(cls: type[Task]) -> list[type[Task]]:
    """Return all subclasses of a class, each once, also one that derives from two of them."""
    found = [step for sub in cls.__subclasses__() for step in (sub, *_subclasses(sub))]
    return list(dict.fromkeys(found))


def _define_step(task: type[Task], cls: type[Task], family: dict[str, type[Task]], archive: bool) -> StepDefinition:
    label = f"{task.__name__}.{cls.__name__}"
    fields = _field_names(label, cls)
    if not isinstance(cls.policy, Policy):
        raise DefinitionError(f"step {label}: policy must be a pgtask.Policy, not {cls.policy!r}")
    batch = _batch_of(label, task, cls)
    run = _batch_method(label, cls) if batch is not None else _run_method(label, cls)
    _check_function(label, run, batch)
    members = (return_members if batch is None else batch_members)(label, run, family)
    return StepDefinition(
        cls=cls,
        task=task.__name__,
        name=cls.__name__,
        policy=cls.policy,
        is_async=inspect.iscoroutinefunction(run),
        edges=edges_among(label, members, family),
        finishes=Done in members,
        fields=fields,
        transparent=_is_transparent(label, cls),
        archive=archive if cls.archive is None else bool(cls.archive),
        fails=Fail in members,
        batch=batch,
    )


def _run_method(label: str, cls: type[Task]) -> Callable[..., Any]:
    run = getattr(cls, "run", None)
    if run is None:
        raise DefinitionError(f"step {label} has no run(); add: async def run(self, ctx: Context) -> Done")
    if not inspect.isfunction(run):
        raise DefinitionError(f"step {label}: run must be a plain method, async def run(self, ctx: Context)")
    _check_signature(label, run)
    return run


def _batch_of(label: str, task: type[Task], cls: type[Task]) -> Batch | None:
    """Return the batch of a step that has `run_batch`; None for one that has `run`. A batch in the policy of the whole
    task counts for its steps with `run_batch` only."""
    has_batch, batch = getattr(cls, "run_batch", None) is not None, cls.policy.batch
    if has_batch and getattr(cls, "run", None) is not None:
        raise DefinitionError(f"step {label} has both run() and run_batch(); keep one of them")
    if has_batch and batch is None:
        raise DefinitionError(f"step {label} has run_batch() and no batch; add: policy = Policy(batch=Batch(100))")
    if not has_batch and batch is not None and cls.policy is not task.policy:
        raise DefinitionError(
            f"step {label}: Policy(batch=...) is for a step with run_batch(); "
            "add: @classmethod async def run_batch(cls, steps: Sequence[...], ctx: BatchContext) -> Done"
        )
    if not has_batch or batch is None:
        return None
    for argument in ("by", "weight"):
        name = getattr(batch, argument)
        if isinstance(name, str) and name not in cls.__struct_fields__ and not hasattr(cls, name):
            raise DefinitionError(f"step {label}: Batch({argument}={name!r}) names no field or property of it")
    return batch


def _batch_method(label: str, cls: type[Task]) -> Callable[..., Any]:
    method = inspect.getattr_static(cls, "run_batch")
    function = getattr(method, "__func__", None)
    if not isinstance(method, classmethod) or not inspect.isfunction(function):
        raise DefinitionError(
            f"step {label}: run_batch must be a class method, "
            "@classmethod async def run_batch(cls, steps: Sequence[...], ctx: BatchContext)"
        )
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        raise DefinitionError(
            f"step {label}: run_batch{inspect.signature(function)} must take the class, the steps and one context: "
            "run_batch(cls, steps: Sequence[...], ctx: BatchContext)"
        ) from None
    return function


def _check_function(label: str, run: Callable[..., Any], batch: Batch | None) -> None:
    name = "run" if batch is None else "run_batch"
    if inspect.isasyncgenfunction(run) or inspect.isgeneratorfunction(run):
        outcomes = "one outcome" if name == "run" else "outcomes"
        raise DefinitionError(f"step {label}: {name}() is a generator; return {outcomes} instead of yielding")
    if inspect.iscoroutinefunction(inspect.unwrap(run)) and not inspect.iscoroutinefunction(run):
        raise DefinitionError(
            f"step {label}: the decorator of {name}() hides that it is async; make its wrapper async def"
        )


def _define_workflow(flow: Workflow[Any, Any]) -> StepDefinition:
    family = type(flow.name, (Task,), {})
    # The timeout of a workflow is that of each of its steps.
    policy = msgspec.structs.replace(flow.policy, timeout=None)
    names = {"transparent": True, "policy": policy, "workflow": flow.name}
    run: Any = msgspec.defstruct(STEP, [("input", msgspec.Raw)], bases=(family,), namespace=names)
    return StepDefinition(
        cls=run,
        task=flow.name,
        name=STEP,
        policy=policy,
        is_async=True,
        edges=(),
        finishes=True,
        fields=("input",),
        transparent=True,
        archive=False,  # its run keeps a record of its own
        fails=False,
    )


def _check_signature(label: str, run: Callable[..., Any]) -> None:
    try:
        inspect.signature(run).bind(None, None)
    except TypeError:
        raise DefinitionError(
            f"step {label}: run{inspect.signature(run)} must take self and one context: run(self, ctx: Context)"
        ) from None


def _field_names(label: str, cls: type[Task]) -> tuple[str, ...]:
    for name in RESERVED:
        if name in cls.__struct_fields__:
            raise DefinitionError(f"step {label}: a field cannot be named {name!r}, Task uses that name; rename it")
    try:
        msgspec.json.Decoder(cls)
        undecodable = undecodable_field(cls)
    except (TypeError, NameError) as error:
        raise DefinitionError(f"step {label}: a field has a type that cannot be decoded: {error}") from error
    if undecodable is not None:
        field, cause = undecodable
        raise DefinitionError(
            f"step {label}: the field {field!r} needs the class {annotation_text(cause)}, "
            "which cannot be read from JSON; "
            "make it a msgspec.Struct, a dataclass or an Enum, or store plain values that it can be made from"
        )
    return cls.__struct_fields__


def _is_transparent(label: str, cls: type[Task]) -> bool:
    if cls.transparent and len(cls.__struct_fields__) != 1:
        raise DefinitionError(
            f"step {label}: transparent = True needs exactly one field, it has {len(cls.__struct_fields__)}"
        )
    return bool(cls.transparent)
