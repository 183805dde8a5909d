"""The batches in which a worker runs steps that have a `run_batch`.

Invariant: a batch is checked when it is made, so that the engine can trust it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec

from pgtask._delays import check_delay
from pgtask.errors import DefinitionError

__all__ = ["MAX_SIZE", "Batch"]

MAX_SIZE = 10_000
"""Steps in one batch, at most."""


class Batch(msgspec.Struct, frozen=True):
    """The batches of a step with `run_batch`: `Policy(batch=Batch(256, linger=timedelta(milliseconds=50)))`.

    - `size`: steps in one call at most, 10,000 or less.
    - `linger`: how long the first step of a batch may wait for others, from when the worker has it. Zero takes those
      that are there. A full batch, a stop and the end of a burst do not wait for it. Steps that wait hold their leases,
      and no slot of `--concurrency`; a batch that runs takes one slot.
    - `by`: the name of a field or property, or a function of the step. Only steps with equal values share a call; a
      value has to be hashable.
    - `weight`, `max_weight`: the name of a field or property, or a function of the step, that returns a number of zero
      or more; the sum of a call is `max_weight` at most. A step that is heavier has a call of its own.

    Raises `DefinitionError` naming the argument.
    """

    size: int
    linger: timedelta = timedelta(0)
    by: str | Callable[[Any], Any] | None = None
    weight: str | Callable[[Any], float] | None = None
    max_weight: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= MAX_SIZE:
            raise DefinitionError(f"Batch(size={self.size!r}) must be a whole number from 1 to {MAX_SIZE:,}")
        try:
            check_delay(self.linger, "Batch(linger={!r}) must be")
        except ValueError as error:
            raise DefinitionError(str(error)) from None
        for name, value in (("by", self.by), ("weight", self.weight)):
            if value is not None and not isinstance(value, str) and not callable(value):
                raise DefinitionError(
                    f"Batch({name}={value!r}) must be the name of a field or property, or a function of the step"
                )
        if (self.weight is None) != (self.max_weight is None):
            there, lacking = ("weight", "max_weight") if self.max_weight is None else ("max_weight", "weight")
            raise DefinitionError(f"Batch({there}=...) does nothing without {lacking}=; give both, or none")
        if self.max_weight is not None and not _is_positive(self.max_weight):
            raise DefinitionError(f"Batch(max_weight={self.max_weight!r}) must be a number greater than 0")


def _is_positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value) and value > 0
