"""The data of a Django task in its row: the arguments of the call, how its earlier calls have failed, and in the
archive its value. The name of its step is the path of the function.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

__all__ = ["DEFAULT_QUEUE", "FAMILY", "Failure", "Invocation", "Returned"]

FAMILY = "DjangoTask"
"""The name of the task of all functions, in the rows."""
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
    """The arguments of a function of the project, and the other attributes of the task that was enqueued."""

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    backend: str = "default"
    queue: str = DEFAULT_QUEUE
    priority: int = 0
    run_after: datetime | None = None
    failures: list[Failure] = []
    path: str | None = None
    """Of the function, in rows of a pgtask that did not name the step by it."""

    def failed_with(self, failure: Failure) -> Invocation:
        """Return the same invocation with one more failure."""
        failures = [*self.failures, failure]
        if len(failures) > MAX_FAILURES:
            del failures[1]
        return msgspec.structs.replace(self, failures=failures)


class Returned(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that has returned, as the archive keeps it."""

    call: Invocation
    worker: str
    started_at: datetime
    finished_at: datetime
    value: Any = None
