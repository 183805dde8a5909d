"""The children of a run: their ids, the rows that make them, and what comes of them.

Invariant: the ids of one spawn are consecutive numbers, recorded as the first and their count.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from pgtask._ids import TaskIds, first_id
from pgtask._worker.entries import ChildRow
from pgtask.errors import DecodeError, EnqueueError, ReplayError, RunCancelled, RunFailed
from pgtask.policy import check_priority, check_queue
from pgtask.workflow import Workflow
from pgtask.workflow_context import Child

if TYPE_CHECKING:
    from pgtask._worker.run import Run

__all__ = ["MOST_CHILDREN", "ChildRun", "Family", "child_rows"]

MOST_CHILDREN = 1000
"""Children made, or waited for, at a time."""


class Family(msgspec.Struct, frozen=True):
    """The children of one spawn, as its checkpoint says."""

    workflow: str
    first: UUID
    count: int

    @staticmethod
    def new(workflow: str, count: int) -> Family:
        return Family(workflow, UUID(int=first_id()), count)

    @staticmethod
    def from_json(name: str, text: str | None, workflow: str, count: int) -> Family:
        """The recorded one, if it is what is asked for again. Raises `ReplayError`."""
        family = msgspec.json.decode(text or "", type=Family)
        if (family.workflow, family.count) != (workflow, count):
            raise ReplayError(
                f"spawn {name!r} asks for {count} of {workflow}, and the journal has {family.count} of "
                f"{family.workflow}; its code has changed: raise the version of the workflow"
            )
        return family

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @property
    def ids(self) -> TaskIds:
        return TaskIds(self.first, self.count)


def child_rows(
    name: str, flow: Workflow[Any, Any], family: Family, inputs: list[Any], queue: str | None, priority: int | None
) -> list[ChildRow]:
    """What is to be inserted. Raises `EnqueueError`."""
    try:
        lane = (
            flow.policy.queue if queue is None else check_queue(queue),
            flow.policy.priority if priority is None else check_priority(priority),
        )
    except ValueError as error:
        raise EnqueueError(f"spawn {name!r}: {error}") from None
    rows = []
    for id, value in zip(family.ids, inputs, strict=True):
        try:
            payload = flow.encode_input(value)
        except Exception as error:
            raise EnqueueError(f"spawn {name!r}: the input of {flow.name} cannot be stored: {error}") from error
        rows.append(ChildRow(id, flow.name, flow.envelope(payload), *lane))
    return rows


class ChildRun(Child[Any]):
    """A child, as its parent sees it."""

    def __init__(self, parent: Run, name: str, flow: Workflow[Any, Any], id: UUID) -> None:
        self.id = id
        self.name = name
        self._parent = parent
        self._flow = flow

    def __repr__(self) -> str:
        return f"<child {self.name} {self.id}>"

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    async def result(self) -> Any:
        return (await self._parent.results([self]))[0]

    def read(self, state: str, output: msgspec.Raw, error: str | None) -> Any:
        """What the child has returned, or the exception for how it ended."""
        if state == "SUCCESS":
            try:
                return self._flow.decode_output(output)
            except msgspec.DecodeError as wrong:
                return DecodeError(f"the output of child {self.name} cannot be read: {wrong}")
        if state == "CANCELLED":
            return RunCancelled(f"child {self.name} ({self.id}) was cancelled")
        return RunFailed(self.id, error or "")
