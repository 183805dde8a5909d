"""Its tasks."""

from __future__ import annotations

import threading
from typing import Any

import django
from django.db import connection, connections

from pgtask import Throttled

if django.VERSION >= (6, 0):
    from django.tasks import task
else:
    from django_tasks import task

from pgtask.django.contract import signals


def plain() -> None:
    """Stand here without the decorator."""


@task()
def add(one: int, two: int = 0) -> int:
    return one + two


@task()
async def aadd(one: int, two: int = 0) -> int:
    return one + two


@task()
def boom(reason: str) -> None:
    raise ValueError(reason)


@task()
async def aboom(reason: str) -> None:
    raise ValueError(reason)


@task()
def unfit() -> Any:
    return object()


@task()
def long(size: int) -> str:
    return "x" * size


@task()
def emptied(items: list[int], more: dict[str, int]) -> list[Any]:
    items.clear()
    more.clear()
    return [items, more]


@task(takes_context=True)
def told(context: Any) -> list[Any]:
    result = context.task_result
    return [context.attempt, result.id, str(result.status), len(result.errors), result.started_at is not None]


@task(backend="forgetful")
def forget() -> int:
    return 1


@task(queue_name="mail", priority=7)
def note(text: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO noted (text) VALUES (%s)", [text])


@task()
async def anote(text: str) -> None:
    from asgiref.sync import sync_to_async

    await sync_to_async(note.func)(text)


@task()
def backends_seen(_: int) -> list[Any]:
    """The server process of the connection of this thread, and whether the call before has left it open."""
    was_open = connections["default"].connection is not None
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return [threading.get_ident(), was_open, cursor.fetchone()[0]]


_throttled: set[int] = set()


@task()
def throttled_once(number: int) -> str:
    if number not in _throttled:
        _throttled.add(number)
        raise Throttled(0.05)
    return "done"


@task()
def heard(text: str) -> str:
    return text


@task()
async def aheard(text: str) -> str:
    return text


def _note_status(sender: Any, task_result: Any, **_: Any) -> None:
    name = task_result.task.name
    if name in ("heard", "aheard"):
        note.func(f"{name} {task_result.status}")


signals.task_started.connect(_note_status)
signals.task_finished.connect(_note_status)
