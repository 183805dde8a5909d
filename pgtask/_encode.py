"""From a step in user code to what an enqueue sends, refusing what no worker could run.

Invariant: what is wrong raises `EnqueueError`, naming the thing and the remedy; nothing here sends anything.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache

from pgtask._fastpath import Codec
from pgtask.errors import DecodeError, DefinitionError, EnqueueError
from pgtask.policy import Policy, check_priority, check_queue
from pgtask.task import Task, family_of

__all__ = ["check_delay", "check_key", "check_time", "encode", "lane_of"]

MOST_KEY_CHARACTERS = 512
LONGEST_DELAY = timedelta(days=365_000)


def encode(step: Task, most_bytes: int) -> tuple[Codec, bytes]:
    """The codec of a step and its payload, as some worker will be able to decode it."""
    try:
        codec = _codec(type(step))
    except EnqueueError:
        if isinstance(step, type):
            raise EnqueueError(f"{step.__name__} is a class: write {step.__name__}(...)") from None
        raise
    try:
        payload = codec.payload(step)
    except Exception as error:
        raise EnqueueError(f"step {codec.label} cannot be stored as JSON: {error}") from error
    size = len(codec.prefix) + len(payload) + len(b"}}")
    if size > most_bytes:
        raise EnqueueError(
            f"step {codec.label} is {size} bytes, more than the {most_bytes} allowed; "
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
    try:
        if not isinstance(key, str) or not 0 < len(key) <= MOST_KEY_CHARACTERS or "\0" in key:
            raise ValueError
        key.encode()  # a lone surrogate cannot be
    except ValueError:
        raise EnqueueError(f"key {key!r:.80} must be 1 to {MOST_KEY_CHARACTERS} characters without NUL") from None
    return key


def check_delay(delay: object) -> float:
    """A delay in seconds."""
    if not isinstance(delay, timedelta) or not timedelta(0) <= delay <= LONGEST_DELAY:
        raise EnqueueError(f"delay {delay!r} must be a timedelta, zero or more, at most {LONGEST_DELAY.days} days")
    return delay.total_seconds()


def check_time(at: object) -> datetime:
    """An aware time, in UTC."""
    if not isinstance(at, datetime):
        raise EnqueueError(f"at={at!r} must be a datetime")
    if at.tzinfo is None or at.utcoffset() is None:
        raise EnqueueError(f"at={at!r} has no time zone; use datetime.now(timezone.utc) or .replace(tzinfo=...)")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise EnqueueError(f"at={at!r} is out of the range of times") from None
