"""Runs from outside: triggering workflows, asking how their runs are, waiting for results, telling them things.

Invariants: what cannot be triggered or sent is refused before anything is sent; a result is what the record says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar, overload
from uuid import UUID

import msgspec

from pgtask._encode import check_delay, check_key, check_time
from pgtask._ids import TaskIds, first_id
from pgtask._postgres.connection import map_errors
from pgtask._postgres.ends import Ends
from pgtask._postgres.runs import RunStatus, cancel_runs, list_runs, read_statuses, resume_runs, send_signal
from pgtask._postgres.store import statement
from pgtask.errors import (
    DecodeError,
    DefinitionError,
    EnqueueError,
    ResultTimeout,
    RunCancelled,
    RunFailed,
    RunNotFound,
)
from pgtask.policy import check_priority, check_queue
from pgtask.workflow import RunState, Workflow, check_name

__all__ = ["Run", "RunStatus", "Runs"]

T = TypeVar("T")
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

TRIGGER_CHUNK = 1000


class Run(Generic[OutputT]):
    """A run of a workflow: `id`, and what can be asked of it and told it. Holds no connection."""

    def __init__(self, runs: Runs, id: UUID, workflow: Workflow[Any, OutputT] | None) -> None:
        self.id = id
        self._runs = runs
        self._workflow = workflow

    def __repr__(self) -> str:
        return f"<run {self.id}>"

    async def status(self) -> RunStatus:
        """How it is now. Raises `RunNotFound`."""
        found = await self._runs._status(self.id)
        if found is None:
            raise RunNotFound(f"there is no run {self.id}")
        return found

    async def result(self, timeout: timedelta | float | None = None) -> OutputT:
        """What it returns, as soon as it has ended; `timeout` is a timedelta or seconds.

        Raises `RunFailed` if it ends as ERROR, `RunCancelled` and `ResultTimeout`. A run that is not there yet, as the
        transaction that triggers it is not committed, is waited for too. Cancelling this leaves the run alone.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        try:
            async with asyncio.timeout(seconds):
                state, output, error = await self._runs._ended(self.id)
        except TimeoutError:
            raise ResultTimeout(f"run {self.id} has not ended within {seconds:g} s") from None
        if state == "CANCELLED":
            raise RunCancelled(f"run {self.id} was cancelled")
        if state == "ERROR" or output is None:
            raise RunFailed(self.id, error or "")
        if self._workflow is None:
            return msgspec.json.decode(output)  # type: ignore[no-any-return]
        try:
            return self._workflow.decode_output(output)  # type: ignore[no-any-return]
        except msgspec.DecodeError as wrong:
            raise DecodeError(f"the output of run {self.id} cannot be read: {wrong}") from None

    async def signal(self, name: str, value: Any = None, *, conn: Any = None) -> None:
        """Send it a signal: `client.signal(run.id, ...)`."""
        await self._runs.signal(self.id, name, value, conn=conn)

    async def cancel(self, *, conn: Any = None) -> bool:
        """End it and its children as CANCELLED, wherever they are; false if it had ended before.

        A step that is running is not recorded any more; it is interrupted when the worker's lease is next renewed, and
        nothing that comes after it starts. With `conn` it is part of the caller's transaction, which must be READ
        COMMITTED: raises `EnqueueError`.
        """
        return await self._runs._cancel(self.id, conn)

    async def resume(self, *, conn: Any = None) -> bool:
        """Let it go on from what it has recorded, if it has ended as ERROR or was cancelled; wake it if it pauses or is
        to be tried again.

        False if there was nothing to do: it is due, scheduled or running, or has ended well. Raises `EnqueueError` if
        it was cancelled and its key is that of another task by now; nothing has been changed then.
        """
        return await self._runs._resume(self.id, conn)


class Runs:
    """The methods of a `Client` that are about workflows. They raise what the class `Client` says."""

    _max_step_bytes: int
    _ends: Ends | None = None

    def _connection(self, conn: Any) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    def _open_ends(self) -> Ends:
        raise NotImplementedError

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
        """Start a run, now, `after` a time or `at` one; does not wait for it.

        With `key`, if a run or task with this key has not ended, it is that one. `queue` and `priority` are by default
        those of the workflow's policy; with `conn` the run is part of the caller's transaction.
        """
        text = self._envelope(workflow, input)
        lane = _lane(workflow, queue, priority)
        if after is not None and at is not None:
            raise EnqueueError("give either after= or at=, not both")
        due = (None if at is None else check_time(at), None if after is None else check_delay(after))
        if key is not None:
            check_key(key)
        return Run(self, await self._trigger(workflow.name, text, *due, *lane, key, conn), workflow)

    async def trigger_many(
        self,
        workflow: Workflow[InputT, OutputT],
        inputs: Iterable[InputT],
        *,
        queue: str | None = None,
        priority: int | None = None,
        conn: Any = None,
    ) -> Sequence[UUID]:
        """Start a run for each input, now, in one transaction; their ids in order."""
        lane = _lane(workflow, queue, priority)
        texts = [self._envelope(workflow, value) for value in inputs]
        ids = TaskIds(UUID(int=first_id()), len(texts))
        await self._trigger_all(ids, workflow.name, texts, *lane, conn)
        return ids

    @overload
    def run(self, id: UUID) -> Run[Any]: ...
    @overload
    def run(self, id: UUID, workflow: Workflow[Any, OutputT]) -> Run[OutputT]: ...
    def run(self, id: UUID, workflow: Workflow[Any, Any] | None = None) -> Run[Any]:
        """A run by its id. Given its workflow, the result has that type; else it is what the JSON is. Asks nothing."""
        return Run(self, id, workflow)

    async def runs(
        self,
        workflow: Workflow[Any, Any] | str | None = None,
        *,
        state: RunState | None = None,
        limit: int = 100,
        before: UUID | None = None,
    ) -> list[RunStatus]:
        """Runs of a workflow, or of all, in a state, or in any; the latest first.

        For the next page pass the last id as `before`. Looks at 100,000 runs at most.
        """
        name = workflow.name if isinstance(workflow, Workflow) else workflow
        return await self._list(name, state, limit, before)

    async def signal(self, run: UUID, name: str, value: Any = None, *, conn: Any = None) -> None:
        """Send a signal to a run, which keeps it until it waits for one of this name. With `conn` it is part of the
        caller's transaction. Raises `RunNotFound` if the run has ended, never was, or is a task of another kind."""
        check_name("signal", name, EnqueueError)
        try:
            payload = msgspec.json.encode(value).decode()
        except Exception as error:
            raise EnqueueError(f"signal {name}: its value cannot be stored as JSON: {error}") from error
        if not await self._send(run, name, payload, conn):
            raise RunNotFound(f"run {run} has ended, or never was; signal {name} was not sent")

    # --- the statements

    async def _trigger(
        self,
        name: str,
        text: str,
        at: datetime | None,
        delay: float | None,
        queue: str,
        priority: int,
        key: str | None,
        conn: Any,
    ) -> UUID:
        async with self._connection(conn) as connection:
            while True:
                id = UUID(int=first_id())
                with map_errors():
                    found = await connection.fetchval(
                        statement("runs/trigger"), id, name, text, at, delay, queue, priority, key
                    )
                    if found is None:
                        found = (await connection.fetchrow(statement("find_keys"), [key]) or (None, None))[1]
                if found is not None:
                    return UUID(int=found.int)

    async def _trigger_all(
        self, ids: TaskIds, name: str, texts: list[str], queue: str, priority: int, conn: Any
    ) -> None:
        async with self._connection(conn) as connection:
            with map_errors():
                async with connection.transaction():
                    for at in range(0, len(texts), TRIGGER_CHUNK):
                        part = slice(at, at + TRIGGER_CHUNK)
                        await connection.execute(
                            statement("runs/trigger_many"), ids[part], name, texts[part], queue, priority
                        )

    async def _status(self, run: UUID) -> RunStatus | None:
        async with self._connection(None) as connection:
            with map_errors():
                return next(iter(await read_statuses(connection, [run])), None)

    async def _list(self, name: str | None, state: RunState | None, limit: int, before: UUID | None) -> list[RunStatus]:
        async with self._connection(None) as connection:
            with map_errors():
                found, _ = await list_runs(connection, name=name, state=state, limit=limit, before=before)
        return found

    async def _send(self, run: UUID, name: str, payload: str, conn: Any) -> bool:
        async with self._connection(conn) as connection:
            with map_errors():
                return await send_signal(connection, run, name, payload)

    async def _cancel(self, run: UUID, conn: Any) -> bool:
        async with self._connection(conn) as connection:
            with map_errors():
                return run in await cancel_runs(connection, [run])

    async def _resume(self, run: UUID, conn: Any) -> bool:
        async with self._connection(conn) as connection:
            with map_errors():
                resumed = await resume_runs(connection, [run])
        if resumed.taken:
            raise EnqueueError(f"run {run} cannot be resumed: {resumed.taken[0]}")
        return bool(resumed.runs)

    async def _ended(self, run: UUID) -> tuple[str, str | None, str | None]:
        if self._ends is None:
            self._ends = self._open_ends()
        return await self._ends.wait(run)

    def _envelope(self, workflow: Workflow[Any, Any], value: Any) -> str:
        if not isinstance(workflow, Workflow):
            raise EnqueueError(f"{workflow!r:.80} is not a workflow; decorate its function with @workflow(name)")
        try:
            workflow.check()
            text = workflow.envelope(workflow.encode_input(value))
        except DefinitionError as error:
            raise EnqueueError(str(error)) from error
        except Exception as error:
            raise EnqueueError(f"workflow {workflow.name}: its input cannot be stored as JSON: {error}") from error
        if len(text) > self._max_step_bytes:
            raise EnqueueError(
                f"workflow {workflow.name}: its input is {len(text)} bytes, more than the {self._max_step_bytes} "
                "allowed; store the data elsewhere and pass a reference to it"
            )
        return text


def _lane(workflow: Workflow[Any, Any], queue: str | None, priority: int | None) -> tuple[str, int]:
    try:
        return (
            workflow.policy.queue if queue is None else check_queue(queue),
            workflow.policy.priority if priority is None else check_priority(priority),
        )
    except ValueError as error:
        raise EnqueueError(str(error)) from None
