"""The ids of new tasks: UUIDs of version 7, made by the client, and whole ranges of them.

Invariant: the ids of one call are consecutive numbers, so that ten million of them are a range and not a list.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Literal, TypeAlias, overload
from uuid import UUID, SafeUUID

__all__ = ["EnqueueOutcome", "TaskId", "TaskIds", "earliest_id", "first_id", "ids_of_keys"]

EnqueueOutcome: TypeAlias = Literal["new", "behind", "kept", "replaced", "revived"]
"""What became of a step that was enqueued, see `TaskId`."""
_UNKNOWN = SafeUUID.unknown  # an access to it is slow


def first_id() -> int:
    """Make a UUID of version 7 (RFC 9562) as a number; the 2**61 numbers after it are ids of the same call.

    It is ordered by time, so that inserts touch the right end of the primary key only.
    """
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    return (
        (milliseconds & ((1 << 48) - 1)) << 80
        | 0x7 << 76
        | (random >> 64 & 0xFFF) << 64
        | 0b10 << 62
        | random & ((1 << 61) - 1)
    )


def earliest_id(at: datetime) -> UUID:
    """Return the lower bound of all ids of version 7 that are made at this time or later."""
    return UUID(int=max(0, int(at.timestamp() * 1000)) << 80)


class TaskId(UUID):
    """The id of a task, as the methods that enqueue return it. `outcome` says what became of your step:

    - `"new"`: this task is new.
    - `"behind"`: this task is new, and waits behind the one that has the key.
    - `"kept"`: another task has the key, and this is its id. Your step was dropped.
    - `"replaced"`: another task has the key, and this is its id. It has your step now.
    - `"revived"`: another task had the key, and was parked. This is its id. It is due again, at its own step.
    """

    __slots__ = ("outcome",)

    outcome: EnqueueOutcome

    def __init__(self, number: int, outcome: EnqueueOutcome) -> None:
        set_field = object.__setattr__  # what UUID checks first takes longer than the rest of its making
        set_field(self, "int", number)
        set_field(self, "is_safe", _UNKNOWN)
        set_field(self, "outcome", outcome)

    @property
    def is_new(self) -> bool:
        """False if another task had the key, and this is its id."""
        return self.outcome in ("new", "behind")

    def __reduce__(self) -> tuple[object, ...]:
        return UUID, (str(self),)


def ids_of_keys(found: Mapping[str, TaskId], keys: Iterable[str]) -> list[TaskId]:
    """Return the ids of the tasks of one call by their keys. Of those with one key, the first is new at most."""
    new = dict(found)
    ids = []
    for key in keys:
        if (id := new.pop(key, None)) is None:
            id = TaskId(found[key].int, "kept")
        ids.append(id)
    return ids


class TaskIds(Sequence[UUID]):
    """The ids of one `enqueue_many`, in order: consecutive numbers, so that ten million of them take no memory."""

    def __init__(self, first: UUID, count: int) -> None:
        self._first = first.int
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> UUID: ...
    @overload
    def __getitem__(self, index: slice) -> list[UUID]: ...
    def __getitem__(self, index: int | slice) -> UUID | list[UUID]:
        if isinstance(index, slice):
            return [UUID(int=self._first + at) for at in range(*index.indices(self._count))]
        return UUID(int=self._first + range(self._count)[index])

    def __contains__(self, value: object) -> bool:
        return isinstance(value, UUID) and 0 <= value.int - self._first < self._count

    def __repr__(self) -> str:
        return f"<TaskIds {self._count}>"
