"""The statement of a single enqueue, for a connection that pgtask knows nothing of.

Invariant: it refuses what a client refuses, and inserts what a client inserts, by the same code and the same SQL.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal, overload
from uuid import UUID

from pgtask._ids import first_id
from pgtask._placeholders import Style, translate
from pgtask._placement import OnConflict, OnParked, check_expires, check_one_time, make_key_rule
from pgtask._postgres.inserts import task_insert
from pgtask._validate import place_item
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import EnqueueError
from pgtask.outcome import Enqueue
from pgtask.task import Task

__all__ = ["statement"]

_STYLES = ("numeric", "format", "pyformat")


@overload
def statement(
    step: Task,
    *,
    queue: str | None = None,
    priority: int | None = None,
    key: str | None = None,
    after: timedelta | None = None,
    at: datetime | None = None,
    on_conflict: OnConflict = "keep",
    on_parked: OnParked = "keep",
    debounce: timedelta | None = None,
    ceiling: timedelta | None = None,
    expires: timedelta | datetime | None = None,
    style: Literal["numeric", "format"] = "numeric",
) -> tuple[str, list[Any]]: ...
@overload
def statement(
    step: Task,
    *,
    queue: str | None = None,
    priority: int | None = None,
    key: str | None = None,
    after: timedelta | None = None,
    at: datetime | None = None,
    on_conflict: OnConflict = "keep",
    on_parked: OnParked = "keep",
    debounce: timedelta | None = None,
    ceiling: timedelta | None = None,
    expires: timedelta | datetime | None = None,
    style: Literal["pyformat"],
) -> tuple[str, dict[str, Any]]: ...
def statement(
    step: Task,
    *,
    queue: str | None = None,
    priority: int | None = None,
    key: str | None = None,
    after: timedelta | None = None,
    at: datetime | None = None,
    on_conflict: OnConflict = "keep",
    on_parked: OnParked = "keep",
    debounce: timedelta | None = None,
    ceiling: timedelta | None = None,
    expires: timedelta | datetime | None = None,
    style: Style = "numeric",
) -> tuple[str, list[Any] | dict[str, Any]]:
    """Return the SQL that enqueues a task, and its values: `sql, values = pgtask.statement(ReadName("name.txt"))`.

    Send it on any connection, in your transaction; each call makes another task. It returns the id of the task. With
    `key` alone it returns no row if a task has this key. With another `on_conflict` or `on_parked`, or a `debounce`, it
    returns a row that begins with `id`, `key` and `outcome` (see `TaskId`).

    `style`: `"numeric"` for placeholders like `$1`, `"format"` for `%s`, and `"pyformat"` for `%(p1)s` with a dict. For
    the last two the id is text, since some of their drivers cannot send a UUID.
    Raises `EnqueueError` for what a client refuses.
    """
    if style not in _STYLES:
        raise EnqueueError(f"style={style!r} must be one of {', '.join(map(repr, _STYLES))}")
    check_one_time(after, at)
    item = Enqueue(step, after=after, at=at)
    if debounce is not None and (after is not None or at is not None):
        raise EnqueueError("debounce= says when the task is due: leave out after= and at=")
    rule = make_key_rule(key, on_conflict, on_parked, debounce, ceiling)
    row = place_item(queue, priority, check_expires(expires), rule, DEFAULT_MAX_STEP_BYTES, item, key)
    sql, values = task_insert(UUID(int=first_id()), row)
    text, numbers = translate(sql, style)
    if style == "numeric":
        return text, values
    values = [_without_ids(value) for value in values]
    if style == "format":
        return text, [values[number - 1] for number in numbers]
    return text, {f"p{number}": value for number, value in enumerate(values, 1)}


def _without_ids(value: Any) -> Any:
    """Return the value with ids as text."""
    if isinstance(value, list):
        return list(map(_without_ids, value))
    return str(value) if isinstance(value, UUID) else value
