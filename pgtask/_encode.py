"""From a step in user code to what an enqueue sends, refusing what no worker could run.

Invariant: everything here raises `EnqueueError`, naming the thing and the remedy, and sends nothing.
"""

from __future__ import annotations

from functools import cache

from pgtask._fastpath import Codec
from pgtask.errors import DecodeError, EnqueueError
from pgtask.policy import check_priority, check_queue
from pgtask.task import Task, family_of

__all__ = ["check_key", "encode", "lane_of"]

MOST_KEY_CHARACTERS = 512


def encode(step: Task, most_bytes: int) -> tuple[Codec, bytes]:
    """The codec of a step and its payload, as some worker will be able to decode it."""
    codec = _codec(type(step))
    try:
        payload = codec.payload(step)
    except Exception as error:
        raise EnqueueError(f"step {codec.label} cannot be stored as JSON: {error}") from error
    if len(payload) > most_bytes:
        raise EnqueueError(
            f"step {codec.label} is {len(payload)} bytes, more than the {most_bytes} allowed; "
            "store the data elsewhere and enqueue a reference to it"
        )
    try:
        codec.decode(payload)
    except DecodeError as error:
        raise EnqueueError(f"step {error}, so no worker could run it") from error
    return codec, payload


@cache
def _codec(cls: type[Task]) -> Codec:
    family = family_of(cls) if isinstance(cls, type) and issubclass(cls, Task) else None
    if family is None or family is cls:
        raise EnqueueError(f"a {cls.__name__} is not a step; enqueue an instance of a class that derives from a task")
    return Codec(cls, family.__name__, cls.__name__, cls.transparent)


def lane_of(step: Task, queue: str | None, priority: int | None) -> tuple[str, int]:
    """Queue and priority: what the caller says, else the policy of the step."""
    policy = step.policy
    try:
        return (
            policy.queue if queue is None else check_queue(queue),
            policy.priority if priority is None else check_priority(priority),
        )
    except ValueError as error:
        raise EnqueueError(str(error)) from None


def check_key(key: object) -> str:
    """Return `key` if it can be one: 1 to 512 characters without NUL."""
    if not isinstance(key, str) or not key or len(key) > MOST_KEY_CHARACTERS or "\0" in key:
        raise EnqueueError(f"key {key!r:.80} must be a string of 1 to {MOST_KEY_CHARACTERS} characters without NUL")
    return key
