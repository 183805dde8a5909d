"""Calls of the functions that are the steps of workflows, on the loop or in a thread, and their annotations.

Invariant: an exception of a step leaves this module unchanged; a timeout is a `StepTimeout`, and a StopIteration, which
no coroutine can raise, is the cause of a RuntimeError.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import time
import typing
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pgtask._fastpath import Dispatcher, TaskLease
from pgtask._json_types import JsonCodec, codec_of
from pgtask._traces import checkpointing
from pgtask._workflow.values import Checkpoint
from pgtask.errors import DefinitionError, StepTimeout
from pgtask.policy import Policy
from pgtask.workflow import Permanent

__all__ = ["STOP_ITERATION", "StepFunction", "StepRunner", "inspect_step", "is_cancelled"]

STOP_ITERATION = "it raised StopIteration: next() has found nothing"
"""The text of the RuntimeError that replaces a StopIteration, as Python has one if a generator raises it."""


def is_cancelled() -> bool:
    """True if a cancellation of this task is on its way through it: not one that some code has only raised."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class StepFunction(NamedTuple):
    """The facts about a function that is called as a step."""

    codec: JsonCodec  # of its return annotation; of anything, without an annotation
    is_async: bool


_inspected: WeakKeyDictionary[Any, StepFunction] = WeakKeyDictionary()


def inspect_step(name: str, function: Callable[..., Any]) -> StepFunction:
    """Inspect the function of the step `name`. Raises `DefinitionError`."""
    try:
        found = _inspected.get(function)
        if found is None:
            found = _inspected[function] = _inspect(name, function)
        return found
    except TypeError:  # no weak references, or not hashable: a callable object
        return _inspect(name, function)


def _inspect(name: str, function: Any) -> StepFunction:
    return StepFunction(_result_codec(name, function), inspect.iscoroutinefunction(function))


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


class StepRunner:
    """Calls the steps of the runs of one worker.

    `threads` runs plain functions; `max_bytes` bounds the JSON of a result. `end_if_copy` ends this process, with the
    error of the step, if it is one that the step has forked.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        threads: Executor,
        *,
        max_bytes: int,
        end_if_copy: Callable[[BaseException | None], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._max_bytes = max_bytes
        self.end_if_copy = end_if_copy

    @property
    def is_draining(self) -> bool:
        """True if the worker is about to leave."""
        return self._dispatcher.draining

    def is_interruption(self, error: Exception) -> bool:
        """True if a step failed only because its connection to the database was lost."""
        return self._dispatcher.is_interruption(error)

    def encode_result(self, what: str, codec: JsonCodec, value: Any) -> tuple[str, Any]:
        """Return a result as JSON, and the value that a replay reads from it. Raises `Permanent`."""
        try:
            payload = codec.encode(value)
            found = codec.decode(payload)
        except Exception as error:
            raise Permanent(f"{what} returned what cannot be recorded: {error}") from error
        if len(payload) > self._max_bytes:
            raise Permanent(
                f"{what} returned {len(payload)} bytes of JSON, more than the {self._max_bytes} allowed "
                "(--max-step-bytes); store it elsewhere and return a reference to it"
            )
        return payload.decode(), found

    def report_failure(
        self, lease: TaskLease, error: BaseException, delay: float | None, tried: int, **more: Any
    ) -> None:
        """Count and log a failed try. The last one, without a delay, is an answer to the workflow."""
        self._dispatcher.errors += delay is not None
        self._dispatcher.log_failed(lease, error, delay, tried, **more)

    def report_throttled(self, lease: TaskLease, error: BaseException, delay: float, **more: Any) -> None:
        """Log that a step, or the run, is put off. No failed try, so it is not counted."""
        self._dispatcher.log_throttled(lease, error, delay, **more)

    def report_done(self, lease: TaskLease, outcome: object, began: float) -> None:
        """Log, for those who debug, that a run has ended."""
        if self._dispatcher.logs_finished:
            self._dispatcher.log_finished(lease, lease.label, outcome, time.monotonic() - began)

    def report_recorded(self, lease: TaskLease, checkpoint: Checkpoint) -> None:
        """Log, for those who debug, that a step of a run is recorded."""
        if self._dispatcher.logs_finished and checkpoint.kind == "step" and checkpoint.result is not None:
            self._dispatcher.log_finished(
                lease, lease.label, "recorded", checkpoint.seconds, checkpoint=checkpoint.name
            )

    async def attempt(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], policy: Policy, is_async: bool
    ) -> tuple[Any, BaseException | None]:
        """Call a step, and return its result or its error as a value. A cancellation of this task is such an error, see
        `is_cancelled`; so is a GeneratorExit, but not that of a coroutine which is closed."""
        try:
            with checkpointing(name):
                if is_async and policy.timeout is None:
                    return await function(*args), None
                return await self.call_step(name, function, args, policy, is_async=is_async), None
        except BaseException as error:
            return None, error

    async def call_step(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        policy: Policy,
        *,
        is_async: bool,
        is_late: bool = False,
    ) -> Any:
        """Call a step; raises its error. A thread of it goes on after a timeout or a cancellation.

        A timeout counts from the begin of the function: not while it waits for a thread. With `is_late` it is over at
        once.
        """
        if policy.timeout is None:
            return await (function(*args) if is_async else self._call_in_thread(function, *args))
        seconds = 0.0 if is_late else policy.timeout.total_seconds()
        try:
            async with asyncio.timeout(seconds if is_async else None) as timeout:
                if is_async:
                    return await function(*args)
                begin = partial(self._loop.call_soon_threadsafe, self._start_timeout, timeout, seconds)
                return await self._call_in_thread(_call_after, begin, function, *args)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            seconds = policy.timeout.total_seconds()
            raise StepTimeout(f"step {name} ran longer than its timeout of {seconds:g} s") from error

    def _start_timeout(self, timeout: asyncio.Timeout, seconds: float) -> None:
        """Start the timeout of a step that has begun in its thread, for which it may have waited."""
        with contextlib.suppress(RuntimeError):  # it was cancelled meanwhile
            timeout.reschedule(self._loop.time() + seconds)

    async def _call_in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        run = contextvars.copy_context().run
        # A future does not carry every exception: with a StopIteration, it is never done.
        result = await self._loop.run_in_executor(self._threads, self._contain, run, function, *args)
        if isinstance(result, _ThreadError) and isinstance(result.error, StopIteration):
            raise RuntimeError(STOP_ITERATION) from result.error
        if isinstance(result, _ThreadError):
            raise result.error
        return await result if inspect.isawaitable(result) else result

    def _contain(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in its thread, and return its error as a value."""
        try:
            result = function(*args)
        except BaseException as error:
            self.end_if_copy(error)
            return _ThreadError(error)
        self.end_if_copy(None)
        return result


class _ThreadError(NamedTuple):
    """The error that a function has raised in its thread."""

    error: BaseException


def _call_after(begin: Callable[[], Any], function: Callable[..., Any], *args: Any) -> Any:
    begin()
    return function(*args)
