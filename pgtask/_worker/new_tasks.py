"""The new tasks of an outcome: from the items that a step returns to the rows that its flush inserts.

Invariant: an item that a client would not enqueue is an `OutcomeError`, which names its number and the remedy; then
none of the items is enqueued.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from uuid import UUID

import msgspec

from pgtask._fastpath import NewTask, Outcomes
from pgtask._ids import first_id
from pgtask._json_losses import refuse_numbers
from pgtask._placement import check_delay, check_time, scoped_key
from pgtask._validate import encode_step, envelope_of, name_of
from pgtask.errors import EnqueueError, OutcomeError
from pgtask.outcome import Enqueue
from pgtask.task import Task

__all__ = ["MAX_NEW_BYTES", "MAX_NEW_TASKS", "encode_new_tasks", "encode_result", "refuse_steps", "seconds_until_due"]

MAX_NEW_TASKS = 100_000
"""The new tasks of one outcome."""
MAX_NEW_BYTES = 64 * 1024 * 1024
"""The bytes of all their steps. They are one statement, and stay in memory until it is written."""


def encode_new_tasks(label: str, items: Any, max_step_bytes: int, trace: str | None = None) -> list[NewTask]:
    """Encode the items of an outcome as a client would. `label` is that of the step that has returned them,
    `trace` the context of its span.

    Raises `OutcomeError`, and what the iterable itself raises.
    """
    first = first_id()
    tasks: list[NewTask] = []
    left = MAX_NEW_BYTES
    for number, item in enumerate(_read(label, items)):
        try:
            task = _encode(UUID(int=first + number), item, max_step_bytes)
        except EnqueueError as error:
            raise OutcomeError(f"{label}: item {number + 1} of enqueue= cannot be enqueued: {error}") from None
        left -= len(task.step)
        if left < 0:
            raise OutcomeError(
                f"{label} enqueues more than {MAX_NEW_BYTES} bytes, at item {number + 1}; store the data elsewhere and "
                "enqueue references to it"
            )
        tasks.append(task if trace is None else task._replace(trace=trace))
    return tasks


def refuse_steps(label: str, value: Any) -> None:
    """Raise `OutcomeError` for a result that is a step, or begins with one."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, Task | Enqueue):
        kind = type(value).__name__
        raise OutcomeError(f"{label} returned Done({kind} of steps): to enqueue them write Done(enqueue=[...])")


def encode_result(label: str, value: Any, max_bytes: int) -> str:
    """Encode the result of a member of a group. Raises `OutcomeError` if it is no JSON, or too large; and for steps,
    which the user has meant to enqueue."""
    refuse_steps(label, value)
    try:
        payload = msgspec.json.encode(value)
        refuse_numbers(value, payload)
    except Exception as error:
        raise OutcomeError(
            f"{label}: the value of Done({type(value).__name__}) cannot be stored as JSON: {error}"
        ) from error
    if len(payload) > max_bytes:
        raise OutcomeError(
            f"{label}: the value of Done(...) is {len(payload)} bytes, more than the {max_bytes} allowed"
        )
    return payload.decode()


def _read(label: str, items: Any) -> list[Any]:
    """Read an iterable, no further than the bound."""
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes, dict)):
        hint = f"write enqueue=[{type(items).__name__}(...)]" if isinstance(items, Task | Enqueue) else "give a list"
        raise OutcomeError(f"{label}: enqueue= takes the steps of new tasks, not one {type(items).__name__}; {hint}")
    found = list(islice(items, MAX_NEW_TASKS + 1))
    if len(found) > MAX_NEW_TASKS:
        raise OutcomeError(
            f"{label} enqueues more than {MAX_NEW_TASKS} tasks in one outcome; enqueue some that enqueue the others"
        )
    return found


def _encode(id: UUID, item: Any, max_step_bytes: int) -> NewTask:
    if not isinstance(item, Enqueue):
        codec, payload, lane = encode_step(None, None, max_step_bytes, item)
        return NewTask(codec, id, envelope_of(codec, payload), None, None, *lane, None)
    codec, payload, lane = encode_step(item.queue, item.priority, max_step_bytes, item.step)
    at = None if item.at is None else check_time(item.at)
    delay = None if item.after is None else check_delay(item.after)
    key = None if item.key is None else scoped_key(name_of(item.step), item.key)
    return NewTask(codec, id, envelope_of(codec, payload), at, delay, *lane, key)


def seconds_until_due(outcomes: Outcomes) -> Iterator[float]:
    """Yield for each new task the seconds until it is due, by the clock of this host."""
    now = datetime.now(UTC)
    for tasks in outcomes.new_tasks.values():
        for task in tasks:
            yield (task.delay or 0.0) if task.at is None else (task.at - now).total_seconds()
