"""The base of the entries of a journal: a request, and its answer, which may come in parts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

import msgspec

from pgtask._fastpath import TaskLease

__all__ = ["LOST", "JournalEffects", "JournalEntry", "PartialAnswer"]

AnswerT = TypeVar("AnswerT")

LOST: Any = object()
"""The answer for an entry that was not written, as its lease was not held or its task was locked."""


class PartialAnswer(NamedTuple):
    """The part of an answer that a statement had room for, and the entry that asks for the rest."""

    found: Any
    rest: JournalEntry[Any]


class JournalEffects(Protocol):
    """The part of a journal that a written entry may change."""

    def learn_time(self, now: datetime) -> None:
        """Set the clock by the time that the statement under way has read in the database."""

    def announce_due(self, due_at: datetime) -> None:
        """Say when a suspended run falls due."""

    def count_end(self, lease: TaskLease, *, is_success: bool) -> None:
        """Count a run that has ended, in the database."""


class JournalEntry(msgspec.Struct, Generic[AnswerT], frozen=True, eq=False):
    """A request to a journal. Entries of one class share a statement, `sql/<statement>.sql`.

    `is_once_per_run`: the statement takes one entry of a run at a time. `max_weight`: the sum of the weights of the
    entries that it takes, unless one alone is heavier. `releases_lease`: once it is written, the run is not held here.
    """

    statement: ClassVar[str]
    is_once_per_run: ClassVar[bool] = False
    max_weight: ClassVar[int | None] = None
    releases_lease: ClassVar[bool] = False

    @property
    def weight(self) -> int:
        """The share of `max_weight` that this entry takes."""
        return 0

    @property
    def size(self) -> int:
        """The characters of the texts that it sends."""
        return 0

    @property
    def task_id(self) -> UUID | None:
        """The task whose row it writes or locks."""
        return None

    @staticmethod
    def total_size(batch: Sequence[Any]) -> int:
        """Return the sum of the sizes of entries of this class."""
        return sum([entry.size for entry in batch])

    @staticmethod
    def parameters(batch: Sequence[Any]) -> list[Any]:
        """Return the parameters of the statement for entries of this class."""
        raise NotImplementedError

    @staticmethod
    def answers(batch: Sequence[Any], rows: list[Any]) -> list[Any]:
        """Return the answer to each entry out of the rows of the statement; `LOST` for those that were not written, and
        a `PartialAnswer` for those of which some is still to be read."""
        raise NotImplementedError

    def complete(self, answer: AnswerT, effects: JournalEffects) -> None:
        """Do what follows from the commit of this entry."""

    @staticmethod
    def join(parts: Sequence[Any]) -> Any:
        """Make one answer of those that came in parts."""
        raise NotImplementedError
