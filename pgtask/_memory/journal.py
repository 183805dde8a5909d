"""The journal of runs in memory, for the worker's own `RunExecutor`.

Invariant: each method does to `Records` what the statement of its entries in `sql/journal` does: under the lease of the
run, or not at all, and then `RunStopped`. The answer comes in a later turn of the loop, as that of a database does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from pgtask._fastpath import Leases, TaskLease
from pgtask._memory.records import Record, Records
from pgtask._memory.rows import FOREVER, MemoryTask
from pgtask._workflow.entries import (
    Adopt,
    CollectResults,
    EndRun,
    JournalEntry,
    LeasedEntry,
    LoadHistory,
    RecordCheckpoint,
    SpawnChildren,
    SpawnTraced,
    Suspend,
    TakeSignal,
)
from pgtask._workflow.journal import Journal
from pgtask._workflow.values import Checkpoint, History, RunResult, SignalResult
from pgtask.errors import RunStopped

__all__ = ["MemoryJournal"]


AnswerT = TypeVar("AnswerT")


class MemoryJournal(Journal):
    """The journal of one worker in memory. It loses the entries of `crashed` runs, under which the worker has died."""

    def __init__(self, records: Records, leases: Leases, crashed: set[UUID]) -> None:
        self._records = records
        self._rows = records.rows
        self._leases = leases
        self._crashed = crashed
        self._loop = asyncio.get_running_loop()
        self.recorded: set[UUID] = set()
        """Runs that have recorded something since they were loaded."""
        self._methods: dict[type[JournalEntry[Any]], Callable[[Any], Any]] = {
            LoadHistory: self._load,
            CollectResults: self._collect,
            Adopt: self._adopt,
            RecordCheckpoint: self._record,
            SpawnChildren: self._spawn,
            SpawnTraced: self._spawn,
            TakeSignal: self._take,
            Suspend: self._suspend,
            EndRun: self._end,
        }

    def now(self) -> datetime:
        return self._rows.now

    def submit(self, entry: JournalEntry[AnswerT]) -> asyncio.Future[AnswerT]:
        if isinstance(entry, LeasedEntry) and not self._holds(entry.lease):
            return self._answer_later(RunStopped("the lease of the run was lost"))
        return self._answer_later(self._methods[type(entry)](entry))

    # --- one method for each class of entries

    def _load(self, entry: LoadHistory) -> History:
        run, now = entry.run, self._rows.now
        self.recorded.discard(run)
        task, record = self._rows.tasks[run], self._records.runs.get(run)
        wakeup_at = task.due_at if task.is_live else None
        if record is None:
            return History(wakeup_at, False, None, None, [], now)
        if task.state == "leased":
            record.paused_until = None  # this clock stands still: a retry may fall due at the very time of a pause
        return History(wakeup_at, True, record.version, record.state, list(record.checkpoints.values()), now)

    def _collect(self, entry: CollectResults) -> dict[UUID, RunResult]:
        found = [self._records.runs[run] for run in entry.runs]
        return {one.id: RunResult(one.state, one.output, one.error) for one in found if one.state is not None}

    def _adopt(self, entry: Adopt) -> None:
        record = self._records.adopt(self._rows.tasks[entry.lease.id], entry.name)
        if record.state == "ERROR":
            record.state = record.error = record.ended_at = None

    def _record(self, entry: RecordCheckpoint) -> None:
        self._add_checkpoint(entry, self._begun_record(entry), entry.checkpoint)

    def _spawn(self, entry: SpawnChildren) -> None:
        self._add_checkpoint(entry, self._begun_record(entry), entry.checkpoint)
        now = self._rows.now
        for id, name, step, queue, priority in entry.children:
            if id in self._records.runs:
                continue
            task = MemoryTask(
                id=id, raw=step, queue=queue, priority=priority, key=None, due_at=now, created_at=now, tries=[]
            )
            self._records.add(task, name, entry.lease.id)

    def _take(self, entry: TakeSignal) -> SignalResult:
        record, checkpoint = self._begun_record(entry), entry.checkpoint
        wakeup_at = self._rows.tasks[record.id].due_at
        old = record.checkpoints.get(checkpoint.number)
        if old is not None and old.is_complete:
            return SignalResult(old.result, old.error, old.due_at, wakeup_at)
        due_at = checkpoint.due_at if old is None else old.due_at
        at = next((at for at, signal in enumerate(record.signals) if signal[0] == checkpoint.name), None)
        result = None if at is None else record.signals.pop(at)[1]
        is_late = result is None and due_at is not None and due_at <= self._rows.now
        error = "the time for it was over" if is_late else None
        if result is not None or error is not None:
            self._add_checkpoint(entry, record, checkpoint._replace(result=result, error=error, due_at=due_at))
        elif old is None and due_at is not None:
            self._put_checkpoint(record, checkpoint)
        return SignalResult(result, error, due_at, wakeup_at)

    def _suspend(self, entry: Suspend) -> datetime | None:
        run, children = entry.lease.id, entry.children
        task, record = self._rows.tasks[run], self._records.runs[run]
        remaining = [child for child in (self._records.runs[id] for id in children) if child.state is None]
        for child in remaining:
            child.awaited = True
        least = len(children) if entry.any_child else min(1, len(children))
        if task.due_at != entry.seen_at or len(remaining) < least:
            return task.due_at
        task.state, task.tried, task.claims = "waiting", entry.tried, 0
        task.due_at = FOREVER if entry.due_at is None else entry.due_at
        record.waits_on, record.paused_until = entry.waits_on, task.due_at
        record.waits_for = min(1, len(remaining)) if entry.any_child else len(remaining)
        return None

    def _end(self, entry: EndRun) -> dict[str, int] | None:
        run, error = entry.lease.id, entry.error
        task, record = self._rows.tasks[run], self._records.runs[run]
        if error is None:
            task.state, record.step = "done", task.raw
        else:
            task.state, task.error, task.tried, task.claims = "parked", error, entry.tried, 0
            task.due_at = self._rows.now
            self._rows.announce_parked(task)
        if entry.checkpoints and record.version is None:
            record.started_at = self._rows.now
        for checkpoint in entry.checkpoints:
            self._put_checkpoint(record, checkpoint)
        for number in entry.forgotten:
            record.checkpoints.pop(number, None)
        record.version = entry.version if record.version is None else record.version
        self._records.end(record, "SUCCESS" if error is None else "ERROR", output=entry.output, error=error)
        return record.unread_signals if error is None else None

    # --- the lease, the checkpoints and the answers

    def _holds(self, lease: TaskLease) -> bool:
        """True if the lease is good. A worker that has died releases it here, so that the run is claimed again."""
        if lease.id in self._crashed:
            self._crashed.discard(lease.id)
            self._rows.release([lease.id])
        return self._leases.get(lease.id) is lease and self._rows.tasks[lease.id].state == "leased"

    def _begun_record(self, entry: RecordCheckpoint | SpawnChildren | TakeSignal) -> Record:
        """Return the record of a run, which has begun with this entry at the latest."""
        record = self._records.runs[entry.lease.id]
        if entry.version is not None and record.version is None:
            record.version, record.started_at = entry.version, self._rows.now
        return record

    def _add_checkpoint(self, entry: LeasedEntry[Any], record: Record, checkpoint: Checkpoint) -> None:
        """Put a checkpoint that is progress of the run."""
        self._put_checkpoint(record, checkpoint)
        self._rows.tasks[record.id].claims = 1
        entry.lease.clear_claims()
        self.recorded.add(record.id)

    def _put_checkpoint(self, record: Record, checkpoint: Checkpoint) -> None:
        """Put a new checkpoint, or complete one that its run waits for. A complete one stays, and tries only grow."""
        old = record.checkpoints.get(checkpoint.number)
        if old is not None and (old.is_complete or old.tried > checkpoint.tried):
            return
        if checkpoint.is_postponed and checkpoint.result is not None:
            checkpoint = checkpoint._replace(due_at=None)
        record.checkpoints[checkpoint.number] = checkpoint
        record.recorded_at[checkpoint.number] = self._rows.now

    def _answer_later(self, value: Any) -> asyncio.Future[Any]:
        answered: asyncio.Future[Any] = self._loop.create_future()
        self._loop.call_soon(_answer, answered, value)
        return answered


def _answer(answered: asyncio.Future[Any], value: Any) -> None:
    if answered.done():  # cancelled
        return
    if isinstance(value, BaseException):
        answered.set_exception(value)
    else:
        answered.set_result(value)
