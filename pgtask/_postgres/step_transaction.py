"""The transaction of a step: what the step writes in it commits together with the outcome of its task, or not at all.

Invariants: the statement that writes the outcome is the last one of the transaction, and its fence; the connection goes
back to the pool when the fate of the transaction is known, or when the connection is lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias

import asyncpg

from pgtask._fastpath import Outcomes, TaskLease
from pgtask._postgres.connection import PLAN_SETTINGS, is_connection_loss, map_errors
from pgtask._postgres.pools import release_quietly
from pgtask._postgres.store import DEADLINE, statement
from pgtask._postgres.transactions import planned_by_index
from pgtask.errors import DatabaseError, DatabaseUnavailable, OutcomeError

__all__ = ["CommitUnknown", "Interrupted", "Isolation", "StepTransaction", "forget", "is_conflict"]

Isolation: TypeAlias = Literal["repeatable_read", "serializable"]

ROLLBACK_TIMEOUT = 5.0  # seconds; then the connection is dropped, which does the same
LOCK_TIMEOUT = "2s"  # for the rows of the tasks: renewals, for one, lock them for a moment
INTERRUPTION_DELAY = 1.0  # seconds until a step runs again whose connection was lost, or whose row was locked
MAX_CONFLICT_DELAY = 0.1  # seconds until one runs again that has lost a race
MAX_HOLDS = 5  # tries to lock the rows of the leases, each under a snapshot of its own
_FENCE: dict[str, str | None] = {
    **PLAN_SETTINGS,
    "lock_timeout": LOCK_TIMEOUT,
    "statement_timeout": "30s",
    "pgtask.nowait": "on",
    "search_path": None,  # the table is found as in other sessions of ours, whatever the step has set
    "role": None,
}
"""The settings under which the outcome is written. None is the default of the session."""


def forget(transaction: StepTransaction) -> None:
    """Take a transaction that has ended from its leases."""
    for lease in transaction.leases:
        if lease.transaction is transaction:
            lease.transaction = None


class Interrupted(Exception):
    """The transaction was rolled back through no fault of its step.

    `error` is the cause; `delay`: the seconds until its steps run again. One that has lost a race against another
    transaction may run again at once: after a random time, so that two do not meet again.
    """

    def __init__(self, error: BaseException, *, lost_race: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        has_lost = lost_race or is_conflict(error)
        self.delay = random.uniform(0.0, MAX_CONFLICT_DELAY) if has_lost else INTERRUPTION_DELAY


class CommitUnknown(Exception):
    """The connection was lost while the COMMIT was under way: the transaction may have been committed or not."""


def is_conflict(error: BaseException | None) -> bool:
    """Return whether the server has rolled a transaction back for the sake of another one: a serialization failure or a
    deadlock."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in ("40001", "40P01")


class StepTransaction:
    """One transaction of a step with these leases, on a connection of `pool`.

    `idle_timeout`: the milliseconds after which the server ends it if its worker sends nothing, as a frozen one does.
    `has_rows`: whether the tasks are in the database, and not in memory.
    """

    def __init__(
        self,
        pool: Any,
        leases: Sequence[TaskLease],
        *,
        isolation: Isolation | None,
        idle_timeout: int,
        has_rows: bool = True,
    ) -> None:
        self._pool = pool
        self._has_rows = has_rows
        self.leases = list(leases)
        self.isolation = isolation
        self._idle_timeout = idle_timeout
        self._transaction: Any = None
        self._raw: Any = None
        self._savepoints: list[Any] = []
        self.connection: Any = None
        """The connection of asyncpg, from its first use until its release."""
        self.is_open = False
        """True once it has begun, until its end is tried."""
        self.is_over = False
        """True once its connection is released, or was not given."""
        self.watch: asyncio.TimerHandle | None = None
        """A timer that is cancelled when the connection is released."""
        self.lost_race = False
        """Whether an error ended it that another transaction was the cause of."""

    @property
    def label(self) -> str:
        return self.leases[0].label

    # --- the part of the step

    async def begin(self) -> None:
        """Acquire a connection and begin. Raises what the pool and asyncpg raise."""
        try:
            self.connection = await self._pool.acquire()
        except BaseException:
            self.is_over = True
            raise
        # The connection behind the proxy of the pool; in a test the pool may be one of the user's.
        self._raw = self.connection.itself() if hasattr(self.connection, "itself") else self.connection
        try:
            await self._start()
            if self.isolation is not None and self._has_rows:
                await self._hold()
            self.is_open = True
        except BaseException as error:
            self.lost_race = is_conflict(error)
            await self.roll_back()
            raise

    async def _start(self) -> None:
        self._transaction = self._raw.transaction(isolation=self.isolation or "read_committed")
        settings = (
            f"SET LOCAL idle_in_transaction_session_timeout = {self._idle_timeout}; SET LOCAL pgtask.transaction = 'on'"
        )
        if hasattr(self._raw, "add_to_begin"):
            self._raw.add_to_begin(settings)
            await self._transaction.start()
        else:
            await self._transaction.start()
            await self._raw.execute(settings)

    async def _hold(self) -> None:
        """Lock the rows of the leases, since no renewal must change them after the snapshot of this transaction."""
        for number in range(1, MAX_HOLDS + 1):
            try:
                async with planned_by_index(self._raw, lock_timeout=LOCK_TIMEOUT):
                    held = await self._raw.fetch(statement("lock_leases"), *_ids_and_tokens(self.leases))
                break
            except (asyncpg.SerializationError, asyncpg.LockNotAvailableError):
                if number == MAX_HOLDS:
                    raise
                await self._transaction.rollback()
                await self._start()
        if len(held) < len(self.leases):
            raise OutcomeError(f"{self.label} has lost its lease, so it cannot begin a transaction")
        for lease in self.leases:
            lease.has_locked_row = True

    async def open_savepoint(self) -> Any:
        """Open a savepoint, and return it for `close_savepoint`."""
        savepoint = self.connection.transaction()
        await savepoint.start()
        self._savepoints.append(savepoint)
        return savepoint

    async def close_savepoint(self, savepoint: Any, error: BaseException | None) -> None:
        """Release a savepoint, or roll back to it. Raises `OutcomeError` unless it is the innermost one."""
        if not self.is_open:
            return
        if self._savepoints[-1:] != [savepoint]:
            raise OutcomeError(
                f"{self.label}: blocks of ctx.transaction() overlap; use them one after the other or one in the other, "
                "and in one asyncio task"
            )
        self._savepoints.pop()
        if error is None:
            await savepoint.commit()
            return
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
            await savepoint.rollback()  # if that fails, so does the whole transaction, and the step gets its own error

    # --- the end

    async def write(self, outcomes: Outcomes, position: int) -> Any:
        """Write the outcomes, as the last statement. Return the row of its answer, as that of flush.sql.

        Raises `Interrupted`, and `OutcomeError` if the step has left no transaction in which that is possible; the
        caller rolls it back.
        """
        is_plain = len(outcomes) == len(outcomes.done) == 1 and outcomes.statement == "flush"
        if is_plain and await self._finish_one(outcomes.done[0]):
            return None, None, None
        await self.check_unbroken()
        with self._ending():
            rows = await self._raw.fetch(statement(outcomes.statement), *outcomes.parameters(position))
        return rows[0]

    async def _finish_one(self, lease: TaskLease) -> bool:
        """Finish one task in one round trip. False if the row was not found."""
        text = statement("finish_one").replace("$1", f"'{lease.id}'").replace("$2", f"'{lease.token}'")
        with self._ending():
            self._check_connection()
            return bool(await self._raw.execute(text) == "DELETE 1")

    async def check_unbroken(self) -> None:
        """Prepare it for the outcome. Raises as `write` does."""
        with self._ending():
            self._check_connection()
            mark = await self._raw.fetchval(statement("fence"), list(_FENCE), list(_FENCE.values()))
        if mark != "on":
            raise self._ended_by_hand()

    def _check_connection(self) -> None:
        """Raise `OutcomeError` if the step has not left the connection in its transaction."""
        if self._is_released_by_hand() or not (self._raw.is_closed() or self._raw.is_in_transaction()):
            raise self._ended_by_hand()
        if self._savepoints:
            raise OutcomeError(
                f"{self.label} returned inside a block of ctx.transaction() that another asyncio task has open; "
                "await that task first"
            )

    def _is_released_by_hand(self) -> bool:
        """Return whether the step has released the connection, which may be another's now."""
        try:
            self.connection.is_closed()
        except asyncpg.InterfaceError:
            return not self._raw.is_closed()
        return False

    def left_behind(self) -> OutcomeError:
        """Return the error of a step that has returned while another asyncio task begins its transaction."""
        return OutcomeError(
            f"{self.label} returned while another asyncio task begins ctx.transaction(); await that task first"
        )

    def _ended_by_hand(self) -> OutcomeError:
        return OutcomeError(
            f"{self.label} has ended the transaction of ctx.transaction() by itself: leave COMMIT, ROLLBACK and the "
            "release of the connection to pgtask, which commits with the outcome of the step; to undo, raise"
        )

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Bound what is sent, and turn its errors into ours."""
        watchdog = asyncio.get_running_loop().call_later(DEADLINE, self._raw.terminate)
        try:
            with map_errors():
                yield
        except DatabaseUnavailable as error:
            raise Interrupted(error.__cause__ or error) from error
        except DatabaseError as error:
            if isinstance(error.__cause__, asyncpg.InFailedSQLTransactionError):
                raise OutcomeError(
                    f"the transaction of {self.label} has failed in a statement whose error the step has caught: let "
                    "it raise, or put that statement into a block of its own, async with ctx.transaction()"
                ) from None
            if isinstance(error.__cause__, asyncpg.InterfaceError):
                raise OutcomeError(
                    f"{self.label} has left its connection in use: await all that uses it ({error})"
                ) from error
            raise OutcomeError(f"the outcome of {self.label} was refused by the database: {error}") from error
        finally:
            watchdog.cancel()

    async def commit(self) -> None:
        """Commit. Raises `CommitUnknown`, `Interrupted`, or an error of asyncpg, as of a deferred constraint; the
        server has rolled it back in the last two cases."""
        self.is_open = False
        transaction, self._transaction = self._transaction, None
        watchdog = asyncio.get_running_loop().call_later(DEADLINE, self._raw.terminate)
        try:
            await transaction.commit()
        except asyncpg.PostgresError as error:
            if is_connection_loss(error):
                raise CommitUnknown from error
            if is_conflict(error):
                raise Interrupted(error) from error
            raise
        except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            raise CommitUnknown from error
        finally:
            watchdog.cancel()

    async def roll_back(self) -> None:
        """Roll back, unless it has ended, and release the connection."""
        self.is_open = False
        try:
            if self._transaction is not None and not self._raw.is_closed() and not self._is_released_by_hand():
                async with asyncio.timeout(ROLLBACK_TIMEOUT):
                    await self._transaction.rollback()
        except asyncio.CancelledError:
            self._raw.terminate()
            raise
        except Exception:  # the connection is lost, or in use by what the step has left behind
            self._raw.terminate()
        finally:
            await self.release()

    async def release(self) -> None:
        """Release the connection. It is no longer that of the step then."""
        self.is_over = True
        if self.watch is not None:
            self.watch.cancel()
        for lease in self.leases:
            lease.has_locked_row = False
        connection, self.connection = self.connection, None
        if connection is not None:
            await release_quietly(self._pool, connection)


def _ids_and_tokens(leases: Sequence[TaskLease]) -> tuple[list[Any], list[Any]]:
    return [lease.id for lease in leases], [lease.token for lease in leases]
