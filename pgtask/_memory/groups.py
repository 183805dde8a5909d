"""The groups of one table in memory.

Invariant: each method answers like the method of its name in `_postgres.groups`; the conformance tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from pgtask._copy import Source
from pgtask._ids import first_id
from pgtask._memory.rows import MemoryTask, Rows
from pgtask._postgres.groups import NewGroup
from pgtask._validate import ItemEncoder, NewRow
from pgtask.errors import EnqueueError

__all__ = ["MemoryGroup", "MemoryGroups"]


class MemoryGroup(msgspec.Struct, kw_only=True, eq=False):
    """A group in memory: its columns."""

    id: int
    new: NewGroup
    started_at: datetime
    state: str = "open"
    ended_at: datetime | None = None
    then_task: UUID | None = None


class MemoryGroups:
    """The groups of one client. `add_task` inserts a task, as a member of a group if there is one."""

    def __init__(self, rows: Rows, add_task: Callable[[UUID, NewRow, int | None], Any]) -> None:
        self._rows = rows
        self._add_task = add_task
        self._by_name: dict[str, MemoryGroup] = {}

    def members(self, group: MemoryGroup) -> list[MemoryTask]:
        """Return the tasks of a group, those that have left the table included."""
        return [task for task in self._rows.tasks.values() if task.group == group.id]

    async def start_group(self, group: NewGroup, source: Source, encode: ItemEncoder, conn: Any) -> int:
        if group.name in self._by_name:
            raise EnqueueError(f"there is a group {group.name!r} already: choose another name")
        first, number = first_id(), len(self._by_name) + 1
        rows = [encode(item) async for item, _ in source]
        self._by_name[group.name] = made = MemoryGroup(id=number, new=group, started_at=self._rows.now)
        self._rows.group_names[number] = group.name
        for at, row in enumerate(rows):
            self._add_task(UUID(int=first + at), row, number)
        self.end_over()
        return len(self.members(made))

    async def read_groups(self, names: list[str] | None, limit: int) -> list[Any]:
        latest = sorted(self._by_name.values(), key=lambda group: -group.id)
        chosen = latest[:limit] if names is None else [group for group in latest if group.new.name in names]
        return [self._describe(group) for group in chosen]

    def _describe(self, group: MemoryGroup) -> tuple[Any, ...]:
        states = [task.state for task in self.members(group)]
        return (
            *(group.new.name, group.state, group.new.results, len(states)),
            *(states.count("done"), states.count("parked"), states.count("cancelled")),
            *(group.started_at, group.ended_at, group.then_task, self._rows.now),
        )

    async def find_group(self, name: str) -> Any:
        group = self._by_name.get(name)
        return None if group is None else (group.id, group.new.results)

    async def read_results(self, group: int, after: UUID, limit: int) -> list[Any]:
        found = [
            (task.id, task.result)
            for task in self._rows.tasks.values()
            if task.group == group and task.result is not None and task.id > after
        ]
        return sorted(found)[:limit]

    async def cancel_group(self, name: str, then: bool, conn: Any) -> bool | None:
        group = self._by_name.get(name)
        if group is None or group.ended_at is not None:
            return None if group is None else False
        group.state = "cancelling"
        if not then:
            group.new = group.new._replace(then=None)
        self.end_over()
        return True

    async def end_groups(self, names: list[str]) -> None:
        self.end_over()

    def end_over(self) -> None:
        """End the groups of which nothing waits or runs, and remove what waits of those that are being cancelled."""
        for group in list(self._by_name.values()):
            if group.ended_at is not None:
                continue
            members = self.members(group)
            if group.state == "cancelling":
                for task in members:
                    task.state = "cancelled" if task.state in ("waiting", "parked") else task.state
            held_up = ("waiting", "leased") if group.new.on_parked == "go on" else ("waiting", "leased", "parked")
            if not any(task.state in held_up for task in members):
                self._end(group)

    def _end(self, group: MemoryGroup) -> None:
        group.state = "cancelled" if group.state == "cancelling" else "ended"
        group.ended_at = self._rows.now
        if group.new.then is not None:
            group.then_task = UUID(int=first_id())
            self._add_task(group.then_task, group.new.then, None)

    def is_cancelled(self, task: MemoryTask) -> bool:
        """Return whether the group of a task is being cancelled."""
        name = self._rows.group_names.get(task.group or 0)
        return name is not None and self._by_name[name].state in ("cancelling", "cancelled")
