"""The rules of what a caller says about a new task beside its step: its lane, its key, and its times.

Invariant: a wrong value raises `EnqueueError`, which names it and the remedy.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias, get_args

import msgspec

from pgtask import _delays
from pgtask.errors import EnqueueError
from pgtask.policy import Policy, check_priority, check_queue

__all__ = [
    "KEEP",
    "KeyRule",
    "OnConflict",
    "OnParked",
    "Placement",
    "check_delay",
    "check_due_before",
    "check_expires",
    "check_key",
    "check_one_time",
    "check_time",
    "choose_lane",
    "make_key_rule",
    "scoped_key",
    "shown_key",
]

MAX_KEY_CHARACTERS = 512
MAX_KEY_BYTES = 2600
_NAME = re.compile(r'\s*\{\s*("(?:[^"\\]|\\.)*")\s*:')  # of the task or workflow of a step, of which the end may be cut

OnConflict: TypeAlias = Literal["keep", "replace", "after"]
OnParked: TypeAlias = Literal["keep", "revive", "replace"]


class KeyRule(NamedTuple):
    """What to do if another task has the key of a new one, see `Client`. Debounce and ceiling are seconds."""

    on_conflict: OnConflict = "keep"
    on_parked: OnParked = "keep"
    debounce: float | None = None
    ceiling: float | None = None


KEEP = KeyRule()
"""The other task stays as it is."""


class Placement(NamedTuple):
    """All that a caller says about a new task beside its step. `key` is that of the column `pg_task.key`. Without `at`
    it is due after `delay` seconds; without both, now. `expires_in` are seconds."""

    queue: str
    priority: int
    at: datetime | None = None
    delay: float | None = None
    key: str | None = None
    rule: KeyRule = KEEP
    expires_at: datetime | None = None
    expires_in: float | None = None


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
    if not isinstance(key, str):
        raise EnqueueError(f"key={key!r:.80} must be a string, not of type {type(key).__name__}; give it as text")
    try:
        if not 0 < len(key) <= MAX_KEY_CHARACTERS or "\0" in key:
            raise ValueError
        key.isascii() or key.encode()  # a lone surrogate cannot be
    except ValueError:
        raise EnqueueError(f"key {key!r:.80} must be 1 to {MAX_KEY_CHARACTERS} characters without NUL") from None
    return key


def scoped_key(name: str, key: object) -> str:
    """Return a key as the column has it: that of one task or workflow. Two names never share one."""
    stored = f"{_escape(name)}/{check_key(key)}"
    if len(stored) > MAX_KEY_BYTES // 4 and len(stored.encode()) > MAX_KEY_BYTES:
        raise EnqueueError(
            f"key {key!r:.80} has {len(stored.encode())} bytes with the name {name!r:.80} before it, more than the "
            f"{MAX_KEY_BYTES} that an index can hold"
        )
    return stored


def shown_key(step: str, key: str | None) -> str | None:
    """Return the key that the caller gave, from the columns `step` and `key`."""
    if key is None:
        return None
    if (found := _NAME.match(step)) is None:  # parked, for it cannot be read
        return key
    with suppress(ValueError):
        name = msgspec.json.decode(found[1], type=str)
        return key.removeprefix("/").removeprefix(f"{_escape(name)}/")
    return key


@lru_cache
def _escape(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


def make_key_rule(key: object, on_conflict: object, on_parked: object, debounce: object, ceiling: object) -> KeyRule:
    """Return the rule that these arguments make."""
    for name, value, choices in (
        ("on_conflict", on_conflict, get_args(OnConflict)),
        ("on_parked", on_parked, get_args(OnParked)),
    ):
        if value not in choices:
            raise EnqueueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
    if ceiling is not None and debounce is None:
        raise EnqueueError("ceiling= bounds a debounce: give debounce= as well")
    rule = KeyRule(
        on_conflict,  # type: ignore[arg-type]
        on_parked,  # type: ignore[arg-type]
        None if debounce is None else check_delay(debounce, "debounce"),
        None if ceiling is None else check_delay(ceiling, "ceiling"),
    )
    if key is None and rule != KEEP:
        raise EnqueueError(
            "on_conflict, on_parked and debounce are about another task with the same key: give key= as well"
        )
    if rule.debounce is not None and rule.ceiling is not None and rule.ceiling < rule.debounce:
        raise EnqueueError(f"ceiling={ceiling} must not be shorter than debounce={debounce}")
    return rule


def check_expires(
    expires: object, at: datetime | None = None, delay: float | None = None
) -> tuple[datetime | None, float | None]:
    """Return the time at which a task expires, or the seconds until then, or neither. It is due `at` a time, or after a
    `delay`."""
    if expires is None:
        return None, None
    if isinstance(expires, timedelta):
        if expires < timedelta(0):
            raise EnqueueError(f"expires={expires} is in the past")
        seconds = check_delay(expires, "expires")
        check_due_before(None, seconds, at, delay)
        return None, seconds
    if not isinstance(expires, datetime):
        raise EnqueueError(f"expires={expires!r:.80} must be a timedelta or a datetime")
    time = check_time(expires, "expires")
    check_due_before(time, None, at, delay)
    return time, None


def check_due_before(
    expires_at: datetime | None, expires_in: float | None, at: datetime | None, delay: float | None
) -> None:
    """Raise `EnqueueError` if a task that is due `at` a time, or after a `delay`, has expired by then."""
    wrong: object = None
    if expires_in is not None and delay is not None and expires_in < delay:
        wrong = timedelta(seconds=expires_in)
    elif expires_at is not None and at is not None and expires_at < at:
        wrong = expires_at
    if wrong is not None:
        raise EnqueueError(f"expires={wrong} is before the task is due, so it would never start")


def check_one_time(after: object, at: object) -> None:
    """Raise `EnqueueError` if there are both a delay and a time."""
    if after is not None and at is not None:
        raise EnqueueError("give either after= or at=, not both")


def check_delay(delay: object, name: str | None = None) -> float:
    """Return a delay in seconds. `name` is that of the argument, if it is not `delay`."""
    what = "delay {!r:.80} must be" if name is None else name + "={!r:.80} must be"
    try:
        return _delays.check_delay(delay, what).total_seconds()
    except ValueError as error:
        raise EnqueueError(str(error)) from None


def check_time(at: object, name: str = "at") -> datetime:
    """Return an aware time in UTC. `name` is that of the argument."""
    if not isinstance(at, datetime):
        raise EnqueueError(f"{name}={at!r:.80} must be a datetime")
    if at.tzinfo is None or at.utcoffset() is None:
        raise EnqueueError(f"{name}={at!r} has no time zone; use datetime.now(timezone.utc) or .replace(tzinfo=...)")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise EnqueueError(f"{name}={at!r} is out of the range of times") from None
