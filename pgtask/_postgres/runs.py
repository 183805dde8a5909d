"""The statements about runs that are named, for clients and commands: how they are, and what is to become of them.

Invariants: nothing here scans a table without bound; a run is cancelled with all its children or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec

from pgtask._postgres.store import statement
from pgtask._postgres.tasks import again_after_deadlock, plain_values
from pgtask.errors import EnqueueError, RunNotFound

__all__ = [
    "CheckpointRow",
    "Resumed",
    "RunState",
    "RunStatus",
    "TakenKey",
    "cancel_runs",
    "list_runs",
    "read_checkpoints",
    "read_statuses",
    "resume_runs",
    "send_signal",
]

RunState = Literal["QUEUED", "RUNNING", "PAUSED", "SUCCESS", "ERROR", "CANCELLED"]

MOST_LOOKED_AT = 100_000
_CHUNK = 1000
_LATEST = UUID(int=2**128 - 1)


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A run as it was at `seen_at`, by the clock of the database.

    - `name`, `version`: its workflow; the version is None before its first checkpoint.
    - `state`: QUEUED (due, scheduled, or at `due_at` to be tried again that failed outside of steps), RUNNING, PAUSED
      (it waits for `waits_on`, until `due_at`; the year 9999 is for ever), SUCCESS, ERROR (parked with `error`) or
      CANCELLED.
    - `last_step`, `recorded`: the last thing it recorded, and how many these are.
    - `tried`: failed tries outside of steps since it last got a result; those of a step are in its checkpoint.
    - `parent`: the run that has spawned it.
    - `step`: the workflow and its input, as in `pg_task.step`. `output`: what it has returned, as JSON.
    """

    id: UUID
    name: str | None
    state: RunState
    version: int | None
    parent: UUID | None
    last_step: str | None
    recorded: int
    waits_on: str | None
    due_at: datetime | None
    tried: int
    error: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    step: str | None
    output: str | None
    seen_at: datetime


class CheckpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a run has recorded; see the comments on the columns of `pg_task_checkpoints`."""

    number: int
    place: str
    kind: str
    name: str
    result: str | None
    error: str | None
    due_at: datetime | None
    tried: int
    seconds: float
    recorded_at: datetime


async def read_statuses(connection: Any, runs: Sequence[UUID]) -> list[RunStatus]:
    """Those of the runs that exist, in this order."""
    rows = await connection.fetch(statement("runs/status"), runs)
    return [RunStatus(**plain_values(row)) for row in rows]


async def list_runs(
    connection: Any, *, name: str | None, state: RunState | None, limit: int, before: UUID | None
) -> tuple[list[RunStatus], UUID | None]:
    """Up to `limit` runs of a workflow (None: of all) in a state (None: any), the latest first; and the id before which
    to look on, None at the end. Looks at `MOST_LOOKED_AT` runs at most."""
    found: list[RunStatus] = []
    after = before or _LATEST
    for _ in range(MOST_LOOKED_AT // _CHUNK):
        chunk = _CHUNK if state is not None else min(_CHUNK, limit - len(found))
        words = ("runs/list", after, chunk) if name is None else ("runs/list_named", after, chunk, name)
        ids = [row[0] for row in await connection.fetch(statement(words[0]), *words[1:])]
        for status in await read_statuses(connection, ids):
            if state in (None, status.state):
                found.append(status)
                if len(found) == limit:
                    return found, status.id
        if len(ids) < chunk:
            return found, None
        after = UUID(int=ids[-1].int)
    return found, after


async def read_checkpoints(connection: Any, run: UUID, characters: int | None = None) -> list[CheckpointRow]:
    """What a run has recorded, in that order; of results and errors the first `characters`."""
    rows = await connection.fetch(statement("runs/checkpoints"), run, characters)
    return [CheckpointRow(**plain_values(row)) for row in rows]


async def cancel_runs(connection: Any, runs: Sequence[UUID], *, force: bool = True) -> list[UUID]:
    """End runs and all their children that have not ended, in one transaction; those for which that was done. Without
    `force` a run that a worker has is left alone, with its children.

    Level by level: when a run is gone it spawns nothing any more, so its children are all there to be seen; but not by
    a snapshot from before. Raises `EnqueueError` in a transaction of the caller's that has such a one.
    """
    isolation = None if connection.is_in_transaction() else "read_committed"
    if isolation is None and (level := await connection.fetchval("SHOW transaction_isolation")) != "read committed":
        raise EnqueueError(
            f"a run cannot be cancelled in a transaction that is {level.upper()}, which does not see what children the "
            "run has spawned since it began; make it READ COMMITTED"
        )

    async def cancel() -> list[UUID]:
        async with connection.transaction(isolation=isolation):
            cancelled: list[UUID] = []
            level: list[Any] = sorted(runs)
            while level:
                is_forced = force or bool(cancelled)
                gone = [row[0] for row in await connection.fetch(statement("runs/cancel"), level, is_forced)]
                cancelled += gone
                level = sorted(row[0] for row in await connection.fetch(statement("runs/children"), gone))
            return [UUID(int=run.int) for run in cancelled]

    return await again_after_deadlock(connection, cancel)


class TakenKey(NamedTuple):
    """A cancelled run that cannot be put back, as another task has its key by now."""

    run: UUID
    key: str
    task: UUID

    def __str__(self) -> str:
        taken = f"its key {self.key!r} is that of task {self.task} by now"
        return f"{taken}; resume it when that has finished, or was cancelled"


class Resumed(NamedTuple):
    """What became of runs that were to be resumed; of those that are in neither list there was nothing to do."""

    runs: list[UUID]
    taken: list[TakenKey]


async def resume_runs(connection: Any, runs: Sequence[UUID]) -> Resumed:
    """Let runs go on that have ended as ERROR or were cancelled, wake those that pause or are to be tried again."""
    resumed: list[UUID] = []
    left = [UUID(int=run.int) for run in runs]
    while True:
        rows = await again_after_deadlock(connection, partial(connection.fetch, statement("runs/resume"), left))
        resumed += [UUID(int=row[0].int) for row in rows]
        left = [run for run in left if run not in resumed]
        taken = await connection.fetch(statement("runs/taken_keys"), left) if left else []
        if all(row[2] is not None for row in taken):
            return Resumed(resumed, [TakenKey(UUID(int=run.int), key, UUID(int=task.int)) for run, key, task in taken])
        # A key was free again when we looked for who has it.


async def send_signal(connection: Any, run: UUID, name: str, payload: str) -> bool:
    """Send a signal to a run that has not ended; whether it was there. Raises `RunNotFound` for a task that is no
    run."""
    is_run = await connection.fetchval(statement("runs/signal"), run, name, payload)
    if is_run is False:
        raise RunNotFound(f"task {run} is not the run of a workflow; signal {name} was not sent")
    return is_run is not None
