"""The journal of runs in memory, for the worker's own `Runs`.

Invariant: each method does to `Records` what the statement of its name in `sql/journal` does: under the lease of the
run, or not at all, and then `RunStopped`. The answer comes in a later turn of the loop, as that of a database does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from pgtask._fastpath import Lease, Leases
from pgtask._memory.records import Record, Records
from pgtask._memory.rows import FOREVER, MemoryTask
from pgtask._postgres.runs import CheckpointRow
from pgtask._worker.entries import Checkpoint, ChildRow, Ended, History, Journalled, Pause, Taken
from pgtask.errors import RunStopped

__all__ = ["MemoryJournal"]


class MemoryJournal(Journalled):
    """`crashed` are runs under which the worker has died: what they record now is lost."""

    def __init__(self, records: Records, leases: Leases, crashed: set[UUID]) -> None:
        self._records = records
        self._rows = records.rows
        self._leases = leases
        self._crashed = crashed
        self._loop = asyncio.get_running_loop()
        self.recorded: set[UUID] = set()
        """Runs that have recorded something since they were loaded."""

    def now(self) -> datetime:
        return self._rows.now

    def load(self, run: UUID) -> asyncio.Future[History]:
        self.recorded.discard(run)
        task, record = self._rows.tasks[run], self._records.runs.get(run)
        wakeup_at = task.due_at if task.is_live else None
        if record is None:
            return self._answer(History(wakeup_at, False, None, None, []))
        record.paused_until = None  # this clock stands still: a retry may fall due at the very time of a pause
        found = [
            Checkpoint(row.number, row.place, row.kind, row.name, row.result, row.error, row.due_at, row.tried)
            for row in record.checkpoints.values()
        ]
        return self._answer(History(wakeup_at, True, record.version, record.state, found))

    def adopt(self, lease: Lease, name: str) -> asyncio.Future[None]:
        if not self._holds(lease):
            return self._lost()
        record = self._records.adopt(self._rows.tasks[lease.id], name)
        if record.state == "ERROR":
            record.state = record.error = record.ended_at = None
        return self._answer(None)

    def collect(self, runs: list[UUID]) -> asyncio.Future[dict[UUID, Ended]]:
        found = [self._records.runs[run] for run in runs]
        return self._answer({one.id: Ended(one.state, one.output, one.error) for one in found if one.state is not None})

    def record(self, lease: Lease, checkpoint: Checkpoint, version: int | None) -> asyncio.Future[None]:
        if not self._holds(lease):
            return self._lost()
        self._add(self._begun(lease, version), checkpoint)
        return self._answer(None)

    def spawn(
        self, lease: Lease, checkpoint: Checkpoint, version: int | None, children: list[ChildRow]
    ) -> asyncio.Future[None]:
        if not self._holds(lease):
            return self._lost()
        self._add(self._begun(lease, version), checkpoint)
        now = self._rows.now
        for id, name, step, queue, priority in children:
            task = MemoryTask(
                id=id, raw=step, queue=queue, priority=priority, key=None, due_at=now, created_at=now, tries=[]
            )
            self._records.add(task, name, lease.id)
        return self._answer(None)

    def take(self, lease: Lease, checkpoint: Checkpoint, version: int | None) -> asyncio.Future[Taken]:
        if not self._holds(lease):
            return self._lost()
        record = self._begun(lease, version)
        old = record.checkpoints.get(checkpoint.number)
        due_at = checkpoint.due_at if old is None else old.due_at
        at = next((at for at, signal in enumerate(record.signals) if signal[0] == checkpoint.name), None)
        result = None if at is None else record.signals.pop(at)[1]
        is_late = result is None and due_at is not None and due_at <= self._rows.now
        error = "the time for it was over" if is_late else None
        if result is not None or error is not None:
            self._add(record, checkpoint._replace(result=result, error=error, due_at=due_at))
        elif old is None and due_at is not None:
            self._note(record, checkpoint)
        return self._answer(Taken(result, error, due_at, self._rows.tasks[lease.id].due_at))

    def pause(self, lease: Lease, pause: Pause) -> asyncio.Future[datetime | None]:
        if not self._holds(lease):
            return self._lost()
        task, record = self._rows.tasks[lease.id], self._records.runs[lease.id]
        remaining = [child for child in (self._records.runs[id] for id in pause.children) if child.state is None]
        for child in remaining:
            child.awaited = True
        least = len(pause.children) if pause.any_child else min(1, len(pause.children))
        if task.due_at != pause.seen_at or len(remaining) < least:
            return self._answer(task.due_at)
        task.state, task.tried, task.claims = "waiting", pause.tried, 0
        task.due_at = FOREVER if pause.due_at is None else pause.due_at
        record.waits_on, record.paused_until = pause.waits_on, task.due_at
        record.waits_for = min(1, len(remaining)) if pause.any_child else len(remaining)
        return self._answer(None)

    def end(
        self, lease: Lease, *, output: str | None, error: str | None, tried: int, forgotten: Sequence[int], version: int
    ) -> asyncio.Future[None]:
        if not self._holds(lease):
            return self._lost()
        task, record = self._rows.tasks[lease.id], self._records.runs[lease.id]
        if error is None:
            task.state, record.step = "done", task.raw
        else:
            task.state, task.error, task.tried, task.claims, task.due_at = "parked", error, tried, 0, self._rows.now
        for number in forgotten:
            record.checkpoints.pop(number, None)
        record.version = version if record.version is None else record.version
        self._records.end(record, "SUCCESS" if error is None else "ERROR", output=output, error=error)
        return self._answer(None)

    # --- the lease, the checkpoints and the answers

    def _holds(self, lease: Lease) -> bool:
        """Whether the lease is good. A worker that has died gives it up here, so that the run is claimed again."""
        if lease.id in self._crashed:
            self._crashed.discard(lease.id)
            self._rows.release([lease.id])
        return self._leases.get(lease.id) is lease and self._rows.tasks[lease.id].state == "leased"

    def _begun(self, lease: Lease, version: int | None) -> Record:
        record = self._records.runs[lease.id]
        if version is not None:
            record.version, record.started_at = version, self._rows.now
        return record

    def _add(self, record: Record, checkpoint: Checkpoint) -> None:
        self._note(record, checkpoint)
        self._rows.tasks[record.id].claims = 1
        self.recorded.add(record.id)

    def _note(self, record: Record, checkpoint: Checkpoint) -> None:
        record.checkpoints[checkpoint.number] = CheckpointRow(**checkpoint._asdict(), recorded_at=self._rows.now)

    def _answer(self, value: Any) -> asyncio.Future[Any]:
        answered: asyncio.Future[Any] = self._loop.create_future()
        self._loop.call_soon(_tell, answered, value)
        return answered

    def _lost(self) -> asyncio.Future[Any]:
        return self._answer(RunStopped("the lease of the run was lost"))


def _tell(answered: asyncio.Future[Any], value: Any) -> None:
    if answered.done():  # who asked was cancelled
        return
    if isinstance(value, BaseException):
        answered.set_exception(value)
    else:
        answered.set_result(value)
