"""The rules of what a caller says about a new task beside its step: its lane, its key, and when it is due.

Invariant: a wrong value raises `EnqueueError`, which names it and the remedy.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pgtask import _delays
from pgtask.errors import EnqueueError
from pgtask.policy import Policy, check_priority, check_queue

__all__ = ["check_delay", "check_key", "check_one_time", "check_time", "choose_lane"]

MAX_KEY_CHARACTERS = 512


def choose_lane(policy: Policy, queue: str | None, priority: int | None, *, what: str = "") -> tuple[str, int]:
    """Return the queue and the priority that the caller gives, or those of the policy. `what` begins the error."""
    try:
        return (
            policy.queue if queue is None else check_queue(queue),
            policy.priority if priority is None else check_priority(priority),
        )
    except ValueError as error:
        raise EnqueueError(f"{what}{error}") from None


def check_key(key: object) -> str:
    """Return `key` if it can be one: 1 to 512 characters without NUL."""
    try:
        if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY_CHARACTERS or "\0" in key:
            raise ValueError
        key.encode()  # a lone surrogate cannot be
    except ValueError:
        raise EnqueueError(f"key {key!r:.80} must be 1 to {MAX_KEY_CHARACTERS} characters without NUL") from None
    return key


def check_one_time(after: object, at: object) -> None:
    """Raise `EnqueueError` if there are both a delay and a time."""
    if after is not None and at is not None:
        raise EnqueueError("give either after= or at=, not both")


def check_delay(delay: object) -> float:
    """Return a delay in seconds."""
    try:
        return _delays.check_delay(delay).total_seconds()
    except ValueError as error:
        raise EnqueueError(str(error)) from None


def check_time(at: object) -> datetime:
    """Return an aware time in UTC."""
    if not isinstance(at, datetime):
        raise EnqueueError(f"at={at!r} must be a datetime")
    if at.tzinfo is None or at.utcoffset() is None:
        raise EnqueueError(f"at={at!r} has no time zone; use datetime.now(timezone.utc) or .replace(tzinfo=...)")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise EnqueueError(f"at={at!r} is out of the range of times") from None
