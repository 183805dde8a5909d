"""Consuming by hand: leases on the tasks of a queue, for code that wants the rows and not the framework.

Invariants: the caller has each task that was claimed here, or it is being released; a consumer that can no longer renew
or listen raises at the next call.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any

from pgtask._consumer.leases import ConsumerLeases, Lease
from pgtask._consumer.spans import receiving
from pgtask._consumer.statements import StatementQueue
from pgtask._delays import check_delay
from pgtask._error_text import describe
from pgtask._fastpath import Table
from pgtask._log import EventLog
from pgtask._postgres.migrate import check_schema
from pgtask._postgres.store import Link
from pgtask._postgres.times import allow_far_times
from pgtask._postgres.transactions import check_caller, refuse_read_only
from pgtask._worker.claim import Claim
from pgtask._worker.renew import Renew
from pgtask._worker.wake import Wake
from pgtask._wrong_with import AsyncWithOnly
from pgtask.app import App
from pgtask.errors import ConsumeError, DatabaseError, DatabaseUnavailable
from pgtask.policy import check_queue

__all__ = ["Consumer", "Lease"]

log = EventLog("pgtask.consumer")

MAX_STEP_BYTES = 2**31 - 1  # a consumer gets each step whole
RELEASE_TIMEOUT = 5.0  # seconds for the last release at the end; then the leases expire
_BY_HAND = b"hand"  # the tokens of consumers begin with it: expire.sql frees their leases one by one


class Consumer(AsyncWithOnly):
    """A consumer of the tasks of one or more queues. Made by `Client.consumer`; use it by `async with`.

        async with client.consumer("emails") as consumer:
            while leases := await consumer.claim(limit=100, wait=timedelta(seconds=5)):
                await send([lease.step for lease in leases])
                await consumer.done(leases)

    While it is open, a thread with a connection of its own renews its leases, also while your code blocks the loop. At
    its end, it releases the leases that you still hold. It has three connections, two behind a pooler.

    `done`, `retry`, `fail`, `release` and `extend` take a lease or any number of them and return those that were lost:
    a worker or another consumer has, or had, these tasks, and nothing was written. The consumer sends 5,000 at a time,
    each batch as a statement and transaction of its own. It waits while the database is unavailable; to bound that
    wait, use `asyncio.timeout`. When you cancel a call, it is carried through in the background. If the connection
    breaks during a statement, the consumer sends it again; what the first attempt may have written then does not count
    as lost.

    They raise `ConsumeError` for a lease of another consumer or one that you have settled before, and `done` for the
    run of a workflow, which only a worker finishes; nothing has been sent then. They raise `DataRefused` when a
    constraint or trigger of yours refuses (that batch and those after it are not written, and you still hold them); and
    `DatabaseRefused`. Entering raises the errors of opening a `Client`, and `SchemaError`.
    """

    _with_error = ConsumeError

    def __init__(
        self, dsn: str, queues: str | Iterable[str], *, app: App | None, lease_timeout: timedelta, pooled: bool
    ) -> None:
        self._dsn, self._pooled = dsn, pooled
        self._queues = _check_queues(queues)
        self._table = None if app is None else Table(app)
        self._archives = app is not None and any(step.archive for step in app)
        self._lease_timeout = _to_seconds("lease_timeout", lease_timeout)
        if not self._lease_timeout:
            raise ConsumeError("lease_timeout must be longer than zero")
        self._hinted = asyncio.Event()
        self._failure: BaseException | None = None
        self._wake: Wake | None = None
        self._waiting = 0  # calls of `claim` that wait for a task
        self._listening: asyncio.Task[None] | None = None
        self._is_open = False

    async def __aenter__(self) -> Consumer:
        self._loop = asyncio.get_running_loop()
        name = f"pgtask consumer {os.getpid()}"
        self._link = Link(self._dsn, name, pooled=self._pooled, on_open=allow_far_times)
        try:
            await check_schema(await self._link.open())
        except BaseException:
            self._link.drop()
            raise
        self._held = ConsumerLeases(self._table, self._lease_timeout, archives=self._archives)
        self._claim = Claim(
            self._link,
            worker=_BY_HAND + os.urandom(4),
            queues=self._queues,
            lease_timeout=self._lease_timeout,
            max_step_bytes=MAX_STEP_BYTES,
            min_poll=0.05 if self._pooled else 1.0,
            max_poll=1.0 if self._pooled else 30.0,
        )
        self._statements = StatementQueue(self._link, self._claim, self._held, listens=not self._pooled)
        self._renew = Renew(
            self._dsn,
            self._held.leases,
            name=f"{name} renew",
            pooled=self._pooled,
            lease_timeout=self._lease_timeout,
            heartbeat_interval=self._lease_timeout / 3,
            lost=self._held.lose,
            refused=self._fail,
        )
        self._renew.start()
        if not self._pooled:
            self._wake = Wake(
                self._dsn,
                name=f"{name} listen",
                queues=self._queues,
                hint=self._poll_soon,
                stop=None,
                behind=self._look_behind,
                paused=self._look_for_pauses,
            )
            self._listening = asyncio.create_task(self._listen(self._wake))
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        if self._listening is not None:
            self._listening.cancel()
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT):
                while self._statements.running:
                    await asyncio.wait(self._statements.running)
                unused = self._held.settle("release", self._held.unused())
                await self._statements.begin(self._statements.release_unused, unused)
        except TimeoutError:
            if self._held:
                log.warning("leases.abandoned", leases=len(self._held))
        finally:
            for task in self._statements.running:
                task.cancel()
            self._held.log_count()
            await asyncio.to_thread(self._renew.stop)
            if self._listening is not None:
                await asyncio.wait([self._listening])
            await self._link.close()

    # --- claim

    async def claim(self, limit: int = 100, wait: timedelta = timedelta(0)) -> list[Lease]:
        """Claim up to `limit` due tasks, the highest priority first, then the oldest.

        If no task is due, it waits for one, no longer than `wait`, and then returns an empty list. A task that is
        enqueued meanwhile wakes it. If you cancel it, it releases the tasks that it has claimed, or is about to claim.
        Raises `ConsumeError` for a wrong argument, `DatabaseUnavailable` if the database is unavailable when `wait` is
        over, and `DatabaseRefused`.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConsumeError(f"claim(limit={limit!r}) must be a whole number, 1 or more")
        began, deadline = time.time(), time.monotonic() + _to_seconds("wait", wait)
        polls = True
        while True:
            self._check_open()
            self._hinted.clear()
            leases = await self._claim_until(limit, polls, deadline)
            if leases:
                receiving(leases, began)
                return leases
            if time.monotonic() >= deadline:
                self._check_available()
                return []
            polls = False
            if not self._claim.may_find_tasks:
                statements = self._statements
                looks = min(statements.behind.due_at, statements.pauses.due_at, statements.groups.due_at)
                await self._wait_for_hint(min(deadline, self._claim.next_poll, looks))

    async def _wait_for_hint(self, until: float) -> None:
        """Wait until there may be a task, or until a time; writers notify this consumer meanwhile."""
        self._count_waiting(1)
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._hinted.wait()
        except TimeoutError:
            pass
        finally:
            self._count_waiting(-1)

    async def _claim_until(self, limit: int, polls: bool, deadline: float) -> list[Lease]:
        """Claim what is due, however long that takes, unless the database is unavailable at the deadline."""
        taking = self._statements.begin(self._statements.claim_leases, limit, polls=polls)
        try:
            while not taking.done():
                await asyncio.wait({taking}, timeout=max(0.1, deadline - time.monotonic()))
                if not taking.done() and time.monotonic() >= deadline:
                    self._check_available()
        except BaseException:
            taking.add_done_callback(self._release_taken)
            raise
        return taking.result()

    def _check_available(self) -> None:
        if self._link.is_unavailable:
            raise DatabaseUnavailable(
                "the database is unavailable; tasks that the claim may have taken will be released"
            )

    def _release_taken(self, taking: asyncio.Task[list[Lease]]) -> None:
        """Release what a claim has taken whose caller was cancelled."""
        if not taking.cancelled() and taking.exception() is None and taking.result():
            self._statements.begin(self._statements.release_unused, self._held.settle("release", taking.result()))

    # --- outcomes

    async def done(self, leases: Lease | Iterable[Lease], *, conn: Any = None) -> list[Lease]:
        """Finish these tasks: their rows leave the table, into the archive where the client's app says so. Returns the
        leases that were lost.

        With `conn=`, an asyncpg connection in a transaction of yours, that transaction finishes them: together with
        what you write in it, or not at all. If some were lost, roll it back, or undo what you have written for these.
        You hold the other leases until it commits, so you can try again after a rollback. Raises `RowsLocked` if
        another session has locked a row for two seconds; your transaction is as it was before.
        """
        self._check_open()
        if conn is not None:
            check_caller(conn, ConsumeError)
            with refuse_read_only(ConsumeError):
                return await self._statements.finish_within(conn, self._held.check("done", leases))
        chosen = self._held.settle("done", leases)
        return await asyncio.shield(self._statements.begin(self._statements.finish, chosen))

    async def retry(self, leases: Lease | Iterable[Lease], after: timedelta = timedelta(0)) -> list[Lease]:
        """Count a failed try in `tried`, and make the tasks due again after a time (by the database's clock). You
        decide how often: no policy applies. Returns the leases that were lost."""
        self._check_open()
        delay = _to_seconds("after", after)
        chosen = self._held.settle("retry", leases)
        return await asyncio.shield(self._statements.begin(self._statements.retry_or_park, chosen, None, delay))

    async def fail(self, leases: Lease | Iterable[Lease], reason: str | BaseException) -> list[Lease]:
        """Park these tasks with `reason` as their error: a text, or an exception with the chain of its causes. Returns
        the leases that were lost."""
        self._check_open()
        chosen = self._held.settle("fail", leases)
        return await asyncio.shield(
            self._statements.begin(self._statements.retry_or_park, chosen, describe(reason), 0.0)
        )

    async def release(self, leases: Lease | Iterable[Lease]) -> list[Lease]:
        """Release these tasks as if they had never been claimed. Returns the leases that were lost."""
        self._check_open()
        chosen = self._held.settle("release", leases)
        return await asyncio.shield(self._statements.begin(self._statements.release, chosen))

    async def extend(self, leases: Lease | Iterable[Lease], by: timedelta | None = None) -> list[Lease]:
        """Renew these leases now, to `by` from now if that is longer than the lease timeout: they hold for so long even
        if this process stands still. Returns the leases that were lost.

        The background renews them anyway; call this to be sure of them before something that you cannot undo. It leaves
        a row that another session has locked at this moment to the background.
        """
        self._check_open()
        chosen = self._held.check("extend", leases)
        seconds = max(self._lease_timeout, 0.0 if by is None else _to_seconds("by", by))
        return await asyncio.shield(self._statements.begin(self._statements.renew, chosen, seconds))

    # --- in the background

    def _look_behind(self) -> None:
        self._statements.behind.look_soon()
        self._hinted.set()

    def _look_for_pauses(self) -> None:
        self._statements.pauses.look_soon()
        self._hinted.set()

    def _poll_soon(self) -> None:
        self._claim.poll_soon()
        self._hinted.set()

    def _count_waiting(self, more: int) -> None:
        self._waiting += more
        if self._wake is not None:
            self._wake.sleep.set_waiting(self._waiting > 0)

    async def _listen(self, wake: Wake) -> None:
        try:
            await wake.run()
        except DatabaseError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Raise `error` at the next call, since the consumer cannot continue. Safe for any thread."""
        self._failure = self._failure or error
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hinted.set)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._is_open:
            raise ConsumeError("the consumer is not open; use it as: async with client.consumer() as consumer")


def _check_queues(queues: str | Iterable[str]) -> tuple[str, ...]:
    try:
        checked = tuple(dict.fromkeys(map(check_queue, [queues] if isinstance(queues, str) else queues)))
    except (TypeError, ValueError) as error:
        raise ConsumeError(str(error)) from None
    if not checked:
        raise ConsumeError("a consumer needs the name of at least one queue")
    return checked


def _to_seconds(name: str, value: timedelta) -> float:
    try:
        return check_delay(value, name + "={!r} must be").total_seconds()
    except ValueError as error:
        raise ConsumeError(str(error)) from None
