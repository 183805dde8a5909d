"""The outcomes of a step: the only way for user code to change the row of its task.

Invariants: an outcome is an immutable value, and the engine writes it; `Outcome` is the only list of outcomes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin

import msgspec

from pgtask import _delays
from pgtask._placement import check_delay, check_key, check_one_time, check_time, choose_lane
from pgtask.errors import EnqueueError, OutcomeError
from pgtask.policy import Policy
from pgtask.task import Task

__all__ = ["Done", "Enqueue", "Fail", "Next", "Outcome"]

StepT_co = TypeVar("StepT_co", covariant=True)

NO_TASKS: tuple[()] = ()
"""The new tasks of an outcome that has none. The engine compares by identity, which costs next to nothing."""


_ANY_POLICY = Policy()


class _NotOfItems(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of the methods of `Client` that an item has not: they are fields for the sake of their error."""

    on_conflict: None = None
    on_parked: None = None
    debounce: None = None
    ceiling: None = None
    expires: None = None

    def refuse(self) -> NoReturn:
        name = next(name for name in _NotOfItems.__struct_fields__ if getattr(self, name) is not None)
        raise EnqueueError(
            f"Enqueue({name}=...): an item has no {name}, the methods of Client have: await "
            f"ctx.client.enqueue(step, {name}=...)"
        )


class Enqueue(_NotOfItems, frozen=True, repr_omit_defaults=True):
    """A new task in an outcome, with more to say than its step:

        return Done(enqueue=[Enqueue(Fetch(url), after=timedelta(minutes=5), key=url)])

    - `after` or `at`: when the task is due, by the database's clock; by default at once.
    - `queue`, `priority`: by default those of the policy of the step.
    - `key`: at most one task of its name with this key is in the table, waiting, running or parked. If there is one,
      this new task is not inserted. The rules that change the other task (`on_conflict`, `on_parked`, `debounce`) and
      `expires` are arguments of the methods of `Client`; an item has none of its own.

    Raises `EnqueueError` as the methods of `Client` do.
    """

    step: Task
    after: timedelta | None = None
    at: datetime | None = None
    queue: str | None = None
    priority: int | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if not (self.on_conflict is self.on_parked is self.debounce is self.ceiling is self.expires is None):
            self.refuse()
        check_one_time(self.after, self.at)
        if self.after is not None:
            check_delay(self.after, "after")
        if self.at is not None:
            check_time(self.at)
        choose_lane(_ANY_POLICY, self.queue, self.priority)
        if self.key is not None:
            check_key(self.key)


class Next(msgspec.Struct, Generic[StepT_co], frozen=True, repr_omit_defaults=True):
    """Continue the task with `step`: now, or once `after` has passed (by the database's clock).

    The next step is durable before it starts, and begins with no failed tries. `enqueue`: new tasks, as in `Done`.

    Raises `OutcomeError` if `after` is negative, no timedelta, or longer than 365,000 days.
    """

    step: StepT_co
    after: timedelta | None = None
    enqueue: Iterable[Task | Enqueue] = NO_TASKS

    def __post_init__(self) -> None:
        if self.after is not None:
            try:
                _delays.check_delay(self.after, "Next(after={!r}): use")
            except ValueError as error:
                raise OutcomeError(str(error)) from None


class _Result(msgspec.Struct, frozen=True):
    """The part of `Done` that is given by its place."""

    value: Any = None


class Done(_Result, frozen=True, kw_only=True, repr_omit_defaults=True):
    """Finish the task; its row leaves the table.

    `value`: the result of the task, which is kept as JSON if the task is a member of a group with `results=True`, and
    dropped otherwise. None is no result.

    `enqueue`: the steps of new tasks, of any family, or `Enqueue(...)`, 100,000 at most. The statement that writes the
    outcome inserts them: all of them exactly once; or, if the outcome is not written, none. The worker reads an
    iterable once, when the step has returned.
    """

    enqueue: Iterable[Task | Enqueue] = NO_TASKS


class Fail(msgspec.Struct, frozen=True):
    """Park the task at once, without the retries of its policy, with `reason` as its error."""

    reason: str


Outcome = Next[StepT_co] | Done | Fail
"""The return type of a step: `-> Outcome[Store]` is short for `-> Next[Store] | Done | Fail`."""

with suppress(AttributeError):  # Python 3.14: a union cannot have a docstring of its own
    Outcome.__doc__ = "The return type of a step: `-> Outcome[Store]` is short for `-> Next[Store] | Done | Fail`."

OUTCOMES: tuple[type[Any], ...] = tuple(get_origin(outcome) or outcome for outcome in get_args(Outcome))
"""The classes of outcomes."""

_CALLS = [
    f"{cls.__name__}({'...' if len(cls.__struct_fields__) > len(cls.__struct_defaults__) else ''})" for cls in OUTCOMES
]
USAGE = f"{', '.join(_CALLS[:-1])} or {_CALLS[-1]}"
"""The outcomes as error messages name them: `Next(...), Done() or Fail(...)`."""
