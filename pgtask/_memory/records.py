"""The records of runs in memory, in place of `pg_task_runs`, `pg_task_checkpoints` and `pg_task_signals`.

Invariant: each method does to them, and to their tasks in `Rows`, what the statement of its name in `sql/runs` does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from pgtask._memory.rows import MemoryTask, Rows
from pgtask._postgres.runs import CheckpointRow, RunStatus, TakenKey, input_of
from pgtask._workflow.values import Checkpoint, RunResult
from pgtask.errors import EnqueueError, RunNotFound
from pgtask.workflow import STEP, RunState

__all__ = ["Record", "Records", "Triggered"]


class Record(msgspec.Struct, kw_only=True, eq=False):
    """The record of a run, its checkpoints by number, and the signals that it has not taken: name and payload."""

    id: UUID
    name: str
    parent: UUID | None = None
    created_at: datetime
    version: int | None = None
    state: str | None = None
    step: str | None = None
    output: str | None = None
    error: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    waits_on: str | None = None
    paused_until: datetime | None = None
    waits_for: int = 0
    awaited: bool = False
    checkpoints: dict[int, Checkpoint] = {}
    recorded_at: dict[int, datetime] = {}
    signals: list[tuple[str, str]] = []

    @property
    def rows(self) -> list[CheckpointRow]:
        """The checkpoints in their order."""
        found = sorted(self.checkpoints.items())
        return [CheckpointRow(**one._asdict(), recorded_at=self.recorded_at[number]) for number, one in found]

    @property
    def unread_signals(self) -> dict[str, int]:
        return dict(Counter(name for name, _ in self.signals))


class Triggered(msgspec.Struct, frozen=True, kw_only=True):
    """A call that triggered a run, by a client or by the run `parent`: the input as in the JSON, and the due time.
    `is_new` unless another task had the key."""

    run_id: UUID
    workflow: str
    input: Any
    queue: str
    priority: int
    key: str | None
    due_at: datetime
    parent: UUID | None
    is_new: bool


class Records:
    """The runs whose tasks are in `rows`, ended ones included."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.runs: dict[UUID, Record] = {}
        self.triggered: list[Triggered] = []
        self._waiting: dict[UUID, list[asyncio.Future[RunResult]]] = {}

    def add(self, task: MemoryTask, name: str, parent: UUID | None = None) -> UUID:
        """Insert a run and return its id; that of the live task with its key, if there is one."""
        found, _ = self.rows.insert(task)
        if found is task:
            self.runs[task.id] = Record(id=task.id, name=name, parent=parent, created_at=self.rows.now)
        self.triggered.append(
            Triggered(
                run_id=found.id,
                workflow=name,
                input=msgspec.json.decode(task.raw)[name][STEP],
                queue=task.queue,
                priority=task.priority,
                key=task.key,
                due_at=task.due_at,
                parent=parent,
                is_new=found is task,
            )
        )
        return found.id

    def workflow_of(self, task: MemoryTask) -> str | None:
        """The workflow that a task is a run of; None for a plain one."""
        record = self.runs.get(task.id)
        return None if record is None else record.name

    def signal(self, run: UUID, name: str, payload: str) -> bool:
        """Send a signal; false if the run has ended or never was. Raises `RunNotFound` for a task that is no run."""
        task = self.rows.tasks.get(run)
        if task is None or not task.is_live:
            return False
        if run not in self.runs and input_of(task.raw) is None:
            raise RunNotFound(f"task {run} is not the run of a workflow; signal {name} was not sent")
        self.adopt(task, _workflow_of(task)).signals.append((name, payload))
        self._wake(task)
        return True

    def _wake(self, task: MemoryTask) -> None:
        """Wake a run that pauses; one that is scheduled or to be tried again is left to its time."""
        if task.state == "leased" or task.due_at == self.runs[task.id].paused_until:
            self.rows.wake(task)

    def pauses(self, task: MemoryTask) -> bool:
        """Return whether a task is a run that pauses."""
        return task.id in self.runs and self._is_paused(task)

    def reopen(self, run: UUID) -> None:
        """Clear the end of a run that is revived; nothing for another task."""
        record = self.runs.get(run)
        if record is not None:
            record.state = record.error = record.ended_at = None

    def _is_paused(self, task: MemoryTask) -> bool:
        is_paused = task.due_at == self.runs[task.id].paused_until
        return is_paused and task.state == "waiting" and task.due_at > self.rows.now

    def adopt(self, task: MemoryTask, name: str) -> Record:
        """Return the record of a live run, made if there is none."""
        if task.id not in self.runs:
            self.runs[task.id] = Record(id=task.id, name=name, created_at=self.rows.now)
        return self.runs[task.id]

    def cancel(self, run: UUID) -> bool:
        record, task = self.runs.get(run), self.rows.tasks.get(run)
        if record is None or task is None or not task.is_live:
            return False
        task.state = "cancelled"
        record.step = task.raw
        self.end(record, "CANCELLED")
        for child in [other.id for other in self.runs.values() if other.parent == run]:
            self.cancel(child)
        return True

    def resume(self, run: UUID) -> bool:
        """Resume a run. Raises `EnqueueError` when another task has the key of a cancelled run."""
        record, task = self.runs.get(run), self.rows.tasks.get(run)
        if record is None or task is None or task.state in ("leased", "done"):
            return False
        if task.state == "waiting" and (task.due_at <= self.rows.now or not (task.tried or self._is_paused(task))):
            return False
        if task.state == "cancelled" and (other := self.rows.holder(task)) is not None:
            raise EnqueueError(f"run {run} cannot be resumed: {TakenKey(run, task.key or '', other.id)}")
        for number, checkpoint in record.checkpoints.items():
            if checkpoint.is_postponed:
                record.checkpoints[number] = checkpoint._replace(due_at=self.rows.now, tried=0)
        task.state, task.error, task.tried, task.claims = "waiting", None, 0, 0
        task.due_at = min(task.due_at, self.rows.now)
        self.reopen(run)
        return True

    def end(self, record: Record, state: str, *, output: str | None = None, error: str | None = None) -> None:
        """End a run: wake the parent that waits for it, and give its result to all that wait for it."""
        record.state, record.output, record.error, record.ended_at = state, output, error, self.rows.now
        parent = self.runs.get(record.parent) if record.awaited and record.parent is not None else None
        if parent is not None:
            parent.waits_for -= 1
            if parent.waits_for <= 0:
                self._wake(self.rows.tasks[parent.id])
        for waiter in self._waiting.pop(record.id, ()):
            if not waiter.done():
                waiter.set_result(RunResult(state, output, error))

    async def wait_for_end(self, run: UUID) -> RunResult:
        """Return the result of a run when it has ended."""
        record, task = self.runs.get(run), self.rows.tasks.get(run)
        if record is not None and task is not None and task.state in ("parked", "done", "cancelled"):
            return RunResult(self.status(run).state, record.output, task.error or record.error)
        waiter: asyncio.Future[RunResult] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(run, []).append(waiter)
        return await waiter

    def status(self, run: UUID) -> RunStatus:
        """Return the status of a run. Raises `KeyError`."""
        task, record = self.rows.tasks[run], self.runs[run]
        state = self._state(task, record)
        last = max(record.checkpoints, default=0)
        is_over = state in ("SUCCESS", "ERROR", "CANCELLED")
        return RunStatus(
            id=run,
            name=record.name,
            state=state,
            version=record.version,
            parent=record.parent,
            last_step=record.checkpoints[last].name if last else None,
            recorded=last,
            waits_on=record.waits_on if state == "PAUSED" else None,
            due_at=task.due_at if task.state == "waiting" else None,
            tried=task.tried if task.is_live else 0,
            error=task.error or (None if task.is_live else record.error),
            created_at=record.created_at,
            started_at=record.started_at,
            ended_at=record.ended_at if is_over else None,
            step=task.raw,
            input=input_of(task.raw),
            output=record.output,
            unread_signals=record.unread_signals,
            seen_at=self.rows.now,
        )

    def _state(self, task: MemoryTask, record: Record) -> RunState:
        match task.state:
            case "parked":
                return "ERROR"
            case "leased":
                return "RUNNING"
            case "waiting":
                return "PAUSED" if self._is_paused(task) else "QUEUED"
        return "SUCCESS" if record.state == "SUCCESS" else "CANCELLED"

    def latest(self) -> Iterable[UUID]:
        """All runs, the latest first."""
        return sorted(self.runs, reverse=True)


def _workflow_of(task: MemoryTask) -> str:
    return next(iter(msgspec.json.decode(task.raw, type=dict[str, Any])))
