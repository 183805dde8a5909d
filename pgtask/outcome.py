"""The outcomes of a step: the only way for user code to change the row of its task.

Invariants: an outcome is an immutable value, and the engine writes it; `Outcome` is the only list of outcomes.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any, Generic, TypeVar, get_args, get_origin

import msgspec

from pgtask._delays import check_delay
from pgtask.errors import OutcomeError

__all__ = ["Done", "Fail", "Next", "Outcome"]

StepT_co = TypeVar("StepT_co", covariant=True)


class Next(msgspec.Struct, Generic[StepT_co], frozen=True):
    """Continue the task with `step`: now, or once `after` has passed (by the database's clock).

    The next step is durable before it starts, and begins with no failed tries.

    Raises `OutcomeError` if `after` is negative, no timedelta, or longer than 365,000 days.
    """

    step: StepT_co
    after: timedelta | None = None

    def __post_init__(self) -> None:
        if self.after is not None:
            try:
                check_delay(self.after, "Next(after={!r}): use")
            except ValueError as error:
                raise OutcomeError(str(error)) from None


class Done(msgspec.Struct, frozen=True):
    """Finish the task; its row leaves the table."""


class Fail(msgspec.Struct, frozen=True):
    """Park the task at once, without the retries of its policy, with `reason` as its error."""

    reason: str


Outcome = Next[StepT_co] | Done | Fail
"""The return type of a step: `-> Outcome[Store]` is short for `-> Next[Store] | Done | Fail`."""

with suppress(AttributeError):  # Python 3.14: a union cannot have a docstring of its own
    Outcome.__doc__ = "The return type of a step: `-> Outcome[Store]` is short for `-> Next[Store] | Done | Fail`."

OUTCOMES: tuple[type[Any], ...] = tuple(get_origin(outcome) or outcome for outcome in get_args(Outcome))
"""The classes of outcomes."""

_CALLS = [f"{cls.__name__}({'...' if cls.__struct_fields__ else ''})" for cls in OUTCOMES]
USAGE = f"{', '.join(_CALLS[:-1])} or {_CALLS[-1]}"
"""The outcomes as error messages name them: `Next(...), Done() or Fail(...)`."""
