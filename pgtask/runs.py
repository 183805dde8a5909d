"""The handle of a run: its status, its result, and the orders that a client gives it.

Invariant: a result is what the record of the run says.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

import msgspec

from pgtask._postgres.runs import RunStatus
from pgtask._validate import encode_signal
from pgtask.errors import DecodeError, ResultTimeout, RunCancelled, RunFailed, RunNotFound
from pgtask.workflow import Workflow

__all__ = ["Run", "RunStatus", "RunStore", "send_signal"]

OutputT = TypeVar("OutputT")


class RunStore(Protocol):
    """The records of runs, in a database or in memory."""

    async def read_status(self, run: UUID) -> RunStatus | None:
        """Return the status of a run, or None if there is no such run."""

    async def wait_for_end(self, run: UUID) -> tuple[str, str | None, str | None]:
        """Wait until a run has ended, and return its state, output and error."""

    async def send_signal(self, run: UUID, name: str, payload: str, conn: Any) -> bool:
        """Send a signal; false if the run has ended or never was."""

    async def cancel_run(self, run: UUID, conn: Any) -> bool:
        """Cancel a run and its children; false if it had ended before."""

    async def resume_run(self, run: UUID, conn: Any) -> bool:
        """Resume a run; false if there was nothing to do. Raises `EnqueueError` if another task has its key."""


class Run(Generic[OutputT]):
    """A run of a workflow, by its `id`. Holds no connection."""

    def __init__(self, store: RunStore, id: UUID, workflow: Workflow[Any, OutputT] | None) -> None:
        self.id = id
        self._store = store
        self._workflow = workflow

    def __repr__(self) -> str:
        return f"<run {self.id}>"

    async def status(self) -> RunStatus:
        """Return its status as of now. Raises `RunNotFound`."""
        found = await self._store.read_status(self.id)
        if found is None:
            raise RunNotFound(f"there is no run {self.id}")
        return found

    async def result(self, timeout: timedelta | float | None = None) -> OutputT:
        """Wait until the run has ended, and return its output; `timeout` is a timedelta or seconds.

        Raises `RunFailed` if it ends as ERROR, `RunCancelled`, and `ResultTimeout`. Waits also for a run that does not
        exist yet, as the transaction that triggers it is not committed. Cancelling this leaves the run alone.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        try:
            async with asyncio.timeout(seconds):
                state, output, error = await self._store.wait_for_end(self.id)
        except TimeoutError:
            raise ResultTimeout(f"run {self.id} has not ended within {seconds:g} s") from None
        if state == "CANCELLED":
            raise RunCancelled(f"run {self.id} was cancelled")
        if state == "ERROR" or output is None:
            raise RunFailed(self.id, error or "")
        if self._workflow is None:
            return msgspec.json.decode(output)  # type: ignore[no-any-return]
        try:
            return self._workflow._decode_output(output)  # type: ignore[no-any-return]
        except msgspec.DecodeError as wrong:
            raise DecodeError(f"the output of run {self.id} cannot be read: {wrong}") from None

    async def signal(self, name: str, value: Any = None, *, conn: Any = None) -> None:
        """Send it a signal: `client.signal(run.id, ...)`."""
        await send_signal(self._store, self.id, name, value, conn)

    async def cancel(self, *, conn: Any = None) -> bool:
        """End it and its children as CANCELLED, on whichever worker they are; false if it had ended before.

        A step that is running is not recorded any more. It is interrupted when its worker next renews the lease, and
        nothing starts after it. With `conn` it is part of the caller's transaction, which must be READ COMMITTED:
        raises `EnqueueError`.
        """
        return await self._store.cancel_run(self.id, conn)

    async def resume(self, *, conn: Any = None) -> bool:
        """Resume it after its last checkpoint if it has ended as ERROR or was cancelled; wake it if it pauses or waits
        for another try.

        False if there was nothing to do: it is due, scheduled or running, or has ended well. Raises `EnqueueError` if
        it was cancelled and its key now belongs to another task; then nothing has changed. With `conn` it is part of
        the caller's transaction.
        """
        return await self._store.resume_run(self.id, conn)


async def send_signal(store: RunStore, run: UUID, name: str, value: Any, conn: Any) -> None:
    """Send a signal to a run. Raises `RunNotFound`, and `EnqueueError` for a wrong name or value."""
    payload = encode_signal(name, value)
    if not await store.send_signal(run, name, payload, conn):
        raise RunNotFound(f"run {run} has ended, or never was; signal {name} was not sent")
