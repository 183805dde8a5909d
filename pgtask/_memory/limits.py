"""The limits of an app in memory.

Invariant: `admit` allows what pg_task_claim_limited (020_limits.sql) allows, by the clock in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec

from pgtask._fastpath import Table, TaskLease
from pgtask._memory.rows import MemoryTask, Rows
from pgtask.limits import Limit, limit_key

__all__ = ["MemoryLimits"]

_EPSILON = timedelta(microseconds=2)  # of times that are added up


class _KeyState(msgspec.Struct):
    """A row of pg_task_limit_keys."""

    next_at: datetime
    cost_next_at: datetime
    paused_until: datetime
    failures: int = 0


class MemoryLimits:
    """What `limits`, those of the steps in `table`, allow to start of the tasks in `rows`."""

    def __init__(self, rows: Rows, table: Table, limits: Mapping[str, Limit]) -> None:
        self._rows, self._table, self._limits = rows, table, limits
        self._states: dict[str, _KeyState] = {}
        self._turns: dict[str, float] = {}  # of keys of shared limits, as in pg_task_limit_keys
        self._keys: dict[UUID, str] = {}  # of the tasks that run under one, or have failed a try under it

    def in_turns(self, due: Sequence[MemoryTask]) -> list[MemoryTask]:
        """Return due tasks with the keys of shared limits in turn, in the places that such tasks have."""
        places, waiting = [], []
        for place, task in enumerate(due):
            limit, _, key = self._find(task)
            if limit is not None and key is not None and limit.share:
                places.append(place)
                waiting.append((place, task, key, _weight(limit, key)))
        base = min((self._turns[key] for _, _, key, _ in waiting if key in self._turns), default=0.0)
        self._turns = {key: max(self._turns.get(key, base), base) for _, _, key, _ in waiting}
        ranks: Counter[str] = Counter()
        ranked = []
        for place, task, key, weight in waiting:
            ranks[key] += 1
            ranked.append((-task.priority, self._turns[key] + ranks[key] / weight, place, task))
        turns = list(due)
        for place, (*_, task) in zip(places, sorted(ranked, key=lambda one: one[:3]), strict=True):
            turns[place] = task
        return turns

    def admit(self, task: MemoryTask) -> bool:
        """Return whether a due task may start now, and count it then. One that waits for a time is due at that time."""
        limit, step, key = self._find(task)
        if limit is None or key is None:
            self._keys.pop(task.id, None)
            return True
        now, state = self._rows.now, self._state(key)
        ready = max(state.paused_until, _ready_at(limit, state))
        if ready > now + _EPSILON:
            task.due_at = ready
            return False
        places = self._places(limit, state)
        running = sum(self._rows.is_leased(id) for id, held in self._keys.items() if held == key)
        if running >= places or self._is_behind(task, limit, key):
            return False
        self._keys[task.id] = key
        if key in self._turns:
            self._turns[key] += 1 / _weight(limit, key)
        if limit.rate is not None:
            state.next_at = max(state.next_at, now) + timedelta(seconds=1 / limit.rate.per_second)
        if limit.cost is not None:
            state.cost_next_at = _charged(state, limit, float(getattr(step, limit.cost.of or "") or 0), now)
        return True

    def is_stuck(self, task: MemoryTask) -> bool:
        """Return whether a waiting task can start only after a person has revived or removed a parked one."""
        limit, _, key = self._find(task)
        if limit is None or key is None:
            return False
        return any(one.state == "parked" for one in self._before(task, limit, key))

    def mark(self, leases: Iterable[TaskLease]) -> None:
        """Give leases the keys of their limits."""
        for lease in leases:
            if (key := self._keys.get(lease.id)) is not None:
                lease.limit_key, lease.limit_failures = key, self._state(key).failures

    def write(self, notes: Iterable[tuple[str, str, float]]) -> None:
        """Note what steps have shown, as pg_task_note_limits does."""
        for key, kind, number in notes:
            state, limit, now = self._state(key), self._limits[key.partition(" ")[0]], self._rows.now
            if kind == "ended":
                state.failures = 0
            elif kind == "paused":
                state.paused_until = max(state.paused_until, now + timedelta(seconds=number))
            elif kind == "charged":
                state.cost_next_at = _charged(state, limit, number, now)
            else:
                state.failures += 1
                if limit.breaker is not None and state.failures >= limit.breaker.failures:
                    state.paused_until = max(state.paused_until, now + limit.breaker.pause)

    def _find(self, task: MemoryTask) -> tuple[Limit | None, Any, str | None]:
        """Return the limit of the step of a task, the step, and its key."""
        try:
            entry, step = self._table.decode(task.raw)
            limit = entry.policy.limit
            return limit, step, None if limit is None else limit_key(limit, step)
        except Exception:  # its try fails by that
            return None, None, None

    def _state(self, key: str) -> _KeyState:
        now = self._rows.now
        return self._states.setdefault(key, _KeyState(now, now, now))

    def _places(self, limit: Limit, state: _KeyState) -> float:
        if limit.breaker is not None and state.failures >= limit.breaker.failures:
            return 1
        return float("inf") if limit.concurrency is None else limit.concurrency

    def _before(self, task: MemoryTask, limit: Limit, key: str) -> list[MemoryTask]:
        """Return the tasks that have failed a try and come before a task in strict order."""
        if limit.order != "strict":
            return []
        failed = [self._rows.tasks[id] for id, held in self._keys.items() if held == key and id != task.id]
        return [one for one in failed if one.state == "parked" or (one.state == "waiting" and one.tried > 0)]

    def _is_behind(self, task: MemoryTask, limit: Limit, key: str) -> bool:
        before = self._before(task, limit, key)
        later = max((one.due_at for one in before if one.state == "waiting"), default=task.due_at)
        task.due_at = max(task.due_at, later)
        return bool(before)


def _weight(limit: Limit, key: str) -> float:
    return 1.0 if isinstance(limit.share, bool) else limit.share.get(key.removeprefix(limit.prefix), 1.0)


def _ready_at(limit: Limit, state: _KeyState) -> datetime:
    """Return the time from which the rate and the cost of a limit allow a start."""
    times = [state.paused_until]
    if limit.rate is not None:
        times.append(state.next_at - timedelta(seconds=(limit.rate.saved - 1) / limit.rate.per_second))
    if limit.cost is not None:
        times.append(state.cost_next_at - timedelta(seconds=limit.cost.saved / limit.cost.per_second))
    return max(times)


def _charged(state: _KeyState, limit: Limit, units: float, now: datetime) -> datetime:
    if limit.cost is None:
        return state.cost_next_at
    return max(state.cost_next_at, now) + timedelta(seconds=units / limit.cost.per_second)
