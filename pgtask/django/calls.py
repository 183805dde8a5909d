"""The calls of the functions of a Django project, in a worker: signals, context, and the connections of Django.

Invariants: what a function raises is a failure of its task and no error of the worker, except what pgtask itself has
to see; connections are looked after in the thread that has opened them, before and after each call.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from traceback import format_exception
from typing import Any
from uuid import UUID

from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.conf import settings
from django.db import close_old_connections, connections, reset_queries

from pgtask._error_text import describe, sanitise
from pgtask._fastpath import Ended
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.django.contract import Status, TaskContext, normalize_json, signals
from pgtask.django.heard import is_heard, is_only_logged
from pgtask.django.invocation import Failure, Invocation, Returned
from pgtask.django.results import FoundTask, found_task, new_result, shown_errors, time_of
from pgtask.django.texts import call_text, returned_text
from pgtask.task import Context
from pgtask.workflow import Throttled

__all__ = ["AsyncFunction", "FunctionCall", "PlainFunction"]

# The worker is stopped, or is to try again later: the function has not failed.
_PASSED_ON = (Throttled, KeyboardInterrupt, asyncio.CancelledError)

_SCALARS = frozenset((str, int, float, bool, type(None)))


class FunctionCall:
    """One call of a function: what Django calls an attempt. `end` is the outcome of its step."""

    def __init__(self, path: str, call: Invocation, id: UUID) -> None:
        self.end: Any = None
        self.call = call
        self._path, self._id = path, id
        self._worker = _worker_name(os.getpid())
        self._started_at = datetime.now(UTC)
        self._found: FoundTask | None = None
        self._result: Any = None
        self._end: dict[str, Any] = {}  # attributes of the result

    def find(self) -> tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]:
        """Return what to call, and its arguments, which the function may change. Raises what the import of the module
        raises."""
        call = self.call
        found = self._found = found_task(self._path, call.priority, call.queue, call.backend, call.run_after)
        args, kwargs = call.args, call.kwargs
        if not _SCALARS.issuperset(map(type, args)):
            args = normalize_json(args)
        if kwargs and not _SCALARS.issuperset(map(type, kwargs.values())):
            kwargs = normalize_json(kwargs)
        if found.task.takes_context:
            args = [TaskContext(task_result=self.result), *args]
        return found.call, args, kwargs

    @property
    def task(self) -> Any:
        """The task of the project, once it is found."""
        assert self._found is not None
        return self._found.task

    @property
    def result(self) -> Any:
        """The result of the task, made when someone wants to see it. There is one once the task is found."""
        if self._result is None:
            call, started_at = self.call, time_of(self._started_at)
            failures = call.failures
            self._result = new_result(
                self.task,
                str(self._id),
                call.args,
                call.kwargs,
                call.backend,
                status=Status.RUNNING,
                enqueued_at=time_of(datetime.fromtimestamp((self._id.int >> 80) / 1000, UTC)),
                started_at=time_of(failures[0].started_at) if failures else started_at,
                last_attempted_at=started_at,
                worker_ids=[*(failure.worker for failure in failures), self._worker],
                errors=shown_errors(failures),
            )
            _change(self._result, self._end)
        return self._result

    def signal(self, signal: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return the sender and the arguments of a signal; None if there is no task to tell of, or if nothing hears."""
        if self._found is None or not is_heard(signal, is_failure=self._end.get("status") == Status.FAILED):
            return None
        return type(self._found.backend), {"task_result": self.result}

    def _set_end(self, **values: Any) -> None:
        self._end = values
        if self._result is not None:
            _change(self._result, values)

    def succeed(self, value: Any) -> None:
        """Note that the function has returned. Raises `TypeError`, `ValueError` for what JSON does not have."""
        value = None if value is None else normalize_json(value)
        finished_at = datetime.now(UTC)
        text = None
        if self._found is not None and self._found.is_kept:
            returned = Returned(self.call, self._worker, self._started_at, finished_at, value)
            text = returned_text(self._path, returned)
        self._set_end(status=Status.SUCCESSFUL, finished_at=time_of(finished_at), _return_value=value)
        self.end = Ended(text)

    def fail(self, error: BaseException) -> None:
        """Note that the function has raised."""
        finished_at = datetime.now(UTC)
        exception = f"{type(error).__module__}.{type(error).__qualname__}"
        trace = sanitise("".join(format_exception(error)))
        call = self.call.failed_with(Failure(self._worker, self._started_at, finished_at, exception, trace))
        self._set_end(status=Status.FAILED, finished_at=time_of(finished_at), errors=shown_errors(call.failures))
        self.end = Ended(call_text(self._path, call, DEFAULT_MAX_STEP_BYTES), describe(error))


class PlainFunction:
    """A plain function of the project. Its calls are for threads of the worker."""

    def __init__(self, path: str) -> None:
        self._path = path

    def run(self, step: Any, ctx: Context) -> Any:
        """Call it, and return the outcome of the step."""
        one = FunctionCall(self._path, step.call, ctx.task_id)
        if settings.DEBUG:  # nothing else notes queries
            reset_queries()
        close_old_connections()
        try:
            try:
                function, args, kwargs = one.find()
                _send(signals.task_started, one)
                one.succeed(function(*args, **kwargs))
            except _PASSED_ON:
                raise
            except BaseException as error:
                one.fail(error)
                _send(signals.task_finished, one)  # in here: its receivers log the exception that is being handled
            else:
                _send(signals.task_finished, one)
        finally:
            close_old_connections()
        return one.end


class AsyncFunction:
    """An async function of the project. What Django does for a call in a thread has a thread of its own, as that of a
    request has."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def run(self, step: Any, ctx: Context) -> Any:
        """Call it, and return the outcome of the step."""
        one = FunctionCall(self._path, step.call, ctx.task_id)
        async with ThreadSensitiveContext() as context:
            try:
                try:
                    _, args, kwargs = one.find()
                    await _asend(signals.task_started, one)
                    one.succeed(await one.task.acall(*args, **kwargs))
                except _PASSED_ON:
                    raise
                except BaseException as error:
                    one.fail(error)
                    await _asend(signals.task_finished, one)
                else:
                    await _asend(signals.task_finished, one)
            finally:
                # The thread ends with this context, and so do its connections. It exists if something has used it.
                if SyncToAsync.context_to_thread_executor.get(context) is not None:
                    await sync_to_async(connections.close_all)()
        return one.end


def _send(signal: Any, one: FunctionCall) -> None:
    """Send a signal. A receiver that raises is logged by Django, and changes nothing about the task."""
    if (told := one.signal(signal)) is not None:
        signal.send_robust(told[0], **told[1])


async def _asend(signal: Any, one: FunctionCall) -> None:
    """Send a signal from the loop. A plain receiver has to run in a thread, which costs more than many a task, so
    Django's own, which only logs, is called at once where there is no other."""
    if (told := one.signal(signal)) is None:
        return
    if is_only_logged(signal):
        signal.send_robust(told[0], **told[1])
    elif hasattr(signal, "asend_robust"):
        await signal.asend_robust(told[0], **told[1])
    else:  # Django 4.2, whose receivers are all plain
        await sync_to_async(signal.send_robust)(told[0], **told[1])


def _change(result: Any, values: dict[str, Any]) -> None:
    """Change a result, which is frozen for everyone else."""
    for name, value in values.items():
        object.__setattr__(result, name, value)


@cache
def _worker_name(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}"[:64]
