"""The statements of clients and commands on runs that they name: status, list, cancel, resume, signal.

Invariants: nothing here scans a table without bound; a run is cancelled with all its children or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from pgtask._postgres.refusals import KEPT_OUT, MAX_KEY_TRIES, refusals
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import plain_values, retry_on_deadlock
from pgtask._postgres.transactions import atomically, planned_by_index
from pgtask.errors import DataRefused, EnqueueError, RunNotFound
from pgtask.workflow import STEP, RunState

__all__ = [
    "CheckpointRow",
    "Resumed",
    "RunStatus",
    "TakenKey",
    "cancel_runs",
    "input_of",
    "list_runs",
    "read_checkpoints",
    "read_statuses",
    "resume_runs",
    "send_signal",
]

MAX_RUNS_READ = 100_000
MAX_UNBEGUN = 10_000
_CHUNK = 1000
_LATEST = UUID(int=2**128 - 1)


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A run as it was at `seen_at`, by the clock of the database.

    - `name`, `version`: its workflow; the version is None before its first checkpoint.
    - `state`: QUEUED (due, scheduled, or waiting until `due_at` for another try after a failure outside of steps),
      RUNNING, PAUSED (it waits for `waits_on`, until `due_at`; the year 9999 means forever), SUCCESS, ERROR (parked
      with `error`) or CANCELLED.
    - `last_step`, `recorded`: the name of its last checkpoint, and the count of its checkpoints.
    - `tried`: failed tries outside of steps since it last got a result; those of a step are in its checkpoint. Of a run
      that has ended as ERROR: the tries of the step, or of the function, that has failed.
    - `parent`: the run that has spawned it.
    - `input`, `output`: its input and its result, as JSON. `step`: the workflow and its input, as in `pg_task.step`.
    - `unread_signals`: the count of signals of each name that were sent to it and that it has not taken. A run that has
      ended well or was cancelled takes no more of them, unless it is resumed.
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
    input: str | None
    output: str | None
    unread_signals: dict[str, int]
    seen_at: datetime


def input_of(step: str | None) -> str | None:
    """Return the input of a run, as JSON, out of its step; None if the step has none."""
    try:
        (family,) = msgspec.json.decode(step or "", type=dict[str, dict[str, msgspec.Raw]]).values()
        return bytes(family[STEP]).decode()
    except (ValueError, KeyError):  # parked, for it cannot be read
        return None


class CheckpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint of a run; see the comments on the columns of `pg_task_checkpoints`."""

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


_IN_STATE = f"SELECT * FROM ({statement('runs/status')}) AS status WHERE state = $2 LIMIT $3"


async def read_statuses(connection: Any, runs: Sequence[UUID]) -> list[RunStatus]:
    """Read the status of those of the runs that exist, in this order."""
    rows = await connection.fetch(statement("runs/status"), runs)
    return [_status(plain_values(row)) for row in rows]


async def _read_in_state(connection: Any, runs: Sequence[UUID], state: RunState, limit: int) -> list[RunStatus]:
    """Read the first of the runs that are in a state. Fetches nothing of the others, which may have large inputs."""
    rows = await connection.fetch(_IN_STATE, runs, state, limit)
    return [_status(plain_values(row)) for row in rows]


def _status(values: dict[str, Any]) -> RunStatus:
    unread = msgspec.json.decode(values.pop("unread_signals") or "{}")
    return RunStatus(**values, input=input_of(values["step"]), unread_signals=unread)


async def list_runs(
    connection: Any,
    *,
    name: str | None,
    state: RunState | None,
    limit: int,
    before: UUID | None,
    max_read: int = MAX_RUNS_READ,
) -> tuple[list[RunStatus], UUID | None]:
    """List up to `limit` runs of a workflow (None: of all) in a state (None: any), the latest first; and the id before
    which to continue, None at the end. Reads `max_read` runs at most. Runs that plain SQL has triggered and that
    no worker has begun have no record: they are found among the latest `MAX_UNBEGUN` tasks."""
    found: list[RunStatus] = []
    after = before or _LATEST
    unbegun = await _list_unbegun(connection, name, state, limit, after)
    for _ in range(max_read // _CHUNK):
        chunk = _CHUNK if state is not None else min(_CHUNK, limit - len(found))
        text, *args = ("runs/list", after, chunk) if name is None else ("runs/list_named", after, chunk, name)
        ids = [UUID(int=row[0].int) for row in await connection.fetch(statement(text), *args)]
        is_last, last = len(ids) < chunk, ids[-1] if ids else after
        here = [id for id in unbegun if id < after and (is_last or id > last)]
        ids = sorted({*ids, *here}, reverse=True)
        left = limit - len(found)
        if state is None:
            found += await read_statuses(connection, ids[:left])
        else:
            found += await _read_in_state(connection, ids, state, left)
        if len(found) == limit:
            return found, found[-1].id
        if is_last:
            return found, None
        after = last
    return found, after


async def _list_unbegun(
    connection: Any, name: str | None, state: RunState | None, limit: int, before: UUID
) -> list[UUID]:
    """List runs that have no record."""
    if state in ("PAUSED", "SUCCESS", "CANCELLED"):  # these states need a record
        return []
    max_found = limit if state is None else MAX_UNBEGUN
    rows = await connection.fetch(statement("runs/list_unbegun"), before, max_found, name, MAX_UNBEGUN)
    return [UUID(int=row[0].int) for row in rows]


async def read_checkpoints(connection: Any, run: UUID, characters: int | None = None) -> list[CheckpointRow]:
    """Read the checkpoints of a run, in their order; of results and errors the first `characters`."""
    rows = await connection.fetch(statement("runs/checkpoints"), run, characters)
    return [CheckpointRow(**plain_values(row)) for row in rows]


async def cancel_runs(connection: Any, runs: Sequence[UUID], *, force: bool = True) -> list[UUID]:
    """Cancel runs and all their children that have not ended, in one transaction; returns those that it has cancelled.
    Without `force` it leaves a run alone that a worker holds, with its children.

    It goes level by level: a run that is gone spawns nothing more, so all its children are visible then; but not to an
    older snapshot. Raises `EnqueueError` in a transaction of the caller that has one.
    """
    level = await connection.fetchval("SHOW transaction_isolation") if connection.is_in_transaction() else None
    if level not in (None, "read committed", "read uncommitted"):
        raise EnqueueError(
            f"a run cannot be cancelled in a transaction that is {level.upper()}, which does not see what children the "
            "run has spawned since it began; make it READ COMMITTED"
        )

    async def cancel() -> list[UUID]:
        async with atomically(connection), planned_by_index(connection):
            cancelled: list[UUID] = []
            generation: list[Any] = sorted(runs)
            while generation:
                is_forced = force or bool(cancelled)
                gone = [row[0] for row in await connection.fetch(statement("runs/cancel"), generation, is_forced)]
                cancelled += gone
                generation = sorted(row[0] for row in await connection.fetch(statement("runs/children"), gone))
            return [UUID(int=run.int) for run in cancelled]

    return await retry_on_deadlock(connection, cancel)


class TakenKey(NamedTuple):
    """A cancelled run that cannot be put back, as another task now has its key."""

    run: UUID
    key: str
    task: UUID

    def __str__(self) -> str:
        taken = f"its key {self.key.partition('/')[2] or self.key!r} is that of task {self.task} by now"
        return f"{taken}; resume it when that has finished, or was cancelled"


class Resumed(NamedTuple):
    """The result of resuming runs: for a run that is in neither list there was nothing to do."""

    runs: list[UUID]
    taken: list[TakenKey]


async def resume_runs(connection: Any, runs: Sequence[UUID]) -> Resumed:
    """Resume runs that have ended as ERROR or were cancelled; wake those that pause or wait for another try."""
    resumed: list[UUID] = []
    left = [UUID(int=run.int) for run in runs]
    for _ in range(MAX_KEY_TRIES):
        async with planned_by_index(connection):
            with refusals():
                rows = await retry_on_deadlock(connection, partial(connection.fetch, statement("runs/resume"), left))
            resumed += [UUID(int=row[0].int) for row in rows]
            left = [run for run in left if run not in resumed]
            taken = await connection.fetch(statement("runs/taken_keys"), left) if left else []
        if all(row[2] is not None for row in taken):
            return Resumed(resumed, [TakenKey(UUID(int=run.int), key, UUID(int=task.int)) for run, key, task in taken])
        # A key was free again when we looked for the task that has it.
    run = next(run for run, _, task in taken if task is None)
    raise DataRefused(f"run {run} cannot be resumed, as its task was not inserted: {KEPT_OUT}")


async def send_signal(connection: Any, run: UUID, name: str, payload: str) -> bool:
    """Send a signal to a run; false if it has ended or never was. Raises `RunNotFound` for a task that is no run."""
    async with planned_by_index(connection):
        is_run = await connection.fetchval(statement("runs/signal"), run, name, payload)
    if is_run is False:
        raise RunNotFound(f"task {run} is not the run of a workflow; signal {name} was not sent")
    return is_run is not None
