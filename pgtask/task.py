"""The vocabulary of user code: a task, its steps, and the context in which a step runs.

Invariant: a step is data. It holds no connection and no reference to the engine; both reach it through `Context`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias
from uuid import UUID

import msgspec

from pgtask._occurrences import scheduled_time
from pgtask._progress import Progress
from pgtask.errors import EnqueueError, OutcomeError
from pgtask.policy import Policy

if TYPE_CHECKING:
    from asyncpg import Pool, Record
    from asyncpg.pool import PoolConnectionProxy

    from pgtask.client import Client

    Connection: TypeAlias = PoolConnectionProxy[Record]
    Database: TypeAlias = Pool[Record]
else:
    Connection = Database = Any  # `help` reads annotations at run time, and this module must not import a driver

__all__ = ["RESERVED", "BatchContext", "Context", "Task", "family_of"]

RESERVED = ("policy", "transparent", "archive", "run", "run_batch")
"""Names that a field cannot have, since `Task` uses them."""


class Task(msgspec.Struct):
    """A closed family of steps: a direct subclass names the family, its subclasses are the steps.

    A step is a `msgspec.Struct`: its annotated attributes are its fields, stored as JSON in the row. It defines
    `async def run(self, ctx: Context) -> ...` (runs on the worker's loop) or `def run(...)` (runs in a thread); the
    return annotation (`Next[Step]`, `Done`, `Fail`, or a union of them: `-> Next[Read] | Next[Store] | Done`) is its
    part of the state machine.

    A step may have `run_batch` in place of `run`, for many steps of its class at once:

        @classmethod
        async def run_batch(cls, steps: Sequence[Embed], ctx: BatchContext) -> list[Next[Store] | Fail]: ...

    It returns one outcome for all steps, or a list with one for each, in their order; an element of that list may be
    an exception, which is a failed try of this step alone. `Policy(batch=...)` bounds a batch.

    - `policy`: the retries and the queue of a step; a family's policy is the default of its steps.
    - `transparent`: a step with exactly one field stores the bare value instead of an object (serde's newtype).
    - `archive`: whether a task that is `Done` at this step is kept in the table `pg_task_archive`; None takes the
      default of the app, `App(..., archive=...)`.
    """

    policy: ClassVar[Policy] = Policy()
    transparent: ClassVar[bool] = False
    archive: ClassVar[bool | None] = None


def family_of(cls: type[Task]) -> type[Task] | None:
    """Return the task of a step class: its ancestor that derives directly from `Task`; None for `Task` itself."""
    return next((ancestor for ancestor in cls.__mro__ if Task in ancestor.__bases__), None)


def _client_of(tools: Any) -> Client:
    if tools is None:
        raise EnqueueError("ctx.client: no worker has made this context; in a test, run the step by a MemoryWorker")
    client: Client = tools.client()
    return client


def _transactions_of(tools: Any) -> Any:
    if tools is None or tools.transactions is None:
        raise OutcomeError("ctx.transaction() needs a worker: this context has none")
    return tools.transactions


class Context(msgspec.Struct, eq=False):
    """The context of one try of one step. The worker makes it; do not keep it after the try.

    - `task_id`: the id of the row, the same through all steps and tries: an idempotency key for the outside world.
    - `attempt`: the number of this try of the step, from 1.
    - `db`: the worker's asyncpg pool for your own queries; all `async` steps of the process share it, `--pool-size`
      connections at most.
    - `resources`: the value that `App(..., lifespan=...)` has yielded, once per worker process; None without a
      lifespan.
    """

    task_id: UUID
    attempt: int
    db: Database
    resources: Any
    _tools: Any = None  # `StepTools` of the worker

    @property
    def client(self) -> Client:
        """The client of the worker, on the connections of `db`: enqueues tasks and triggers runs, for `async def` only.

        Raises `EnqueueError` in a thread, and in a context that no worker has made.
        """
        return _client_of(self._tools)

    @property
    def scheduled_for(self) -> datetime | None:
        """The time for which a schedule has started this task, in all of its steps; None if no schedule has."""
        return scheduled_time(self.task_id)

    def progress(self, done: int, total: int | None = None) -> None:
        """Report how much of the step is done, of a total if that is known. Safe in threads.

        It costs no statement: the worker writes the latest report when it next renews the lease, so steps that end
        before write none. `pgtask show` tells it. Raises `ValueError` for numbers that are not whole or are negative,
        and for a total below `done`.
        """
        report = Progress(done, total)
        if self._tools is not None and self._tools.progress is not None:
            self._tools.progress(self.task_id, self.attempt, report)

    def charge(self, units: float) -> None:
        """Charge the key of the limit of this step with units of its cost, beside those that the field of the step has
        announced; a negative number gives back. Safe in threads. Raises `ValueError` for what is no finite number.

        The worker writes it with the next outcomes. It does nothing if the limit of the step has no cost.
        """
        if isinstance(units, bool) or not isinstance(units, (int, float)) or not math.isfinite(units):
            raise ValueError(f"ctx.charge({units!r}) takes a number of units")
        if self._tools is not None and self._tools.charge is not None:
            self._tools.charge(self.task_id, units)

    def transaction(
        self, *, isolation: Literal["repeatable_read", "serializable"] | None = None
    ) -> AbstractAsyncContextManager[Connection]:
        """Begin a transaction whose writes commit together with the outcome of this step, or not at all.

            async with ctx.transaction() as conn:
                await conn.execute("INSERT INTO sums (id, sum) VALUES ($1, $2)", self.id, self.sum)
            return Done()

        `conn` is a connection of `ctx.db`. The transaction stays open after the block: the step returns, pgtask writes
        its outcome as the last statement, under the condition that the lease is still held, and commits. An exception,
        a cancellation or a timeout rolls back; then the try counts as any other. A further block in the same step is a
        savepoint. Leave COMMIT and ROLLBACK to pgtask.

        `isolation` is that of the transaction, READ COMMITTED by default. A step that loses a serialization conflict or
        a deadlock runs again at once without a used try, a few times in a row. For steps of tasks in `async def run`;
        raises `OutcomeError` elsewhere.
        """
        block: AbstractAsyncContextManager[Connection] = _transactions_of(self._tools).open(self, isolation)
        return block

    def __repr__(self) -> str:
        return f"Context(task_id={self.task_id}, attempt={self.attempt})"


class BatchContext(msgspec.Struct, eq=False):
    """The context of one call of `run_batch`. The worker makes it; do not keep it after the call.

    - `task_ids`: the ids of the rows, in the order of the steps.
    - `attempts`: the number of this try of each step, from 1.
    - `db`, `resources`: as in `Context`.
    """

    task_ids: Sequence[UUID]
    attempts: Sequence[int]
    db: Database
    resources: Any
    _tools: Any = None  # `StepTools` of the worker

    @property
    def client(self) -> Client:
        """The client of the worker, on the connections of `db`: enqueues tasks and triggers runs, for `async def` only.

        Raises `EnqueueError` in a thread, and in a context that no worker has made.
        """
        return _client_of(self._tools)

    @property
    def scheduled_for(self) -> list[datetime | None]:
        """For each step, the time for which a schedule has started its task; None if no schedule has."""
        return [scheduled_time(id) for id in self.task_ids]

    def transaction(
        self, *, isolation: Literal["repeatable_read", "serializable"] | None = None
    ) -> AbstractAsyncContextManager[Connection]:
        """Begin a transaction whose writes commit together with the outcomes of all steps of this call, or not at all.

            async with ctx.transaction() as conn:
                await conn.executemany("INSERT INTO sums (id, sum) VALUES ($1, $2)", [...])
            return Done()

        As `Context.transaction`. If the lease of a step was lost, all is rolled back, and the worker calls `run_batch`
        again without that step. For `async def run_batch`; raises `OutcomeError` in a thread.
        """
        block: AbstractAsyncContextManager[Connection] = _transactions_of(self._tools).open_batch(self, isolation)
        return block

    def __repr__(self) -> str:
        return f"BatchContext({len(self.task_ids)} tasks)"
