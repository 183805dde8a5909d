"""The backend: Django's tasks as rows of `pg_task`, inserted through Django's connection.

Invariant: what no worker could find or run is refused before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC
from functools import cache, cached_property
from typing import Any
from uuid import UUID

from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils import timezone
from django.utils.module_loading import import_string

from pgtask._ids import first_id
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.django.checks import option_errors, queue_errors
from pgtask.django.contract import BaseTaskBackend, InvalidTask, Task, TaskResultDoesNotExist, signals
from pgtask.django.invocation import Invocation
from pgtask.django.results import ResultRow, new_result, result_of, time_of
from pgtask.django.texts import call_text
from pgtask.django.through import fetch_through, insert_through
from pgtask.policy import check_queue

__all__ = ["PgtaskBackend"]

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
        options = self.options if isinstance(self.options, dict) else {}
        self.database: Any = options.get("database", "default")
        self.keeps_results = bool(options.get("keep_results", True))

    @cached_property
    def _connections(self) -> Any:
        """The connections of Django. Raises `ImproperlyConfigured` for wrong options, which `manage.py check` lists: to
        raise when Django makes the backend would keep the checks from running."""
        for error in option_errors(self.alias, self.options):
            raise ImproperlyConfigured(f"{error.msg}. {error.hint}")
        return connections

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
            result.args,
            result.kwargs,
            self.alias,
            task.queue_name,
            int(task.priority),
            None if due is None else due.astimezone(UTC),
        )
        text = call_text(task.module_path, call, MAX_BYTES)
        enqueued_at = insert_through(
            self._connections[self.database], result.id, text, due, task.queue_name, int(task.priority)
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
        rows = fetch_through(self._connections[self.database], "django/result", id)
        if not rows:
            raise TaskResultDoesNotExist(result_id)
        return result_of(id, ResultRow(*rows[0]))

    def check(self, **kwargs: Any) -> Iterable[checks.CheckMessage]:
        """Yield an error for each setting of this backend that is wrong, with the remedy."""
        yield from option_errors(self.alias, self.options)
        yield from queue_errors(self.alias, self.queues)


@cache
def _check_findable(path: str, function: Any) -> None:
    """Raise `InvalidTask` unless a worker finds the task of a function by its path."""
    try:
        found = import_string(path)
    except ImportError as error:
        raise InvalidTask(f"no worker could import the task: {error}") from None
    if not isinstance(found, Task) or found.func is not function:
        raise InvalidTask(f"no worker could find the task: {path} is not it; give it the name of its function")
