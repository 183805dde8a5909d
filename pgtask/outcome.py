"""What a step says when it is finished: the only way for user code to change its row.

Invariant: an outcome is an immutable value; writing it is the engine's work.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Generic, TypeVar

import msgspec

from pgtask.errors import OutcomeError

__all__ = ["Done", "Fail", "Next", "Outcome"]

StepT_co = TypeVar("StepT_co", covariant=True)


class Next(msgspec.Struct, Generic[StepT_co], frozen=True):
    """The task goes on with `step`: now, or not before `after` has passed (by the database's clock).

    The next step is durable before it starts. `tried` is reset.

    Raises `OutcomeError` if `after` is negative or no timedelta.
    """

    step: StepT_co
    after: timedelta | None = None

    def __post_init__(self) -> None:
        if self.after is not None and (not isinstance(self.after, timedelta) or self.after < timedelta(0)):
            raise OutcomeError(f"Next(after={self.after!r}): use a timedelta, zero or more")


class Done(msgspec.Struct, frozen=True):
    """The task is finished; its row leaves the table."""


class Fail(msgspec.Struct, frozen=True):
    """Park the task at once, without the retries of its policy, with `reason` as its error."""

    reason: str


Outcome = Next[StepT_co] | Done | Fail
