"""Calling the functions that are the steps of workflows, on the loop or in a thread, and what their annotations say.

Invariant: what a step raises comes out of here as it is; a timeout is a `StepTimeout`.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import typing
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from pgtask._fastpath import Dispatcher, Lease
from pgtask._json_types import JsonCodec, codec_of
from pgtask.errors import DefinitionError, StepTimeout
from pgtask.policy import Policy

__all__ = ["Calls", "result_codec"]

_codecs: WeakKeyDictionary[Any, JsonCodec] = WeakKeyDictionary()


def result_codec(name: str, function: Callable[..., Any]) -> JsonCodec:
    """The codec of what a step's function is annotated to return; of anything, without an annotation.

    Raises `DefinitionError`.
    """
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    try:
        found = _codecs.get(function)
    except TypeError:  # no weak references, or not hashable: a callable object
        return _result_codec(name, function)
    if found is None:
        found = _codecs[function] = _result_codec(name, function)
    return found


def _result_codec(name: str, function: Any) -> JsonCodec:
    if not callable(function):
        raise DefinitionError(f"step {name!r}: {function!r:.80} is not a function; give it and its arguments apart")
    subject = function if inspect.isroutine(function) or isinstance(function, type) else type(function).__call__
    try:
        hints = typing.get_type_hints(subject)
    except (NameError, TypeError, AttributeError) as error:
        if not getattr(subject, "__annotations__", None):
            hints = {}
        else:
            raise DefinitionError(f"step {name!r}: the annotations of its function cannot be read: {error}") from None
    annotation = function if isinstance(function, type) else hints.get("return", Any)
    try:
        return codec_of(annotation)
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

    def say_failed(self, lease: Lease, error: Exception, delay: float) -> None:
        """Count and log a failed try."""
        self._dispatcher.errors += 1
        self._dispatcher.failed(lease, error, delay)

    async def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], policy: Policy) -> Any:
        """Call a step; raises what it raises. Its thread, if it has one, goes on after a timeout or a cancellation."""
        if policy.timeout is None:
            return await self._call(function, args)
        timeout = asyncio.timeout(policy.timeout.total_seconds())
        try:
            async with timeout:
                return await self._call(function, args)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            seconds = policy.timeout.total_seconds()
            raise StepTimeout(f"step {name} ran longer than its timeout of {seconds:g} s") from error

    async def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        context = contextvars.copy_context()
        result = await self._loop.run_in_executor(self._threads, context.run, function, *args)
        return await result if inspect.isawaitable(result) else result
