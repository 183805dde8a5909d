"""The table in memory, in place of `pg_task`, and a clock that the test moves.

Invariant: `insert`, `claim` and `write` change these tasks like enqueue.sql, claim.sql and flush.sql change the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol
from uuid import UUID

import msgspec

from pgtask._fastpath import Outcomes
from pgtask._ids import EnqueueOutcome
from pgtask._placement import KEEP, KeyRule
from pgtask._progress import Progress
from pgtask.task import Task

__all__ = ["FOREVER", "MemoryTask", "Rows", "Try"]

FOREVER = datetime.max.replace(tzinfo=UTC)
"""The due time of a task that waits until something wakes it."""


class Try(msgspec.Struct, eq=False):
    """One try of a step: the step, the number of the try, its time by the clock in memory, the error of its end, and
    the progress that it has last reported."""

    step: Task
    attempt: int
    at: datetime
    error: str | None = None
    progress: Progress | None = None


class MemoryTask(msgspec.Struct, kw_only=True, eq=False):
    """A task in memory: the columns of its row, with the step as JSON in `raw`, and its tries.

    The task of a run of a workflow is `cancelled` with it, and `done` when it has ended well.
    """

    id: UUID
    state: Literal["waiting", "leased", "parked", "done", "cancelled"] = "waiting"
    raw: str
    queue: str
    priority: int
    key: str | None
    due_at: datetime
    created_at: datetime
    tried: int = 0
    claims: int = 0
    error: str | None = None
    behind: datetime | None = None
    expires_at: datetime | None = None
    group: int | None = None
    result: str | None = None
    tries: list[Try] = []

    @property
    def name(self) -> str:
        """The name of its task or workflow."""
        return str(next(iter(msgspec.json.decode(self.raw))))

    def take(self, other: MemoryTask, due: datetime) -> None:
        """Take the step and the lane of another task, and be due then, as if this one had been enqueued like that."""
        self.raw, self.queue, self.priority, self.expires_at = other.raw, other.queue, other.priority, other.expires_at
        self.state, self.error, self.tried, self.claims, self.due_at = "waiting", None, 0, 0, due

    def serve(self, other: MemoryTask) -> None:
        """Be due as soon as another task with the same step, and expire no earlier."""
        self.due_at = min(self.due_at, other.due_at) if self.tried == 0 else self.due_at
        ends = (self.expires_at, other.expires_at)
        self.expires_at = None if None in ends else max(end for end in ends if end is not None)

    @property
    def is_live(self) -> bool:
        """True if it has a row."""
        return self.state in ("waiting", "leased", "parked")

    @property
    def steps(self) -> list[Task]:
        """The steps that ran, each as often as it was tried."""
        return [one.step for one in self.tries]


def _put_off(task: MemoryTask, due: datetime, rule: KeyRule) -> datetime:
    """Return the time at which a task is due that is put off until then, as far as the rule allows."""
    return due if rule.ceiling is None else min(due, task.created_at + timedelta(seconds=rule.ceiling))


class LimitsOfRows(Protocol):
    """What `Rows` asks the limits of an app."""

    def in_turns(self, due: Sequence[MemoryTask], /) -> list[MemoryTask]: ...
    def admit(self, task: MemoryTask, /) -> bool: ...
    def is_stuck(self, task: MemoryTask, /) -> bool: ...


class Rows:
    """The tasks of one table, finished ones included, and its clock."""

    def __init__(self, now: datetime | None = None) -> None:
        self.now = datetime.now(UTC) if now is None else now
        self.tasks: dict[UUID, MemoryTask] = {}
        self.limits: LimitsOfRows | None = None
        """The limits of the app of a worker."""
        self.followers: list[Callable[[MemoryTask], None]] = []
        """Functions that are called with each task that is parked."""
        self.group_names: dict[int, str] = {}
        """The names of groups, by the `group` of their members."""

    def insert(self, task: MemoryTask, rule: KeyRule = KEEP) -> tuple[MemoryTask, EnqueueOutcome]:
        """Add a task and return it. If a live task has its key, do what the rule says, as enqueue_onto.sql does, and
        return the task that has the step now. Returns also what became of the step."""
        if rule != KEEP:
            self.promote()
        holder = self.holder(task)
        if holder is None:
            self.tasks[task.id] = task
            return task, "new"
        outcome: EnqueueOutcome = "kept"
        is_debounced = rule.debounce is not None
        if holder.state == "waiting" and (is_debounced or rule.on_conflict == "replace"):
            holder.take(task, _put_off(holder, task.due_at, rule))
            outcome = "replaced"
        elif holder.state == "parked" and rule.on_parked == "replace":
            holder.take(task, task.due_at)
            outcome = "replaced"
        elif holder.state == "parked" and rule.on_parked == "revive":
            holder.take(holder, self.now)
            outcome = "revived"
        is_enough = holder.state != "leased" and holder.raw == task.raw
        if is_enough and holder.state == "waiting" and rule.on_conflict == "after" and not is_debounced:
            if rule.on_parked == "replace" and holder.tried == 0 and task.due_at < holder.due_at:
                outcome = "replaced"  # enqueue_onto.sql cannot tell this from a parked one that takes the step
            holder.serve(task)
        if holder.state == "parked" or is_enough or (rule.on_conflict == "keep" and not is_debounced):
            return holder, outcome
        return self._insert_behind(task, rule)

    def _insert_behind(self, task: MemoryTask, rule: KeyRule) -> tuple[MemoryTask, EnqueueOutcome]:
        second = self.holder(task, behind=True)
        if second is None:
            task.behind, task.due_at = task.due_at, FOREVER
            self.tasks[task.id] = task
            return task, "behind"
        assert second.behind is not None
        due = min(second.behind, task.due_at) if rule.debounce is None else _put_off(second, task.due_at, rule)
        second.take(task, FOREVER)
        second.behind = due
        return second, "replaced"

    def holder(self, wanted: MemoryTask, *, behind: bool = False) -> MemoryTask | None:
        """Return the live task of the same name that has the key of another one, or the one that waits behind it."""
        if wanted.key is None:
            return None
        having = (task for task in self.tasks.values() if task.key == wanted.key and task.is_live)
        return next((one for one in having if one.name == wanted.name and (one.behind is not None) == behind), None)

    def first_of(self, task: MemoryTask) -> UUID | None:
        """Return the id of the task behind which another one waits."""
        first = None if task.behind is None else self.holder(task)
        return None if first is None else first.id

    def promote(self) -> None:
        """Make tasks due that wait behind another one that is gone, as promote.sql does."""
        for task in list(self.tasks.values()):
            if task.behind is not None and self.holder(task) is None:
                task.due_at, task.behind = task.behind, None

    def is_leased(self, id: UUID) -> bool:
        return self.tasks[id].state == "leased"

    def next_due(self) -> datetime | None:
        """Return the due time of the first waiting task; None if all wait until something wakes them."""
        self.promote()
        waiting = [task for task in self.tasks.values() if task.state == "waiting" and task.due_at < FOREVER]
        if self.limits is not None:
            waiting = [task for task in waiting if not self.limits.is_stuck(task)]
        return min((task.due_at for task in waiting), default=None)

    def wake(self, task: MemoryTask) -> None:
        """Make a task due now; if it is leased, move its due time, which its worker compares."""
        if task.state == "waiting":
            task.due_at = min(task.due_at, self.now)
        elif task.state == "leased":
            task.due_at = max(self.now, task.due_at + timedelta(microseconds=1))

    def claim(self, limit: int) -> list[tuple[Any, ...]]:
        """Lease due tasks in the order of a worker; return the rows that claim.sql returns."""
        self.promote()
        due = [task for task in self.tasks.values() if task.state == "waiting" and task.due_at <= self.now]
        due.sort(key=lambda task: (-task.priority, task.due_at))
        if self.limits is not None:
            due = self.limits.in_turns(due)
        taken: list[MemoryTask] = []
        for task in due:
            if len(taken) == limit:
                break
            if self.limits is None or self.limits.admit(task):
                task.state = "leased"
                task.claims += 1
                taken.append(task)
        return [
            (task.id, task.raw, task.tried, task.claims, self._size(task), task.due_at.timestamp(), task.group)
            for task in taken
        ]

    def _size(self, task: MemoryTask) -> int | None:
        """Return what claim.sql returns beside a task: -1 if it has expired before it began."""
        has_expired = task.expires_at is not None and task.expires_at < self.now
        return -1 if has_expired and task.tried == 0 and task.claims == 1 else None

    def release(self, ids: list[UUID]) -> None:
        """Put back tasks that were claimed and have no outcome; `claims` goes on counting."""
        for id in ids:
            if self.tasks[id].state == "leased":
                self.tasks[id].state = "waiting"

    def write(self, outcomes: Outcomes) -> None:
        """Write outcomes. A task that is no longer leased was cancelled meanwhile, and stays so."""
        for lease in outcomes.done + outcomes.archived:
            task = self.tasks[lease.id]
            if task.state == "leased":
                task.state, task.raw = "done", task.raw if lease.kept is None else lease.kept
                task.result = outcomes.results.get(lease)
        for lease, step in outcomes.continued:
            task = self.tasks[lease.id]
            if task.state == "leased":
                task.raw, task.tried, task.claims, task.expires_at = step, 0, 1, None
        for lease, raw, tried, error, delay, queue, priority, claims in outcomes.rescheduled:
            task = self.tasks[lease.id]
            if task.state != "leased":
                continue
            task.state = "waiting" if error is None else "parked"
            if raw is not None or tried is not None:
                task.expires_at = None
            task.raw = task.raw if raw is None else raw
            task.tried = task.tried if tried is None else tried
            task.error = error
            task.due_at = self.now + timedelta(seconds=delay)
            task.queue = task.queue if queue is None else queue
            task.priority = task.priority if priority is None else priority
            task.claims = claims or 0
            if error is not None:
                self.announce_parked(task)

    def announce_parked(self, task: MemoryTask) -> None:
        """Call the followers with a task that is parked now."""
        for follow in self.followers:
            follow(task)
