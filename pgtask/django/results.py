"""Results: the row of a task, or its record in the archive, as Django's `TaskResult`.

Invariant: a path out of the database is called only if a `@task` of the project is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import msgspec
from django.conf import settings
from django.utils import timezone
from django.utils.module_loading import import_string

from pgtask.django.contract import Status, Task, TaskError, TaskResult, TaskResultDoesNotExist
from pgtask.django.invocation import Failure, Invocation

__all__ = ["found_task", "new_result", "result_of", "shown_errors", "time_of"]


class _EndedCall(msgspec.Struct):
    """What the steps `Returned` and `Failed` have beside the invocation."""

    call: Invocation
    value: Any = None
    worker: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None


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


def found_task(path: str, priority: int, queue: str, backend: str, run_after: datetime | None = None) -> Any:
    """Return the task of the project at a path, with these attributes. Raises what the import of its module raises, and
    `InvalidTask` for attributes that the settings no longer allow."""
    task = _found(path, priority, queue, backend)
    return task if run_after is None else task.using(run_after=time_of(run_after))


@lru_cache(maxsize=4096)
def _found(path: str, priority: int, queue: str, backend: str) -> Any:
    task = import_string(path)
    if not isinstance(task, Task):
        raise TypeError(f"{path} is not a task: decorate the function with @task, under its own name")
    if (task.priority, task.queue_name, task.backend) == (priority, queue, backend):
        return task
    return task.using(priority=priority, queue_name=queue, backend=backend)


def new_result(task: Any, id: str, args: Sequence[Any], kwargs: dict[str, Any], backend: str) -> Any:
    """Return the result of a task that has not begun. Raises `TypeError` for arguments that JSON does not have."""
    return TaskResult(
        task=task,
        id=id,
        status=Status.READY,
        enqueued_at=None,
        started_at=None,
        finished_at=None,
        last_attempted_at=None,
        args=list(args),
        kwargs=kwargs,
        backend=backend,
        errors=[],
        worker_ids=[],
    )


def result_of(id: str, row: ResultRow) -> Any:
    """Return the result that a row tells. Raises `TaskResultDoesNotExist` for a task that Django has not enqueued."""
    name, call, ended = _read(id, row.step)
    task = found_task(call.path, row.priority, row.queue, call.backend, call.run_after)
    result = new_result(task, id, call.args, call.kwargs, call.backend)
    starts = [failure.started_at for failure in call.failures]
    workers = [failure.worker for failure in call.failures]
    errors = shown_errors(call.failures)
    status, finished_at = _state_of(name, row), None
    if name == "Returned" and ended.started_at is not None:
        starts.append(ended.started_at)
        workers.append(ended.worker)
        finished_at = ended.finished_at
    elif status == Status.FAILED:
        finished_at = call.failures[-1].finished_at if call.failures else row.changed_at
        if not call.failures:  # the worker has parked it without a call, or has not seen its end
            errors.append(TaskError(exception_class_path="pgtask.errors.PgtaskError", traceback=row.error or ""))
    elif status == Status.RUNNING:
        workers.append((row.lease or "")[:18])
    for attribute, value in {
        "status": status,
        "enqueued_at": time_of(row.created_at),
        "started_at": time_of(starts[0]) if starts else None,
        "last_attempted_at": time_of(starts[-1]) if starts else None,
        "finished_at": time_of(finished_at) if finished_at is not None else None,
        "errors": errors,
        "worker_ids": workers,
        "_return_value": ended.value,
    }.items():
        object.__setattr__(result, attribute, value)
    return result


def _read(id: str, step: str) -> tuple[str, Invocation, _EndedCall]:
    """Return the name of a step, its invocation, and its other fields. Raises `TaskResultDoesNotExist`."""
    try:
        payload = msgspec.json.decode(step, type=dict[str, dict[str, msgspec.Raw]])["DjangoTask"]
        ((name, raw),) = payload.items()
        if name in ("Returned", "Failed"):
            ended = msgspec.json.decode(raw, type=_EndedCall)
        else:
            ended = _EndedCall(msgspec.json.decode(raw, type=Invocation))
    except (KeyError, ValueError):
        raise TaskResultDoesNotExist(id) from None
    return name, ended.call, ended


def _state_of(name: str, row: ResultRow) -> Any:
    if name == "Returned":
        return Status.SUCCESSFUL
    if name == "Failed" or row.error is not None:
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
