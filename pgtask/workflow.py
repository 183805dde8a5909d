"""The vocabulary of workflows: their definitions, the states of their runs, and the exceptions of their steps.

Invariant: a workflow is a definition; nothing here touches a database.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar

import msgspec

from pgtask._delays import check_delay
from pgtask._json_types import codec_of
from pgtask.errors import DefinitionError
from pgtask.policy import Policy

__all__ = [
    "STEP",
    "Permanent",
    "RunState",
    "Throttled",
    "Transient",
    "Workflow",
    "check_name",
]

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

RunState = Literal["QUEUED", "RUNNING", "PAUSED", "SUCCESS", "ERROR", "CANCELLED"]
"""The states of a run: `pgtask._workflow` draws how one follows the other."""

STEP = "Run"
"""The one step of the family of tasks that a workflow is: `{"<workflow>":{"Run":<input>}}`."""

MAX_NAME = 255


class Transient(Exception):
    """Raise it in a step, of a task or of a workflow, for a failure that will pass: the step is tried again after
    `retry_after`, by default after the delay of its policy.

    Counts against the policy's `retry_limit` as any exception does. Raises `ValueError` for a `retry_after` that is
    negative, no timedelta, or longer than 365,000 days.
    """

    __module__ = "pgtask"  # users import it from there, and a row shows it so
    retry_after = None  # type: timedelta | None

    def __init__(self, message: str = "", *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        if retry_after is not None:
            check_delay(retry_after, "Transient(retry_after={!r}) must be")
        self.retry_after = retry_after


class Throttled(Exception):
    """Raise it in a step, of a task or of a workflow, when someone else asks you to wait, as HTTP does with status 429:
    the step is tried again after `retry_after`, a timedelta or a number of seconds.

    It costs no try, however often: the count of failed tries, and so `retry_limit`, stays as it is. Raises `ValueError`
    for a `retry_after` that is negative, no time, or longer than 365,000 days.
    """

    __module__ = "pgtask"
    retry_after = timedelta(seconds=1)

    def __init__(self, retry_after: timedelta | float, message: str = "") -> None:
        super().__init__(message or f"retry after {retry_after}")
        self.retry_after = _as_delay(retry_after)


def _as_delay(after: object) -> timedelta:
    """Return the `retry_after` of `Throttled`. Raises `ValueError`."""
    what = "Throttled(retry_after={!r}) must be a number of seconds, or"
    delay = after
    if isinstance(after, int | float) and not isinstance(after, bool):
        try:
            delay = timedelta(seconds=after)
        except (ValueError, OverflowError):  # not a number, or infinite
            delay = after
    try:
        return check_delay(delay, what)
    except ValueError as error:
        raise ValueError(str(error).replace(repr(delay), repr(after), 1)) from None


class Permanent(Exception):
    """Raise it when retrying cannot help: the step of a task parks it at once, a step of a workflow fails at once, and
    outside of a step the run ends as ERROR."""

    __module__ = "pgtask"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)


class Workflow(Generic[InputT, OutputT]):
    """A durable function, made by `@workflow`. Calling it calls the function."""

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

    def _check(self) -> None:
        """Raise `DefinitionError` unless input and output can be stored as JSON and read back."""
        for what, annotation in zip(("input", "output"), self.types, strict=True):
            try:
                codec_of(annotation)
            except TypeError as error:
                raise DefinitionError(f"workflow {self.name}: its {what}: {error}") from None

    def _encode_input(self, value: object) -> bytes:
        """Encode the input as JSON. Passes on the error of msgspec for one that cannot be read back as annotated."""
        if not self.takes_input:
            if value is not None:
                raise TypeError("it takes no input")
            return b"null"
        codec = codec_of(self.types[0])
        payload = codec.encode_for_others(value)
        codec.decode(payload)
        return payload

    def _decode_input(self, payload: bytes | msgspec.Raw) -> Any:
        return codec_of(self.types[0]).decode(payload)

    def _decode_output(self, payload: str | msgspec.Raw) -> Any:
        return codec_of(self.types[1]).decode(payload)

    def _envelope(self, payload: bytes) -> str:
        """Return the text of `pg_task.step` for a run with this input."""
        return f'{{{msgspec.json.encode(self.name).decode()}:{{"{STEP}":{payload.decode()}}}}}'


def check_name(what: str, name: object, error: type[Exception]) -> str:
    """Return `name` if it can be one: 1 to 255 characters, all printable."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise error(f"{what} {name!r:.80} must be named by 1 to {MAX_NAME} printable characters")
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
