"""The vocabulary of workflows: functions made durable, and what they raise.

Invariant: a workflow is a definition; nothing here touches a database. What it asks for is `WorkflowContext`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import msgspec

from pgtask._json_types import codec_of
from pgtask.errors import DefinitionError
from pgtask.policy import Policy

if TYPE_CHECKING:
    from pgtask.workflow_context import WorkflowContext

__all__ = [
    "STEP",
    "Permanent",
    "RunState",
    "Transient",
    "Workflow",
    "check_name",
    "workflow",
]

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

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


class workflow:  # noqa: N801 - a decorator
    """Make an `async def` function durable, which takes the context and at most one input.

        @workflow("zip_files")
        async def zip_files(ctx: WorkflowContext, params: ZipParams) -> ZipResult: ...

    - `name` is what rows store; the function may be renamed, the name not.
    - `version` is raised when the code changes in a way that contradicts what runs have recorded; a run goes on with
      the function whose versions, `since` (default: `version`) to `version`, contain the one it began under.
    - `policy`: `queue` and `priority` of its runs; retries and timeout of its steps, unless a step has its own; retries
      of what is raised outside of steps. By default five retries after about 1, 2, 4, 8 and 16 seconds.

    The function is run again from the top whenever its run goes on, so outside of steps it must do the same each time.
    Raises `DefinitionError`.
    """

    def __init__(
        self, name: str, *, version: int = 1, since: int | None = None, policy: Policy = DEFAULT_POLICY
    ) -> None:
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
        self._options = (name, version, since, policy)

    @overload
    def __call__(self, function: Callable[[WorkflowContext], Awaitable[OutputT]]) -> Workflow[None, OutputT]: ...
    @overload
    def __call__(
        self, function: Callable[[WorkflowContext, InputT], Awaitable[OutputT]]
    ) -> Workflow[InputT, OutputT]: ...
    def __call__(self, function: Callable[..., Awaitable[Any]]) -> Workflow[Any, Any]:
        if not inspect.iscoroutinefunction(function):
            raise DefinitionError(f"workflow {self._options[0]}: {function!r:.80} is not an async def function")
        return Workflow(function, *self._options)


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
        f"workflow {name}: {getattr(function, '__name__', function)}{signature} must take the context and, if it has "
        "an input, that one beside it"
    )


def _types(flow: Workflow[Any, Any]) -> tuple[Any, Any]:
    try:
        hints = typing.get_type_hints(flow.function)
    except Exception as error:
        raise DefinitionError(f"workflow {flow.name}: an annotation cannot be read: {error}") from None
    parameters = list(inspect.signature(flow.function).parameters)
    given = hints.get(parameters[1], Any) if flow.takes_input else None
    return given, hints.get("return", Any)
