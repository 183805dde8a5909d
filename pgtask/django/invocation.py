"""The data of a Django task in its row: which function is called with what, and how its earlier calls have failed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

__all__ = ["DEFAULT_QUEUE", "Failure", "Invocation"]

DEFAULT_QUEUE = "default"
MAX_FAILURES = 10  # of one task, that its row keeps: the first one, and the latest


class Failure(msgspec.Struct, frozen=True):
    """A call that has failed: where, when, and the error as `TaskError` has it."""

    worker: str
    started_at: datetime
    finished_at: datetime
    exception: str
    traceback: str


class Invocation(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function of the project by its path, its arguments, and the other attributes of the task that was enqueued."""

    path: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    backend: str = "default"
    queue: str = DEFAULT_QUEUE
    priority: int = 0
    run_after: datetime | None = None
    failures: list[Failure] = []

    def failed_with(self, failure: Failure) -> Invocation:
        """Return the same invocation with one more failure."""
        failures = [*self.failures, failure]
        if len(failures) > MAX_FAILURES:
            del failures[1]
        return msgspec.structs.replace(self, failures=failures)
