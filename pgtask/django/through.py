"""Statements over Django's own connection: what they write is part of the transaction that is open there.

`insert_through` is the only place where a task of Django is inserted.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import ProgrammingError

from pgtask._placeholders import translate
from pgtask._postgres.store import statement
from pgtask.errors import DataRefused, SchemaError

__all__ = ["fetch_through", "insert_through"]

_UNDEFINED_TABLE = "42P01"


def insert_through(
    connection: Any, id: str, step: str, wakeup_at: datetime | None, queue: str, priority: int
) -> datetime:
    """Insert a task, in the transaction of the connection if it has one; return the time of the enqueue.

    Raises `SchemaError` without the table, `DataRefused` if a trigger or rule of the user keeps the row out, and
    Django's own errors.
    """
    rows = fetch_through(connection, "django/enqueue", id, step, wakeup_at, queue, priority)
    if not rows:
        raise DataRefused("the task was not inserted: a trigger or rule of yours on pg_task keeps it out")
    enqueued_at: datetime = rows[0][0]
    return enqueued_at


def fetch_through(connection: Any, name: str, *values: Any) -> list[tuple[Any, ...]]:
    """Run a statement of ours, and return its rows."""
    if connection.vendor != "postgresql":
        raise ImproperlyConfigured(
            f"pgtask needs PostgreSQL, and DATABASES[{connection.alias!r}] is {connection.vendor}: name another alias "
            "as OPTIONS['database'] in TASKS"
        )
    try:
        with connection.cursor() as cursor:
            text, _ = translate(statement(name), "pyformat")
            cursor.execute(text, {f"p{number}": value for number, value in enumerate(values, 1)})
            found: list[tuple[Any, ...]] = cursor.fetchall()
            return found
    except ProgrammingError as error:
        cause: Any = error.__cause__
        if _UNDEFINED_TABLE not in (getattr(cause, "sqlstate", None), getattr(cause, "pgcode", None)):
            raise
        raise SchemaError(
            f"the database of DATABASES[{connection.alias!r}] has no pg_task table; run: pgtask migrate; "
            "or add 'pgtask.django' to INSTALLED_APPS, and run: python manage.py migrate"
        ) from error
