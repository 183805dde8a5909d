"""The children of a run: their ids, the rows that make them, and their results.

Invariant: the ids of one spawn are consecutive numbers, recorded as the first and their count.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any
from uuid import UUID

import msgspec

from pgtask._ids import TaskIds, first_id
from pgtask._validate import choose_lane
from pgtask._workflow.history import REMEDY
from pgtask._workflow.values import Checkpoint, ChildRow, RunResult
from pgtask.errors import DecodeError, EnqueueError, ReplayError, RunCancelled, RunFailed
from pgtask.workflow import Workflow
from pgtask.workflow_context import Child

__all__ = ["ChildIds", "ChildRun", "child_rows", "decode_results", "encode_results"]


class ChildIds(msgspec.Struct, frozen=True):
    """The ids of the children of one spawn, as its checkpoint records them."""

    workflow: str
    first: UUID
    count: int

    @staticmethod
    def generate(workflow: str, count: int) -> ChildIds:
        return ChildIds(workflow, UUID(int=first_id()), count)

    @staticmethod
    def from_json(name: str, text: str | None, workflow: str, count: int) -> ChildIds:
        """Decode the recorded ids. Raises `ReplayError` if they are of another workflow or another count."""
        ids = msgspec.json.decode(text or "", type=ChildIds)
        if (ids.workflow, ids.count) != (workflow, count):
            raise ReplayError(
                f"spawn {name!r} asks for {count} of {workflow}, and the journal has {ids.count} of "
                f"{ids.workflow}; its code has changed: {REMEDY}"
            )
        return ids

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @property
    def ids(self) -> TaskIds:
        return TaskIds(self.first, self.count)


def child_rows(
    name: str, flow: Workflow[Any, Any], ids: ChildIds, inputs: list[Any], queue: str | None, priority: int | None
) -> list[ChildRow]:
    """Make the rows of the children of one spawn. Raises `EnqueueError`."""
    lane = choose_lane(flow.policy, queue, priority, what=f"spawn {name!r}: ")
    rows = []
    for id, value in zip(ids.ids, inputs, strict=True):
        try:
            payload = flow._encode_input(value)
        except Exception as error:
            raise EnqueueError(f"spawn {name!r}: the input of {flow.name} cannot be stored: {error}") from error
        rows.append(ChildRow(id, flow.name, flow._envelope(payload), *lane))
    return rows


def encode_results(results: Sequence[RunResult]) -> str:
    """Encode the results of children, in their order, for a checkpoint."""
    rows = [(state, msgspec.Raw((output or "null").encode()), error) for state, output, error in results]
    return msgspec.json.encode(rows).decode()


def decode_results(checkpoint: Checkpoint) -> list[tuple[str, msgspec.Raw, str | None]]:
    """Decode the state, output and error of each child that a checkpoint records."""
    assert checkpoint.result is not None
    return msgspec.json.decode(checkpoint.result, type=list[tuple[str, msgspec.Raw, str | None]])


class ChildRun(Child[Any]):
    """A child, as its parent sees it. `wait_for` is the parent's `ctx.results`."""

    def __init__(
        self,
        wait_for: Callable[[Sequence[Child[Any]]], Awaitable[list[Any]]],
        name: str,
        flow: Workflow[Any, Any],
        id: UUID,
    ) -> None:
        self.id = id
        self.name = name
        self._wait_for = wait_for
        self._flow = flow

    def __repr__(self) -> str:
        return f"<child {self.name} {self.id}>"

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    async def result(self) -> Any:
        return (await self._wait_for([self]))[0]

    def decode_result(self, state: str, output: msgspec.Raw, error: str | None) -> Any:
        """Return the output of the child, or the exception for its end."""
        if state == "SUCCESS":
            try:
                return self._flow._decode_output(output)
            except msgspec.DecodeError as wrong:
                return DecodeError(f"the output of child {self.name} cannot be read: {wrong}")
        if state == "CANCELLED":
            return RunCancelled(f"child {self.name} ({self.id}) was cancelled")
        return RunFailed(self.id, error or "")
