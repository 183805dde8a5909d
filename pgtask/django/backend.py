"""The backend: Django's tasks as rows of `pg_task`, inserted through Django's connection.

Invariant: what no worker could find or run is refused before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC
from functools import cache
from inspect import iscoroutinefunction
from typing import Any
from uuid import UUID

from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils import timezone
from django.utils.module_loading import import_string

from pgtask._ids import first_id
from pgtask._nearest import did_you_mean
from pgtask._validate import encode, envelope_of
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.django.contract import BaseTaskBackend, InvalidTask, Task, TaskResultDoesNotExist, signals
from pgtask.django.invocation import Invocation
from pgtask.django.results import ResultRow, new_result, result_of, time_of
from pgtask.django.steps import first_step
from pgtask.django.through import fetch_through, insert_through
from pgtask.policy import check_queue

__all__ = ["PgtaskBackend"]

_OPTIONS = ("database", "keep_results")
MAX_BYTES = DEFAULT_MAX_STEP_BYTES // 2  # of the arguments: the row has to hold a value or failures beside them


class PgtaskBackend(BaseTaskBackend):  # type: ignore[misc,unused-ignore]
    """A backend of Django's tasks.

        TASKS = {"default": {"BACKEND": "pgtask.django.PgtaskBackend", "QUEUES": ["default", "mail"], "OPTIONS": {}}}

    A task that is enqueued in `transaction.atomic()` is part of that transaction. OPTIONS:

    - `database`: the alias in DATABASES, "default" by default.
    - `keep_results`: whether finished tasks stay in `pg_task_archive`, where `get_result` finds them until
      `pgtask prune` removes them; True by default. Without that, the result of a finished task does not exist.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        for name in self.options:
            if name not in _OPTIONS:
                hint = did_you_mean(name, _OPTIONS) or f": use {' or '.join(_OPTIONS)}"
                raise ImproperlyConfigured(f"TASKS[{alias!r}]['OPTIONS'] has no option {name!r}{hint}")
        self.database: str = self.options.get("database", "default")
        self.keeps_results = bool(self.options.get("keep_results", True))

    def validate_task(self, task: Any) -> None:
        """Raise `InvalidTask` for a task that no worker could run."""
        super().validate_task(task)
        try:
            check_queue(task.queue_name)
        except ValueError as error:
            raise InvalidTask(str(error)) from None

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Insert the task, in the transaction that is open on Django's connection, and return its result.

        Raises `InvalidTask`, `TypeError` for arguments that JSON does not have, `EnqueueError` for others that cannot
        be stored, and `SchemaError` without the table.
        """
        self.validate_task(task)
        _check_findable(task.module_path, task.func)
        result = new_result(task, str(UUID(int=first_id())), args, kwargs, self.alias)
        due = task.run_after
        if due is not None and timezone.is_naive(due):
            due = timezone.make_aware(due)
        call = Invocation(
            task.module_path,
            result.args,
            result.kwargs,
            self.alias,
            task.queue_name,
            int(task.priority),
            None if due is None else due.astimezone(UTC),
        )
        step = first_step(call, is_async=iscoroutinefunction(task.func))
        text = envelope_of(*encode(step, MAX_BYTES))
        enqueued_at = insert_through(
            connections[self.database], result.id, text, due, task.queue_name, int(task.priority)
        )
        object.__setattr__(result, "enqueued_at", time_of(enqueued_at))
        signals.task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> Any:
        """Return the result of a task as of now. Raises `TaskResultDoesNotExist`."""
        try:
            id = str(UUID(result_id))
        except (ValueError, TypeError, AttributeError):
            raise TaskResultDoesNotExist(result_id) from None
        rows = fetch_through(connections[self.database], "django/result", id)
        if not rows:
            raise TaskResultDoesNotExist(result_id)
        return result_of(id, ResultRow(*rows[0]))

    def check(self, **kwargs: Any) -> Iterable[checks.CheckMessage]:
        """Yield an error for a database that cannot be used, and for each queue that cannot be named so."""
        place = f"TASKS[{self.alias!r}]"
        if self.database not in connections:
            yield checks.Error(f"{place}: DATABASES has no {self.database!r}", id="pgtask.E001")
        elif connections[self.database].vendor != "postgresql":
            yield checks.Error(f"{place}: DATABASES[{self.database!r}] is not PostgreSQL", id="pgtask.E002")
        for queue in self.queues:
            try:
                check_queue(queue)
            except ValueError as error:
                yield checks.Error(f"{place}: {error}", id="pgtask.E003")


@cache
def _check_findable(path: str, function: Any) -> None:
    """Raise `InvalidTask` unless a worker finds the task of a function by its path."""
    try:
        found = import_string(path)
    except ImportError as error:
        raise InvalidTask(f"no worker could import the task: {error}") from None
    if not isinstance(found, Task) or found.func is not function:
        raise InvalidTask(f"no worker could find the task: {path} is not it; give it the name of its function")
