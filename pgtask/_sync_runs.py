"""The methods of a sync client that are about workflows: those of `ClientRuns`, without `await`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar, overload
from uuid import UUID

from pgtask.client import Client
from pgtask.runs import Run, RunStatus
from pgtask.sync_handles import SyncRun
from pgtask.workflow import RunState, Workflow

__all__ = ["SyncRuns"]

T = TypeVar("T")
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


class SyncRuns:
    """The part of `SyncClient` that triggers workflows and looks after their runs."""

    _client: Client

    def _call(self, call: Callable[[Any], Coroutine[Any, Any, T]], conn: Any = None) -> T:
        raise NotImplementedError

    def trigger(
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
    ) -> SyncRun[OutputT]:
        """Start a run, and return it without waiting for it: `Client.trigger`."""
        due: dict[str, Any] = {"after": after, "at": at}
        run = self._call(
            lambda conn: self._client.trigger(
                workflow, input, queue=queue, priority=priority, key=key, conn=conn, **due
            ),
            conn,
        )
        return SyncRun(self._call, self._run_of(run.id, workflow), run.id)

    def trigger_many(
        self,
        workflow: Workflow[InputT, OutputT],
        inputs: Iterable[InputT],
        *,
        queue: str | None = None,
        priority: int | None = None,
        conn: Any = None,
    ) -> Sequence[UUID]:
        """Start a run for each input, in one transaction, and return their ids: `Client.trigger_many`."""
        values = list(inputs)
        return self._call(
            lambda conn: self._client.trigger_many(workflow, values, queue=queue, priority=priority, conn=conn), conn
        )

    def _run_of(self, id: UUID, workflow: Workflow[Any, Any] | None) -> Callable[[], Run[Any]]:
        """Return what finds the run of the client, which is another one after a fork."""
        return lambda: self._client.run(id) if workflow is None else self._client.run(id, workflow)

    @overload
    def run(self, id: UUID | str) -> SyncRun[Any]: ...
    @overload
    def run(self, id: UUID | str, workflow: Workflow[Any, OutputT]) -> SyncRun[OutputT]: ...
    def run(self, id: UUID | str, workflow: Workflow[Any, Any] | None = None) -> SyncRun[Any]:
        """Return a run by its id, without I/O: `Client.run`."""
        checked = self._client.run(id).id
        return SyncRun(self._call, self._run_of(checked, workflow), checked)

    def runs(
        self,
        workflow: Workflow[Any, Any] | str | None = None,
        *,
        state: RunState | None = None,
        limit: int = 100,
        before: UUID | str | None = None,
    ) -> list[RunStatus]:
        """Return runs of a workflow, or of all, the latest first: `Client.runs`."""
        return self._call(lambda _: self._client.runs(workflow, state=state, limit=limit, before=before))

    def signal(self, run: UUID | str, name: str, value: Any = None, *, conn: Any = None) -> None:
        """Send a signal to a run: `Client.signal`."""
        self._call(lambda conn: self._client.signal(run, name, value, conn=conn), conn)
