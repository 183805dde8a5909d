"""Checks of what a client is given: steps, inputs and signals; and their encoding for a row.

Invariant: a wrong value, and one that no worker could run, raises `EnqueueError`, which names it and the remedy.
Nothing here sends anything.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache, partial
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from pgtask._fastpath import Codec
from pgtask._json_losses import refuse_numbers
from pgtask._placement import (
    KEEP,
    KeyRule,
    Placement,
    check_delay,
    check_due_before,
    check_key,
    check_time,
    choose_lane,
    scoped_key,
)
from pgtask.errors import DecodeError, DefinitionError, EnqueueError
from pgtask.outcome import Enqueue
from pgtask.policy import Policy
from pgtask.task import Task, family_of
from pgtask.task_function import TaskFunction
from pgtask.workflow import Workflow, check_name

__all__ = [
    "ItemEncoder",
    "NewRow",
    "check_delay",
    "check_key",
    "check_task_id",
    "check_time",
    "choose_lane",
    "encode",
    "encode_by",
    "encode_input",
    "encode_signal",
    "encode_step",
    "envelope_of",
    "name_of",
    "place_item",
]

_NEVER = (None, None)  # expires


class NewRow(NamedTuple):
    """A task to insert."""

    codec: Codec
    payload: bytes
    place: Placement

    @property
    def step(self) -> str:
        """The text of its step."""
        return envelope_of(self.codec, self.payload)


def encode_step(
    queue: str | None, priority: int | None, max_bytes: int, step: Task
) -> tuple[Codec, bytes, tuple[str, int]]:
    """Encode a step and choose its lane: its codec, its payload, its queue and priority.

    The step comes last, so that `partial` makes an encoder of many steps.
    """
    codec, payload = encode(step, max_bytes)
    policy = step.policy
    if queue is None and priority is None:
        return codec, payload, (policy.queue, policy.priority)
    return codec, payload, choose_lane(policy, queue, priority)


def place_item(
    queue: str | None,
    priority: int | None,
    expires: tuple[datetime | None, float | None],
    rule: KeyRule,
    max_bytes: int,
    item: Task | Enqueue,
    key: str | None = None,
) -> NewRow:
    """Make the row of a step, or of an item, which says more than the rest of these arguments."""
    at = delay = None
    step: Task = item  # type: ignore[assignment]
    if isinstance(item, Enqueue):
        step, key = item.step, item.key if key is None else key
        queue = queue if item.queue is None else item.queue
        priority = priority if item.priority is None else item.priority
        at = None if item.at is None else check_time(item.at)
        delay = None if item.after is None else check_delay(item.after, "after")
        if expires != _NEVER:
            check_due_before(*expires, at, delay)
    codec, payload, lane = encode_step(queue, priority, max_bytes, step)
    stored = None if key is None else scoped_key(_name_of(codec), key)
    return NewRow(codec, payload, Placement(*lane, at, delay, stored, rule, *expires))


class ItemEncoder:
    """Makes the rows of the steps and items of one call. `plain` encodes a step that needs no more than its lane, at a
    half of the cost; None if all need more."""

    def __init__(
        self,
        queue: str | None,
        priority: int | None,
        expires: tuple[datetime | None, float | None],
        rule: KeyRule,
        max_bytes: int,
    ) -> None:
        self._place = partial(place_item, queue, priority, expires, rule, max_bytes)
        self.plain = partial(encode_step, queue, priority, max_bytes) if (expires, rule) == (_NEVER, KEEP) else None

    def __call__(self, item: Task | Enqueue, key: str | None = None) -> NewRow:
        return self._place(item, key)


def name_of(step: Task) -> str:
    """Return the name of the task of a step, to which its key belongs."""
    return _name_of(_codec(type(step)))


def _name_of(codec: Codec) -> str:
    return codec.label.partition(".")[0]


def encode(step: Task, max_bytes: int) -> tuple[Codec, bytes]:
    """Return the codec of a step and its payload, which a worker will be able to decode."""
    try:
        codec = _codec(type(step))
    except EnqueueError:
        if (remedy := _explain_no_step(step)) is not None:
            raise EnqueueError(remedy) from None
        raise
    return codec, encode_by(codec, step, max_bytes)


def encode_by(codec: Codec, step: Task, max_bytes: int) -> bytes:
    """Return the payload of a step, which a worker will be able to decode."""
    try:
        payload = codec.payload(step)
    except Exception as error:
        raise EnqueueError(f"step {codec.label} cannot be stored as JSON: {error}") from error
    size = len(codec.prefix) + len(payload) + len(b"}}")
    if size > max_bytes:
        raise EnqueueError(
            f"step {codec.label} is {size} bytes, more than the {max_bytes} allowed; "
            "store the data elsewhere and enqueue a reference to it"
        )
    try:
        codec.decode(payload)
    except DecodeError as error:
        raise EnqueueError(f"step {error}, so no worker could run it") from error
    return payload


def _explain_no_step(value: Any) -> str | None:
    """Return what to enqueue in place of a value that is no step, if it is something of ours."""
    if isinstance(value, TaskFunction):
        return f"{value.name} is a task: call it to make a step, {value.name}(...)"
    if isinstance(value, Workflow):
        return f"{value.name} is a workflow, not a step; start a run of it by trigger, or in a workflow by ctx.spawn"
    cls = value if isinstance(value, type) else type(value)
    if not issubclass(cls, Task) or cls is Task:
        return None
    if family_of(cls) is not cls:
        return f"{cls.__name__} is a class: write {cls.__name__}(...)" if cls is value else None
    steps = cls.__subclasses__()
    such = f"such as {steps[0].__name__}(...)" if steps else f"an instance of a class that derives from {cls.__name__}"
    return f"{cls.__name__} is a task, not a step; enqueue one of its steps, {such}"


@cache
def _codec(cls: type[Task]) -> Codec:
    family = family_of(cls) if isinstance(cls, type) and issubclass(cls, Task) else None
    if family is None or family is cls:
        raise EnqueueError(
            f"a value of type {cls.__name__} is not a step; enqueue an instance of a class that derives from a task"
        )
    if not isinstance(cls.policy, Policy):
        raise EnqueueError(
            f"step {cls.__name__}: policy must be a pgtask.Policy, not of type {type(cls.policy).__name__}"
        )
    try:
        return Codec(cls, family.__name__, cls.__name__, cls.transparent)
    except DefinitionError as error:
        raise EnqueueError(str(error)) from None
    except (TypeError, NameError) as error:
        raise EnqueueError(f"step {cls.__name__}: a field has a type that cannot be decoded: {error}") from error


def envelope_of(codec: Codec, payload: bytes) -> str:
    """Return the text of a step for `pg_task.step`."""
    return (codec.prefix + payload + b"}}").decode()


def encode_input(workflow: Workflow[Any, Any], value: object, max_bytes: int) -> str:
    """Encode the input of a run as the text of its step."""
    if not isinstance(workflow, Workflow):
        raise EnqueueError(f"{workflow!r:.80} is not a workflow; decorate its function with @workflow(name)")
    try:
        workflow._check()
        text = workflow._envelope(workflow._encode_input(value))
    except DefinitionError as error:
        raise EnqueueError(str(error)) from error
    except Exception as error:
        raise EnqueueError(f"workflow {workflow.name}: its input cannot be stored as JSON: {error}") from error
    if len(text) > max_bytes:
        raise EnqueueError(
            f"workflow {workflow.name}: its input is {len(text)} bytes, more than the {max_bytes} "
            "allowed; store the data elsewhere and pass a reference to it"
        )
    return text


def encode_signal(name: str, value: object) -> str:
    """Check the name of a signal and encode its value as JSON."""
    check_name("signal", name, EnqueueError)
    try:
        payload = msgspec.json.encode(value)
        refuse_numbers(value, payload)
    except Exception as error:
        raise EnqueueError(f"signal {name}: its value cannot be stored as JSON: {error}") from error
    return payload.decode()


def check_run_id(id: object) -> UUID:
    """Return the id of a run, which may be given as text."""
    return _check_id(id, "run")


def check_task_id(id: object) -> UUID:
    """Return the id of a task, which may be given as text."""
    return _check_id(id, "task")


def _check_id(id: object, what: str) -> UUID:
    try:
        return id if isinstance(id, UUID) else UUID(str(id))
    except ValueError:
        raise EnqueueError(f"{id!r:.80} is not the id of a {what}: give a UUID, or its text") from None
