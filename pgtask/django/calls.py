"""The calls of the functions of a Django project, in a worker: signals, context, and the connections of Django.

Invariants: what a function raises is a failure of its task and no error of the worker, except what pgtask itself has
to see; connections are looked after in the thread that has opened them, before and after each call.
"""

from __future__ import annotations

import asyncio
import os
import socket
from datetime import UTC, datetime
from functools import cache
from traceback import format_exception
from typing import Any
from uuid import UUID

from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.conf import settings
from django.db import close_old_connections, connections, reset_queries

from pgtask._error_text import describe, sanitise
from pgtask.django.contract import Status, TaskContext, TaskError, normalize_json, signals
from pgtask.django.invocation import Invocation
from pgtask.django.results import found_task, new_result, shown_errors, time_of
from pgtask.workflow import Throttled

__all__ = ["FunctionCall", "call_async", "call_plain"]

# The worker is stopped, or is to try again later: the function has not failed.
_PASSED_ON = (Throttled, KeyboardInterrupt, asyncio.CancelledError)


class FunctionCall:
    """One call of a function: what Django calls an attempt. `reason` is None unless it has failed."""

    reason: str | None = None
    exception = traceback = ""
    value: Any = None
    finished_at: datetime

    def __init__(self, call: Invocation, id: UUID) -> None:
        self.call = call
        self.worker = _worker_name(os.getpid())
        self.started_at = datetime.now(UTC)
        self.is_kept = True
        self._id = id
        self._result: Any = None
        self._sender: type[Any] | None = None

    def find(self) -> tuple[Any, tuple[Any, ...]]:
        """Return the task of the project, and its arguments. Raises what the import of its module raises."""
        call = self.call
        task = found_task(call.path, call.priority, call.queue, call.backend, call.run_after)
        backend = task.get_backend()
        self._sender, self.is_kept = type(backend), getattr(backend, "keeps_results", True)
        result = self._result = new_result(task, str(self._id), call.args, call.kwargs, call.backend)
        failures = call.failures
        _change(
            result,
            status=Status.RUNNING,
            enqueued_at=time_of(datetime.fromtimestamp((self._id.int >> 80) / 1000, UTC)),
            started_at=time_of(failures[0].started_at if failures else self.started_at),
            last_attempted_at=time_of(self.started_at),
            worker_ids=[*(failure.worker for failure in failures), self.worker],
            errors=shown_errors(failures),
        )
        return task, (TaskContext(task_result=result), *result.args) if task.takes_context else tuple(result.args)

    def signal(self, signal: Any) -> tuple[Any, dict[str, Any]] | None:
        """Return the sender and the arguments of a signal; None if there is no task to tell of."""
        return None if self._result is None else (self._sender, {"task_result": self._result})

    def succeed(self, value: Any) -> None:
        """Note that the function has returned. Raises `TypeError`, `ValueError` for what JSON does not have."""
        self.value = normalize_json(value)
        self.finished_at = datetime.now(UTC)
        _change(
            self._result,
            status=Status.SUCCESSFUL,
            finished_at=time_of(self.finished_at),
            _return_value=self.value,
        )

    def fail(self, error: BaseException) -> None:
        """Note that the function has raised."""
        self.finished_at = datetime.now(UTC)
        self.reason = describe(error)
        self.exception = f"{type(error).__module__}.{type(error).__qualname__}"
        self.traceback = sanitise("".join(format_exception(error)))
        if self._result is not None:
            shown = TaskError(exception_class_path=self.exception, traceback=self.traceback)
            _change(
                self._result,
                status=Status.FAILED,
                finished_at=time_of(self.finished_at),
                errors=[*self._result.errors, shown],
            )


def call_plain(call: Invocation, id: UUID) -> FunctionCall:
    """Call a plain function. For a thread of the worker."""
    one = FunctionCall(call, id)
    if settings.DEBUG:  # nothing else notes queries
        reset_queries()
    close_old_connections()
    try:
        try:
            task, arguments = one.find()
            _send(signals.task_started, one)
            one.succeed(task.call(*arguments, **one.call.kwargs))
        except _PASSED_ON:
            raise
        except BaseException as error:
            one.fail(error)
            _send(signals.task_finished, one)  # in here: its receivers log the exception that is being handled
        else:
            _send(signals.task_finished, one)
    finally:
        close_old_connections()
    return one


async def call_async(call: Invocation, id: UUID) -> FunctionCall:
    """Call an async function. What Django does for it in a thread has a thread of its own, as that of a request has."""
    one = FunctionCall(call, id)
    async with ThreadSensitiveContext() as context:
        try:
            try:
                task, arguments = one.find()
                await _asend(signals.task_started, one)
                one.succeed(await task.acall(*arguments, **one.call.kwargs))
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
    return one


def _send(signal: Any, one: FunctionCall) -> None:
    """Send a signal. A receiver that raises is logged by Django, and changes nothing about the task."""
    if (told := one.signal(signal)) is not None:
        signal.send_robust(told[0], **told[1])


async def _asend(signal: Any, one: FunctionCall) -> None:
    """Send a signal from the loop. A plain receiver has to run in a thread, which costs more than many a task, so the
    one that Django itself connects, which only logs, is called at once where there is no other."""
    if (told := one.signal(signal)) is None:
        return
    if len(signal.receivers) == 1:
        signal.send_robust(told[0], **told[1])
    else:
        await signal.asend_robust(told[0], **told[1])


def _change(result: Any, **values: Any) -> None:
    """Change a result, which is frozen for everyone else."""
    for name, value in values.items():
        object.__setattr__(result, name, value)


@cache
def _worker_name(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}"[:64]
