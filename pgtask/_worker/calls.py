"""Calling the functions that are the steps of workflows, on the loop or in a thread, and what their annotations say.

Invariant: what a step raises comes out of here as it is; a timeout is a `StepTimeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import typing
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pgtask._fastpath import Dispatcher, Lease
from pgtask._json_types import JsonCodec, codec_of
from pgtask.errors import DefinitionError, StepTimeout
from pgtask.policy import Policy

__all__ = ["Called", "Calls", "called"]


class Called(NamedTuple):
    """What is known of a function that is called as a step."""

    codec: JsonCodec  # of what it is annotated to return; of anything, without an annotation
    is_async: bool


_called: WeakKeyDictionary[Any, Called] = WeakKeyDictionary()


def called(name: str, function: Callable[..., Any]) -> Called:
    """What is known of the function of the step `name`. Raises `DefinitionError`."""
    try:
        found = _called.get(function)
        if found is None:
            found = _called[function] = Called(_result_codec(name, function), inspect.iscoroutinefunction(function))
        return found
    except TypeError:  # no weak references, or not hashable: a callable object
        return Called(_result_codec(name, function), inspect.iscoroutinefunction(function))


def _result_codec(name: str, function: Any) -> JsonCodec:
    while isinstance(function, partial):
        function = function.func
    if not callable(function):
        raise DefinitionError(f"step {name!r}: {function!r:.80} is not a function; give it and its arguments apart")
    subject = function if inspect.isroutine(function) or isinstance(function, type) else type(function).__call__
    try:
        hints = typing.get_type_hints(subject)
    except (NameError, TypeError, AttributeError) as error:
        if getattr(subject, "__annotations__", None):
            raise DefinitionError(f"step {name!r}: the annotations of its function cannot be read: {error}") from None
        hints = {}
    try:
        return codec_of(function if isinstance(function, type) else hints.get("return", Any))
    except TypeError as error:
        raise DefinitionError(f"step {name!r}: its result: {error}") from None


class Calls:
    """How the runs of one worker call steps. `threads` runs plain functions; `most_bytes` is allowed for a result."""

    def __init__(self, dispatcher: Dispatcher, threads: Executor, *, most_bytes: int) -> None:
        self._dispatcher = dispatcher
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self.most_bytes = most_bytes

    @property
    def is_draining(self) -> bool:
        """Whether the worker is about to leave."""
        return self._dispatcher.draining

    def is_interruption(self, error: Exception) -> bool:
        """Whether a step failed only because its connection to the database was lost."""
        return self._dispatcher.interrupted(error)

    def say_failed(self, lease: Lease, error: Exception, delay: float, tried: int) -> None:
        """Count and log a failed try, one of so many."""
        self._dispatcher.errors += 1
        self._dispatcher.failed(lease, error, delay, tried)

    async def call(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        policy: Policy,
        *,
        is_async: bool,
        is_late: bool = False,
    ) -> Any:
        """Call a step; raises what it raises. Its thread, if it has one, goes on after a timeout or a cancellation.

        A timeout counts from when the function begins: not while it waits for a thread. `is_late`: it is over at once.
        """
        if policy.timeout is None:
            return await (function(*args) if is_async else self._in_thread(function, *args))
        seconds = 0.0 if is_late else policy.timeout.total_seconds()
        try:
            async with asyncio.timeout(seconds if is_async else None) as timeout:
                if is_async:
                    return await function(*args)
                begin = partial(self._loop.call_soon_threadsafe, self._begin, timeout, seconds)
                return await self._in_thread(_after, begin, function, *args)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            seconds = policy.timeout.total_seconds()
            raise StepTimeout(f"step {name} ran longer than its timeout of {seconds:g} s") from error

    def _begin(self, timeout: asyncio.Timeout, seconds: float) -> None:
        """A step with a timeout has begun in its thread, for which it may have waited."""
        with contextlib.suppress(RuntimeError):  # it was cancelled meanwhile
            timeout.reschedule(self._loop.time() + seconds)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        context = contextvars.copy_context()
        result = await self._loop.run_in_executor(self._threads, context.run, function, *args)
        return await result if inspect.isawaitable(result) else result


def _after(begin: Callable[[], Any], function: Callable[..., Any], *args: Any) -> Any:
    begin()
    return function(*args)
