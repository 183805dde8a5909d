"""Results: the row of a task, or its record in the archive, as Django's `TaskResult`.

Invariant: a path out of the database is called only if a `@task` of the project is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from inspect import iscoroutinefunction
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from django.conf import settings
from django.utils import timezone
from django.utils.module_loading import import_string

from pgtask._lease_token import claimed_at
from pgtask.django.contract import Status, Task, TaskError, TaskResult, TaskResultDoesNotExist
from pgtask.django.invocation import FAMILY, Failure, Invocation, Returned

__all__ = ["FoundTask", "found_task", "is_async_at", "new_result", "result_of", "shown_errors", "time_of"]


class ResultRow(msgspec.Struct):
    """The columns of `result.sql`."""

    step: str
    queue: str
    priority: int
    created_at: datetime
    changed_at: datetime
    lease: str | None
    is_running: bool
    error: str | None
    is_archived: bool


class FoundTask(NamedTuple):
    """A task of the project, with what calls its function in a thread, and its backend."""

    task: Any
    call: Callable[..., Any]
    backend: Any
    is_kept: bool


def found_task(path: str, priority: int, queue: str, backend: str, run_after: datetime | None = None) -> FoundTask:
    """Return the task of the project at a path, with these attributes. Raises what the import of its module raises, and
    `InvalidTask` for attributes that the settings no longer allow."""
    found = _found(path, priority, queue, backend)
    return found if run_after is None else found._replace(task=found.task.using(run_after=time_of(run_after)))


@lru_cache(maxsize=4096)
def _found(path: str, priority: int, queue: str, backend: str) -> FoundTask:
    task = import_string(path)
    if not isinstance(task, Task):
        raise TypeError(f"{path} is not a task: decorate the function with @task, under its own name")
    if (task.priority, task.queue_name, task.backend) != (priority, queue, backend):
        task = task.using(priority=priority, queue_name=queue, backend=backend)
    is_plain = type(task).call is Task.call and not iscoroutinefunction(task.func)
    found = task.get_backend()
    return FoundTask(task, task.func if is_plain else task.call, found, getattr(found, "keeps_results", True))


def is_async_at(path: str) -> bool:
    """Return whether an async function is at a path. False if its module cannot be imported here and now: a thread
    tries that again, and has its error."""
    try:
        return iscoroutinefunction(import_string(path).func)
    except BaseException:
        return False


def new_result(task: Any, id: str, args: Sequence[Any], kwargs: dict[str, Any], backend: str, **known: Any) -> Any:
    """Return the result of a task; of one that has not begun, unless more is known. Raises `TypeError` for arguments
    that JSON does not have."""
    values = {"status": Status.READY, "errors": [], "worker_ids": []} | known
    for name in ("enqueued_at", "started_at", "finished_at", "last_attempted_at"):
        values.setdefault(name, None)
    return TaskResult(task=task, id=id, args=list(args), kwargs=kwargs, backend=backend, **values)


def result_of(id: str, row: ResultRow) -> Any:
    """Return the result that a row tells. Raises `TaskResultDoesNotExist` for a task that Django has not enqueued."""
    path, call, returned = _read(id, row)
    task = found_task(path, row.priority, row.queue, call.backend, call.run_after).task
    starts = [failure.started_at for failure in call.failures]
    workers = [failure.worker for failure in call.failures]
    errors = shown_errors(call.failures)
    status, finished_at = _state_of(row), None
    if returned is not None:
        status, finished_at = Status.SUCCESSFUL, returned.finished_at
        starts.append(returned.started_at)
        workers.append(returned.worker)
    elif status == Status.FAILED:
        finished_at = call.failures[-1].finished_at if call.failures else row.changed_at
        if not call.failures:  # the worker has parked it without a call, or has not seen its end
            errors.append(TaskError(exception_class_path="pgtask.errors.PgtaskError", traceback=row.error or ""))
    elif status == Status.RUNNING:
        workers.append((row.lease or "")[:18])
        at = claimed_at(UUID(row.lease), after=row.created_at, before=datetime.now(UTC)) if row.lease else None
        starts += [] if at is None else [at]
    result = new_result(
        task,
        id,
        call.args,
        call.kwargs,
        call.backend,
        status=status,
        enqueued_at=time_of(row.created_at),
        started_at=time_of(starts[0]) if starts else None,
        last_attempted_at=time_of(starts[-1]) if starts else None,
        finished_at=time_of(finished_at) if finished_at is not None else None,
        errors=errors,
        worker_ids=workers,
    )
    if returned is not None:
        object.__setattr__(result, "_return_value", returned.value)
    return result


def _read(id: str, row: ResultRow) -> tuple[str, Invocation, Returned | None]:
    """Return the path of the function, its invocation, and its end in the archive. Raises `TaskResultDoesNotExist`."""
    try:
        payload = msgspec.json.decode(row.step, type=dict[str, dict[str, msgspec.Raw]])[FAMILY]
        ((path, raw),) = payload.items()
        if row.is_archived:
            returned = msgspec.json.decode(raw, type=Returned)
            return path, returned.call, returned
        return path, msgspec.json.decode(raw, type=Invocation), None
    except (KeyError, ValueError):
        raise TaskResultDoesNotExist(id) from None


def _state_of(row: ResultRow) -> Any:
    if row.error is not None:
        return Status.FAILED
    return Status.RUNNING if row.is_running else Status.READY


def shown_errors(failures: Sequence[Failure]) -> list[Any]:
    """Return failures as Django has them."""
    return [TaskError(exception_class_path=one.exception, traceback=one.traceback) for one in failures]


def time_of(moment: datetime) -> datetime:
    """Return a time as the settings want it: aware, or in the time zone of the project without saying so."""
    if settings.USE_TZ:
        return moment
    return timezone.make_naive(moment) if timezone.is_aware(moment) else moment
