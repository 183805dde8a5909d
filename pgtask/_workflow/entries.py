"""The entries of a journal, one class for each statement: its parameters, its answer, and its effect when written.

Invariants: nothing here touches a database, so that a journal in memory serves the same runs. An entry is a value; its
class is all that the writer of a journal knows of its statement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar
from uuid import UUID

import msgspec

from pgtask._fastpath import TaskLease
from pgtask._workflow.columns import checkpoint_columns, sparse, transpose
from pgtask._workflow.entry import LOST, JournalEffects, JournalEntry
from pgtask._workflow.reads import CollectResults, LoadHistory
from pgtask._workflow.values import Checkpoint, ChildRow, SignalResult

__all__ = [
    "LOST",
    "MAX_CHILDREN",
    "STATEMENTS",
    "Adopt",
    "CollectResults",
    "EndRun",
    "JournalEffects",
    "JournalEntry",
    "LeasedEntry",
    "LoadHistory",
    "RecordCheckpoint",
    "SpawnChildren",
    "SpawnTraced",
    "Suspend",
    "TakeSignal",
]

AnswerT = TypeVar("AnswerT")

MAX_CHILDREN = 1000
"""Children that a workflow makes, or waits for, at a time."""


class LeasedEntry(JournalEntry[AnswerT], Generic[AnswerT], frozen=True, eq=False):
    """An entry that is written under the lease of its run, or not at all."""

    is_once_per_run = True
    lease: TaskLease

    @property
    def task_id(self) -> UUID:
        return self.lease.id


class Adopt(LeasedEntry[None], frozen=True, eq=False):
    """Make a record for a live run that has none, or reopen that of an end before the run was revived."""

    statement = "journal/adopt"
    name: str

    @staticmethod
    def parameters(batch: Sequence[Adopt]) -> list[Any]:
        return [*_leases(batch), [entry.name for entry in batch]]

    @staticmethod
    def answers(batch: Sequence[Adopt], rows: list[Any]) -> list[None]:
        return _held(batch, rows[0][0])


class RecordCheckpoint(LeasedEntry[None], frozen=True, eq=False):
    """Record a checkpoint, or complete that of a step that was put off; with `version` if it is the first of a run."""

    statement = "journal/record"
    is_once_per_run = False
    checkpoint: Checkpoint
    version: int | None = None

    @staticmethod
    def total_size(batch: Sequence[RecordCheckpoint]) -> int:
        return sum([len(entry.checkpoint.result or entry.checkpoint.error or "") for entry in batch])

    @staticmethod
    def parameters(batch: Sequence[RecordCheckpoint]) -> list[Any]:
        columns = checkpoint_columns([entry.checkpoint for entry in batch])
        return [*_leases(batch), *columns, sparse([entry.version for entry in batch])]

    @staticmethod
    def answers(batch: Sequence[RecordCheckpoint], rows: list[Any]) -> list[None]:
        return _held(batch, rows[0][0])

    def complete(self, answer: None, effects: JournalEffects) -> None:
        self.lease.clear_claims()


class SpawnChildren(LeasedEntry[None], frozen=True, eq=False):
    """Make children, and record a checkpoint that says so."""

    statement = "journal/spawn"
    max_weight = 2 * MAX_CHILDREN
    checkpoint: Checkpoint
    version: int | None
    children: Sequence[ChildRow]

    @property
    def weight(self) -> int:
        return len(self.children)

    @property
    def size(self) -> int:
        return sum([len(child.step) for child in self.children])

    @staticmethod
    def parameters(batch: Sequence[SpawnChildren]) -> list[Any]:
        columns = transpose([entry.checkpoint for entry in batch])
        versions = sparse([entry.version for entry in batch])
        parents = [entry.lease.id for entry in batch for _ in entry.children]
        children = transpose([child for entry in batch for child in entry.children])
        made = (columns.number, columns.place, columns.name, columns.result)
        return [*_leases(batch), versions, parents, *children, *made]

    @staticmethod
    def answers(batch: Sequence[SpawnChildren], rows: list[Any]) -> list[None]:
        return _held(batch, rows[0][0])

    def complete(self, answer: None, effects: JournalEffects) -> None:
        self.lease.clear_claims()


class SpawnTraced(SpawnChildren, frozen=True, eq=False):
    """Make children that are traced: below the span of the try that makes them."""

    statement = "journal/spawn:traced"
    trace: str

    @staticmethod
    def parameters(batch: Sequence[SpawnTraced]) -> list[Any]:  # type: ignore[override]  # a batch is of one kind
        return [*SpawnChildren.parameters(batch), [entry.trace for entry in batch for _ in entry.children]]


class TakeSignal(LeasedEntry[SignalResult], frozen=True, eq=False):
    """Take the oldest signal that has the name of the checkpoint, if there is one, and record it."""

    statement = "journal/take"
    checkpoint: Checkpoint
    version: int | None = None

    @staticmethod
    def parameters(batch: Sequence[TakeSignal]) -> list[Any]:
        columns = transpose([entry.checkpoint for entry in batch])
        versions = sparse([entry.version for entry in batch])
        return [*_leases(batch), columns.name, columns.number, columns.place, columns.due_at, versions]

    @staticmethod
    def answers(batch: Sequence[TakeSignal], rows: list[Any]) -> list[SignalResult]:
        taken = {run: SignalResult(*rest) for run, *rest in rows}
        return [taken.get(entry.lease.id, LOST) for entry in batch]

    def complete(self, answer: SignalResult, effects: JournalEffects) -> None:
        if answer.is_over:
            self.lease.clear_claims()


class Suspend(LeasedEntry[datetime | None], frozen=True, eq=False):
    """Release a run that waits until something happens. The answer is None, or its wakeup_at if something has.

    The run stays if the wakeup_at of its task is not `seen_at`. `due_at` None means forever; `tried` counts failed
    tries outside of steps. With `children` the run is woken when all of them have ended; with `any_child`, one.
    """

    statement = "journal/suspend"
    max_weight = 2 * MAX_CHILDREN
    releases_lease = True
    seen_at: datetime | None
    due_at: datetime | None
    tried: int
    waits_on: str
    any_child: bool = False
    children: Sequence[UUID] = ()

    @property
    def weight(self) -> int:
        return len(self.children)

    @staticmethod
    def parameters(batch: Sequence[Suspend]) -> list[Any]:
        pairs = [(entry.lease.id, child) for entry in batch for child in sorted(entry.children)]
        return [
            *_leases(batch),
            sparse([entry.seen_at for entry in batch]),
            sparse([entry.due_at for entry in batch]),
            [entry.tried for entry in batch],
            [entry.waits_on for entry in batch],
            [run for run, _ in pairs],
            [child for _, child in pairs],
            [len(entry.children) for entry in batch],
            [entry.any_child for entry in batch],
        ]

    @staticmethod
    def answers(batch: Sequence[Suspend], rows: list[Any]) -> list[datetime | None]:
        decided = {run: None if is_released else wakeup_at for run, is_released, wakeup_at in rows}
        return [decided.get(entry.lease.id, LOST) for entry in batch]

    def complete(self, answer: datetime | None, effects: JournalEffects) -> None:
        if answer is None and self.due_at is not None:
            effects.announce_due(self.due_at)


class EndRun(LeasedEntry[dict[str, int] | None], frozen=True, eq=False):
    """End a run with an output; or with an error, which parks its task after `tried` failed tries.

    `checkpoints` are recorded in the same commit; `forgotten` are the numbers of others to delete. With an output the
    answer counts the signals of each name that the run leaves unread; None if there are none.
    """

    statement = "journal/end"
    max_weight = 2000  # checkpoints
    releases_lease = True
    version: int
    output: str | None = None
    error: str | None = None
    tried: int = 0
    forgotten: Sequence[int] = ()
    checkpoints: Sequence[Checkpoint] = ()

    @property
    def weight(self) -> int:
        return len(self.checkpoints)

    @property
    def size(self) -> int:
        own = len(self.output or "") + len(self.error or "")
        return own + sum([checkpoint.size for checkpoint in self.checkpoints])

    @staticmethod
    def parameters(batch: Sequence[EndRun]) -> list[Any]:
        # `Suspend` locks the records of children in the same order.
        batch = sorted(batch, key=lambda entry: entry.lease.id)
        forgotten = [(entry.lease.id, number) for entry in batch for number in entry.forgotten]
        carried = [checkpoint for entry in batch for checkpoint in entry.checkpoints]
        return [
            *_leases(batch),
            sparse([entry.error for entry in batch]),
            sparse([entry.output for entry in batch]),
            [entry.tried for entry in batch],
            [entry.version for entry in batch],
            [run for run, _ in forgotten],
            [number for _, number in forgotten],
            [entry.lease.id for entry in batch for _ in entry.checkpoints],
            *checkpoint_columns(carried),
        ]

    @staticmethod
    def answers(batch: Sequence[EndRun], rows: list[Any]) -> list[dict[str, int] | None]:
        held, names, _ = rows[0]
        unread = {} if names is None else msgspec.json.decode(names, type=dict[UUID, dict[str, int]])
        answers: list[Any] = _held(batch, held)
        return [
            LOST if answer is LOST else unread.get(UUID(int=entry.lease.id.int)) if unread else None
            for entry, answer in zip(batch, answers, strict=True)
        ]

    def complete(self, answer: dict[str, int] | None, effects: JournalEffects) -> None:
        effects.count_end(self.lease, is_success=self.error is None)


STATEMENTS: tuple[type[JournalEntry[Any]], ...] = (
    LoadHistory,
    CollectResults,
    Adopt,
    RecordCheckpoint,
    SpawnChildren,
    SpawnTraced,
    TakeSignal,
    Suspend,
    EndRun,
)
"""The classes of entries, in the order in which they take turns."""


# --- leases -------------------------------------------------------------------------------------------------------


def _leases(batch: Sequence[LeasedEntry[Any]]) -> tuple[list[UUID], list[UUID]]:
    """The runs and the tokens of their leases."""
    return [entry.lease.id for entry in batch], [entry.lease.token for entry in batch]


def _held(batch: Sequence[LeasedEntry[Any]], held: list[UUID] | None) -> list[Any]:
    """The answers to entries of which nothing but the lease is asked. `held` has the run of each entry that is
    written; None means all.

    Another session may release the row of a run between two entries of that run. Then neither counts as written, since
    the answer does not say which one is."""
    if held is None:
        return [None] * len(batch)
    missing = Counter(entry.lease.id for entry in batch)
    missing.subtract(held)
    return [LOST if missing[entry.lease.id] else None for entry in batch]
