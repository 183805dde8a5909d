"""The methods of a client that are about workflows: they start runs, and look after them.

Invariant: an input or an id that is wrong is refused before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar, overload
from uuid import UUID

from pgtask._client_store import ClientStore
from pgtask._ids import TaskIds, first_id
from pgtask._placement import check_delay, check_one_time, check_time, choose_lane, scoped_key
from pgtask._traces import sending
from pgtask._validate import check_run_id, encode_input
from pgtask.runs import Run, RunStatus, send_signal
from pgtask.workflow import RunState, Workflow

__all__ = ["ClientRuns"]

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


class ClientRuns:
    """The part of `Client` that triggers workflows and looks after their runs."""

    _store: ClientStore
    _max_step_bytes: int

    async def trigger(
        self,
        workflow: Workflow[InputT, OutputT],
        input: InputT | None = None,
        *,
        queue: str | None = None,
        priority: int | None = None,
        key: str | None = None,
        after: timedelta | None = None,
        at: datetime | None = None,
        conn: Any = None,
    ) -> Run[OutputT]:
        """Start a run, now, `after` a time or `at` one, and return it without waiting for it.

        With `key`, if a run of this workflow with this key has not ended, returns that one; `run.id.is_new` says so.
        `queue` and `priority` are by default those of the workflow's policy;
        with `conn` the run is part of the caller's transaction.
        """
        text = encode_input(workflow, input, self._max_step_bytes)
        lane = choose_lane(workflow.policy, queue, priority)
        check_one_time(after, at)
        due = (None if at is None else check_time(at), None if after is None else check_delay(after, "after"))
        stored = None if key is None else scoped_key(workflow.name, key)
        with sending(lane[0], workflow.name) as span:
            id = await self._store.insert_run(workflow.name, text, *due, lane, stored, conn)
            if span is not None:
                span.set_attribute("messaging.message.id", str(id))
        return Run(self._store, id, workflow)

    async def trigger_many(
        self,
        workflow: Workflow[InputT, OutputT],
        inputs: Iterable[InputT],
        *,
        queue: str | None = None,
        priority: int | None = None,
        conn: Any = None,
    ) -> Sequence[UUID]:
        """Start a run for each input, now, in one transaction, and return their ids in order."""
        lane = choose_lane(workflow.policy, queue, priority)
        texts = [encode_input(workflow, value, self._max_step_bytes) for value in inputs]
        ids = TaskIds(UUID(int=first_id()), len(texts))
        with sending(lane[0], workflow.name) as span:
            await self._store.insert_runs(ids, workflow.name, texts, lane, conn)
            if span is not None:
                span.set_attribute("messaging.batch.message_count", len(ids))
        return ids

    @overload
    def run(self, id: UUID | str) -> Run[Any]: ...
    @overload
    def run(self, id: UUID | str, workflow: Workflow[Any, OutputT]) -> Run[OutputT]: ...
    def run(self, id: UUID | str, workflow: Workflow[Any, Any] | None = None) -> Run[Any]:
        """Return a run by its id, without I/O. Given its workflow, the result has that type; else that of the JSON.

        Raises `EnqueueError` if the id is not a UUID, nor the text of one.
        """
        return Run(self._store, check_run_id(id), workflow)

    async def runs(
        self,
        workflow: Workflow[Any, Any] | str | None = None,
        *,
        state: RunState | None = None,
        limit: int = 100,
        before: UUID | str | None = None,
    ) -> list[RunStatus]:
        """Return runs of a workflow, or of all, in a state, or in any; the latest first.

        For the next page pass the last id as `before`. Looks at 100,000 runs at most.
        """
        name = workflow.name if isinstance(workflow, Workflow) else workflow
        last = None if before is None else check_run_id(before)
        return await self._store.list_statuses(name, state, limit, last)

    async def signal(self, run: UUID | str, name: str, value: Any = None, *, conn: Any = None) -> None:
        """Send a signal to a run, which keeps it until it waits for one of this name. With `conn` it is part of the
        caller's transaction. Raises `RunNotFound` if the run has ended, never was, or is a task of another kind."""
        await send_signal(self._store, check_run_id(run), name, value, conn)
