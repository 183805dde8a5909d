"""The policy of a step: how a worker retries, bounds and routes it.

Invariant: a policy is checked when it is made, so that the engine can trust it.
"""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Literal

import msgspec

from pgtask._backoff import exponential_delay
from pgtask._delays import check_delay
from pgtask._dsn import quoted
from pgtask.batch import Batch
from pgtask.errors import DefinitionError
from pgtask.limits import Limit

__all__ = ["DEFAULT_QUEUE", "Policy", "check_priority", "check_queue"]

DEFAULT_QUEUE = "default"
_MAX_NAME = 255
_MIN_PRIORITY, _MAX_PRIORITY = -32768, 32767


def check_queue(queue: object) -> str:
    """Return `queue` if it can name a queue: 1 to 255 printable characters, no comma. Raises `ValueError`."""
    if not isinstance(queue, str) or not 0 < len(queue) <= _MAX_NAME or not queue.isprintable() or "," in queue:
        raise ValueError(
            f"queue {quoted(queue)} must be a printable string of 1 to {_MAX_NAME} characters without a comma"
        )
    return queue


def check_priority(priority: object) -> int:
    """Return `priority` if it fits the column: a whole number of 16 bits. Raises `ValueError`."""
    if isinstance(priority, bool) or not isinstance(priority, int) or not _MIN_PRIORITY <= priority <= _MAX_PRIORITY:
        raise ValueError(f"priority {priority!r} must be a whole number from {_MIN_PRIORITY} to {_MAX_PRIORITY}")
    return priority


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The policy of a step: its class attribute `policy`, or that of its task for all its steps.

    - `retry_limit`: retries after the first try; `retry_limit=5` means six tries in all, then the task is parked.
    - `retry_delay`: the wait before each retry (`backoff="constant"`), or before the first one, doubled for each
      further one up to `max_delay` (`backoff="exponential"`).
    - `jitter`: the share (0 to 1) of the delay that is drawn at random: 0.25 makes 10 s anything from 7.5 to 12.5 s.
    - `timeout`: the longest time for one try; then the worker cancels it, which counts as a failed try. A `def run`
      cannot be cancelled: its thread is abandoned and its result dropped. A worker waits for a `def run_batch`.
    - `batch`: how many steps a `run_batch` gets at once, and how long they wait for each other.
    - `on_expired`: what becomes of a task whose `expires` has passed before it began: it leaves the table (`"drop"`),
      or is parked.
    - `limit`: a `Limit` that bounds how many such steps run at once, how fast they start, or at what cost, on all
      hosts.
    - `queue`, `priority`: where a task that starts or arrives at this step waits; workers claim a higher priority
      first.

    Raises `DefinitionError` naming the argument.
    """

    retry_limit: int = 0
    retry_delay: timedelta = timedelta(seconds=1)
    backoff: Literal["constant", "exponential"] = "constant"
    max_delay: timedelta = timedelta(hours=1)
    jitter: float = 0.0
    timeout: timedelta | None = None
    batch: Batch | None = None
    limit: Limit | None = None
    on_expired: Literal["drop", "park"] = "drop"
    queue: str = DEFAULT_QUEUE
    priority: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.retry_limit, bool) or not isinstance(self.retry_limit, int) or self.retry_limit < 0:
            raise DefinitionError(f"Policy(retry_limit={self.retry_limit!r}) must be a whole number, 0 or more")
        if not isinstance(self.max_delay, timedelta) or self.max_delay < timedelta(0):
            raise DefinitionError(f"Policy(max_delay={self.max_delay!r}) must be a timedelta, zero or more")
        if self.backoff not in ("constant", "exponential"):
            raise DefinitionError(f'Policy(backoff={self.backoff!r}) must be "constant" or "exponential"')
        if isinstance(self.jitter, bool) or not isinstance(self.jitter, (int, float)) or not 0 <= self.jitter <= 1:
            raise DefinitionError(f"Policy(jitter={self.jitter!r}) must be a number from 0 to 1")
        if self.timeout is not None and (not isinstance(self.timeout, timedelta) or self.timeout <= timedelta(0)):
            raise DefinitionError(f"Policy(timeout={self.timeout!r}) must be a positive timedelta, or None")
        if self.on_expired not in ("drop", "park"):
            raise DefinitionError(f'Policy(on_expired={self.on_expired!r}) must be "drop" or "park"')
        if self.batch is not None and not isinstance(self.batch, Batch):
            raise DefinitionError(f"Policy(batch={self.batch!r}) must be a Batch, as in Batch(256), or None")
        if self.limit is not None and not isinstance(self.limit, Limit):
            raise DefinitionError(
                f'Policy(limit={self.limit!r}) must be a Limit, as in Limit("host", concurrency=2), or None'
            )
        try:
            check_delay(self.retry_delay, "Policy(retry_delay={!r}) must be")
            if self.timeout is not None:
                check_delay(self.timeout, "Policy(timeout={!r}) must be")
        except ValueError as error:
            raise DefinitionError(str(error)) from None
        try:
            check_queue(self.queue)
            check_priority(self.priority)
        except ValueError as error:
            raise DefinitionError(f"Policy: {error}") from None

    def delay_before_retry(self, tried: int) -> float:
        """Return the seconds before the next try after `tried` (1 or more) have failed."""
        delay = self.retry_delay.total_seconds()
        ceiling = float("inf")
        if self.backoff == "exponential":
            ceiling = self.max_delay.total_seconds()
            delay = exponential_delay(delay, ceiling, tried)
        if self.jitter:
            delay *= 1 + self.jitter * (2 * random.random() - 1)
        return min(delay, ceiling)
