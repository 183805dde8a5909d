"""The vocabulary of workflows: functions made durable, and the context they ask for what is to be recorded.

Invariants: nothing here touches a database. A workflow reaches the world through the steps it asks of its context, so
that a replay, which asks again, gets the recorded answers.
"""

from __future__ import annotations

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, TypeVarTuple, overload
from uuid import UUID

import msgspec

from pgtask._json_types import codec_of
from pgtask.errors import DefinitionError
from pgtask.policy import Policy

if TYPE_CHECKING:
    import asyncpg

__all__ = ["STEP", "Child", "Permanent", "RunState", "Transient", "Workflow", "WorkflowContext", "check_name", "workflow"]

T = TypeVar("T")
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")
Ts = TypeVarTuple("Ts")

RunState = Literal["QUEUED", "RUNNING", "PAUSED", "SUCCESS", "ERROR", "CANCELLED"]

STEP = "Run"
"""The one step of the family of tasks that a workflow is: `{"<workflow>":{"Run":<input>}}`."""

DEFAULT_POLICY = Policy(retry_limit=5, backoff="exponential", jitter=0.25)
MOST_NAME = 255


class Transient(Exception):
    """Raise it in a step for what will pass: the step is tried again after `retry_after`, else as its policy says.

    Counts against the policy's `retry_limit` as any exception does.
    """

    def __init__(self, message: str = "", *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        if retry_after is not None and retry_after < timedelta(0):
            raise ValueError(f"Transient(retry_after={retry_after!r}) is negative: use a delay of zero or more")
        self.retry_after = retry_after


class Permanent(Exception):
    """Raise it for what no retry will mend: a step fails at once, and outside of a step the run ends as ERROR."""


class Workflow(Generic[InputT, OutputT]):
    """What `@workflow` makes of a function. Calling it calls the function."""

    def __init__(self, function: Callable[..., Awaitable[Any]], name: str, version: int, since: int, policy: Policy):
        self.function = function
        self.name = name
        self.version = version
        self.since = since
        self.policy = policy
        self.takes_input = _takes_input(name, function)
        self.__name__ = getattr(function, "__name__", name)
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        self._types: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"<workflow {self.name} version {self.version}>"

    def __call__(self, *args: Any) -> Awaitable[OutputT]:
        return self.function(*args)

    @property
    def types(self) -> tuple[Any, Any]:
        """The annotations of the input (None without one) and of the output. Raises `DefinitionError`."""
        if self._types is None:
            self._types = _types(self)
        return self._types

    def check(self) -> None:
        """Raise `DefinitionError` unless input and output can be stored as JSON and read back."""
        for what, annotation in zip(("input", "output"), self.types, strict=True):
            try:
                codec_of(annotation)
            except TypeError as error:
                raise DefinitionError(f"workflow {self.name}: its {what}: {error}") from None

    def encode_input(self, value: object) -> bytes:
        """The input as JSON. Raises what msgspec raises for one that cannot be read back as it is annotated."""
        if not self.takes_input:
            if value is not None:
                raise TypeError("it takes no input")
            return b"null"
        codec = codec_of(self.types[0])
        payload = codec.encode(value)
        codec.decode(payload)
        return payload

    def decode_input(self, payload: bytes | msgspec.Raw) -> Any:
        return codec_of(self.types[0]).decode(payload)

    def decode_output(self, payload: str | msgspec.Raw) -> Any:
        return codec_of(self.types[1]).decode(payload)

    def envelope(self, payload: bytes) -> str:
        """What `pg_task.step` says of a run with this input."""
        return f'{{{msgspec.json.encode(self.name).decode()}:{{"{STEP}":{payload.decode()}}}}}'


def workflow(
    name: str, *, version: int = 1, since: int | None = None, policy: Policy = DEFAULT_POLICY
) -> Callable[[Callable[..., Awaitable[OutputT]]], Workflow[Any, OutputT]]:
    """Make an `async def` function durable: `async def zip_files(ctx: WorkflowContext, params: ZipParams) -> ZipResult`.

    - `name` is what rows store; the function may be renamed, the name not.
    - `version` is raised when the code changes in a way that contradicts what runs have recorded; a run goes on with
      the function whose versions, `since` (default: `version`) to `version`, contain the one it began under.
    - `policy`: `queue` and `priority` of its runs; retries and timeout of its steps, unless a step has its own; retries
      of what is raised outside of steps. By default five retries after about 1, 2, 4, 8 and 16 seconds.

    The function is run again from the top whenever its run goes on, so outside of steps it must do the same each time.
    Raises `DefinitionError`.
    """
    check_name("workflow", name, DefinitionError)
    if since is None:
        since = version
    for what, number in (("version", version), ("since", since)):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**31:
            raise DefinitionError(f"workflow {name}: {what}={number!r} must be a whole number, 1 or more")
    if since > version:
        raise DefinitionError(f"workflow {name}: since={since} is later than version={version}")
    if not isinstance(policy, Policy):
        raise DefinitionError(f"workflow {name}: policy must be a pgtask.Policy, not {policy!r:.80}")

    def make(function: Callable[..., Awaitable[OutputT]]) -> Workflow[Any, OutputT]:
        if not inspect.iscoroutinefunction(function):
            raise DefinitionError(f"workflow {name}: {function!r:.80} is not an async def function")
        return Workflow(function, name, version, since, policy)

    return make


class Child(Awaitable[T], ABC):
    """A run that a workflow has spawned."""

    id: UUID

    @abstractmethod
    async def result(self) -> T:
        """What the child returns. The run pauses until then. Raises `RunFailed` or `RunCancelled` for how it ended."""


class WorkflowContext(ABC):
    """What a workflow asks for. Each method is a place in the journal of its run: it is answered once, and the answer
    is given again in each replay.

    - `run_id`: the id of the run, and of its task.
    - `attempt`: which try this is since the run last recorded something, from 1.
    - `version`: the version of the workflow under which the run began.
    - `db`, `resources`: as in `Context`, to be handed to steps. Do not query outside of a step.

    All of its coroutines raise `ReplayError` when the journal has something else at their place, and `RunStopped` (not
    an `Exception`) when the run must not go on here. Await them one after the other or in `ctx.gather`, not in tasks of
    your own.
    """

    run_id: UUID
    attempt: int
    version: int
    db: asyncpg.Pool[asyncpg.Record]
    resources: Any

    @overload
    async def step(
        self, name: str, function: Callable[[*Ts], Awaitable[T]], /, *args: *Ts, policy: Policy | None = None
    ) -> T: ...
    @overload
    async def step(self, name: str, function: Callable[[*Ts], T], /, *args: *Ts, policy: Policy | None = None) -> T: ...
    @abstractmethod
    async def step(
        self, name: str, function: Callable[..., Any], /, *args: Any, policy: Policy | None = None
    ) -> Any:
        """Call `function(*args)` and record what it returns, before this returns.

        An `async def` runs on the worker's loop, a plain function in a thread. The result is stored as JSON and read
        back by the return annotation, the first time too. What it raises is retried by `policy` (default: that of the
        workflow; its queue and priority do not count), the whole run being put off meanwhile; then, or at once for
        `Permanent`, `StepFailed` is raised here, now and in each replay. Each step of a run has a name of its own.
        """

    @abstractmethod
    async def gather(self, *steps: Awaitable[Any], return_exceptions: bool = False) -> list[Any]:
        """Run several things of this context at once; their results in order, when all have ended.

        Raises the first exception among them, in their order; with `return_exceptions` it stands in its place.
        """

    @abstractmethod
    async def sleep(self, name: str, duration: timedelta) -> None:
        """Go on when `duration` has passed since this was first asked, by the database's clock."""

    @overload
    async def wait_for_signal(self, name: str, type: type[T], *, timeout: timedelta | None = None) -> T: ...
    @overload
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any: ...
    @abstractmethod
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any:
        """The next signal of this name, as `type`; one that was sent before counts. May be asked any number of times.

        Raises `SignalTimeout` when `timeout` has passed since this was first asked.
        """

    @abstractmethod
    async def spawn(
        self,
        name: str,
        workflow: Workflow[InputT, OutputT],
        input: InputT | None = None,
        *,
        queue: str | None = None,
        priority: int | None = None,
    ) -> Child[OutputT]:
        """Trigger a run that is a child of this one: made once, whatever happens, and cancelled with this run.

        `queue` and `priority` are by default those of the child's policy. Each spawn has a name of its own.
        """

    @abstractmethod
    async def spawn_many(
        self,
        name: str,
        workflow: Workflow[InputT, OutputT],
        inputs: Iterable[InputT],
        *,
        queue: str | None = None,
        priority: int | None = None,
    ) -> Sequence[Child[OutputT]]:
        """`spawn` for each of the inputs, a thousand in a transaction."""

    @abstractmethod
    async def results(self, children: Sequence[Child[T]], *, return_exceptions: bool = False) -> list[Any]:
        """What the children return, in their order, when all have ended; waits for a thousand at a time.

        Raises `RunFailed` or `RunCancelled` for the first that has no result; with `return_exceptions` that stands in
        its place.
        """

    @abstractmethod
    async def now(self) -> datetime:
        """The time, by the database's clock, when this was first asked."""

    @abstractmethod
    async def random(self) -> float:
        """A number from 0 to 1, without 1, drawn when this was first asked."""

    @abstractmethod
    async def uuid(self) -> UUID:
        """A random UUID, drawn when this was first asked."""

    @abstractmethod
    def idempotency_key(self, name: str) -> str:
        """A key for calls to the outside: the same in each try and replay of this run, another in each other run."""


def check_name(what: str, name: object, error: type[Exception]) -> str:
    """Return `name` if it can be one: 1 to 255 characters, all printable."""
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise error(f"{what} {name!r:.80} must be named by 1 to {MOST_NAME} printable characters")
    return name


def _takes_input(name: str, function: Callable[..., Any]) -> bool:
    signature = inspect.signature(function)
    for arguments, takes in (((None,), False), ((None, None), True)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return takes
    raise DefinitionError(
        f"workflow {name}: {getattr(function, '__name__', function)}{signature} must take the context and at most one input"
    )


def _types(flow: Workflow[Any, Any]) -> tuple[Any, Any]:
    try:
        hints = typing.get_type_hints(flow.function)
    except Exception as error:
        raise DefinitionError(f"workflow {flow.name}: an annotation cannot be read: {error}") from None
    parameters = list(inspect.signature(flow.function).parameters)
    given = hints.get(parameters[1], Any) if flow.takes_input else None
    return given, hints.get("return", Any)
