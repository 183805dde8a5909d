"""Consuming by hand: leases on the tasks of a queue, for code that wants the rows and not the framework.

Invariants: a task that was claimed here is in the caller's hands, or on its way back; a consumer that cannot renew or
listen any more says so at the next call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

from pgtask._consumer.held import Held, Lease
from pgtask._consumer.sender import Sender
from pgtask._events import log_event
from pgtask._fastpath import Table
from pgtask._postgres.migrate import check_schema
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask._worker.error_text import describe
from pgtask._worker.renew import Renew
from pgtask._worker.wake import Wake
from pgtask.app import App
from pgtask.errors import ConsumeError, DatabaseError, DatabaseUnavailable
from pgtask.policy import check_queue

__all__ = ["Consumer", "Lease"]

log = logging.getLogger("pgtask.consumer")

ANY_SIZE = 2**31 - 1  # bytes of a step: whoever consumes by hand gets it whole
FAREWELL = 5.0  # seconds that giving back may take at the end; then the leases run out
LONGEST = timedelta(days=365_000)


class Consumer:
    """Takes tasks of a queue and says what became of them. Made by `Client.consumer`, to be used by `async with`.

        async with client.consumer("emails") as consumer:
            while leases := await consumer.claim(limit=100, wait=timedelta(seconds=5)):
                await send([lease.step for lease in leases])
                await consumer.done(leases)

    While it is open, its leases are renewed from a thread and a connection of its own, also while your code blocks the
    loop. At its end, what is still held is given back. It has three connections, two behind a pooler.

    `done`, `retry`, `fail`, `release` and `extend` take a lease or any number of them and return those that were lost:
    somebody else has, or had, these tasks, and nothing was written. They are sent 5,000 at a time, each lot a statement
    and transaction of its own. They wait for a database that is away; to wait no longer than a time, put them under
    `asyncio.timeout`. When cancelled, they are carried through in the background. If the connection breaks while one is
    under way it is sent again; what the first attempt may have written is then not called lost.

    They raise `ConsumeError` for a lease that is not of this consumer or was settled before, and `done` for the run of
    a workflow, which only a worker finishes; nothing has been sent then. They raise `DataRefused` when a constraint
    or trigger of yours says no (that lot and those after it are not written, and still held); and `DatabaseRefused`.
    Entering raises what opening a `Client` does, and `SchemaError`.
    """

    def __init__(
        self, dsn: str, queues: str | Iterable[str], *, app: App | None, lease_timeout: timedelta, pooled: bool
    ) -> None:
        self._dsn, self._pooled = dsn, pooled
        self._queues = _check_queues(queues)
        self._table = None if app is None else Table(app)
        self._archives = app is not None and any(step.archive for step in app)
        self._lease_timeout = _seconds("lease_timeout", lease_timeout)
        if not self._lease_timeout:
            raise ConsumeError("lease_timeout must be longer than zero")
        self._hinted = asyncio.Event()
        self._failure: BaseException | None = None
        self._is_open = False

    async def __aenter__(self) -> Consumer:
        self._loop = asyncio.get_running_loop()
        name = f"pgtask consumer {os.getpid()}"
        self._link = Link(self._dsn, name, pooled=self._pooled)
        try:
            await check_schema(await self._link.open())
        except BaseException:
            self._link.drop()
            raise
        self._held = Held(self._table, self._lease_timeout, archives=self._archives)
        self._claim = Claim(
            self._link,
            worker=os.urandom(8),
            queues=self._queues,
            lease_timeout=self._lease_timeout,
            max_step_bytes=ANY_SIZE,
            shortest_poll=0.05 if self._pooled else 1.0,
            longest_poll=1.0 if self._pooled else 30.0,
        )
        self._sender = Sender(self._link, self._claim, self._held)
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
        wake = None if self._pooled else Wake(self._dsn, name=f"{name} listen", hint=self._hint, stop=None)
        self._listening = None if wake is None else asyncio.create_task(self._listen(wake))
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        if self._listening is not None:
            self._listening.cancel()
        try:
            async with asyncio.timeout(FAREWELL):
                while self._sender.running:
                    await asyncio.wait(self._sender.running)
                await self._sender.begin(self._sender.give_back, self._held.settle("release", self._held.all()))
        except TimeoutError:
            if self._held:
                log_event(log, logging.WARNING, "leases.abandoned", leases=len(self._held))
        finally:
            for task in self._sender.running:
                task.cancel()
            await asyncio.to_thread(self._renew.stop)
            if self._listening is not None:
                await asyncio.wait([self._listening])
            await self._link.close()

    # --- claim

    async def claim(self, limit: int = 100, wait: timedelta = timedelta(0)) -> list[Lease]:
        """Up to `limit` due tasks: the highest priority first, then the oldest. If there is none it waits for one, no
        longer than `wait`, and then returns none. What is enqueued meanwhile wakes it.

        If it is cancelled, what it has claimed, or is about to, is given back. Raises `ConsumeError` for a wrong
        argument, `DatabaseUnavailable` if the database is away when `wait` is over, and `DatabaseRefused`.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConsumeError(f"claim(limit={limit!r}) must be a whole number, 1 or more")
        deadline = time.monotonic() + _seconds("wait", wait)
        look = True
        while True:
            self._check_open()
            self._hinted.clear()
            leases = await self._take(limit, look, deadline)
            if leases or time.monotonic() >= deadline:
                return leases
            look = False
            if not self._claim.wanted:
                with suppress(TimeoutError):
                    until = min(deadline, self._claim.look_at)
                    async with asyncio.timeout(until - time.monotonic()):
                        await self._hinted.wait()

    async def _take(self, limit: int, look: bool, deadline: float) -> list[Lease]:
        """Take what is due, however long that takes, unless the database is away at the deadline."""
        taking = self._sender.begin(self._sender.take, limit, look=look)
        try:
            while not taking.done():
                await asyncio.wait({taking}, timeout=max(0.1, deadline - time.monotonic()))
                if not taking.done() and self._link.is_away and time.monotonic() >= deadline:
                    raise DatabaseUnavailable("the database is away; what a claim may have taken will be given back")
        except BaseException:
            taking.add_done_callback(self._take_back)
            raise
        return taking.result()

    def _take_back(self, taking: asyncio.Task[list[Lease]]) -> None:
        """A claim has ended whose caller is gone."""
        if not taking.cancelled() and taking.exception() is None and taking.result():
            self._sender.begin(self._sender.give_back, self._held.settle("release", taking.result()))

    # --- what became of them

    async def done(self, leases: Lease | Iterable[Lease]) -> list[Lease]:
        """These tasks are finished: their rows go, into the archive where the client's app says so. Returns the leases
        that were lost."""
        self._check_open()
        chosen = self._held.settle("done", leases)
        return await asyncio.shield(self._sender.begin(self._sender.finish, chosen))

    async def retry(self, leases: Lease | Iterable[Lease], after: timedelta = timedelta(0)) -> list[Lease]:
        """A try has failed: it is counted in `tried`, and the tasks are due again after a time (by the database's
        clock). How often is up to you: no policy is asked. Returns the leases that were lost."""
        self._check_open()
        delay = _seconds("after", after)
        chosen = self._held.settle("retry", leases)
        return await asyncio.shield(self._sender.begin(self._sender.move, chosen, None, delay))

    async def fail(self, leases: Lease | Iterable[Lease], reason: str | BaseException) -> list[Lease]:
        """Park these tasks with `reason` as their error: a text, or an exception with the chain of its causes. Returns
        the leases that were lost."""
        self._check_open()
        chosen = self._held.settle("fail", leases)
        return await asyncio.shield(self._sender.begin(self._sender.move, chosen, describe(reason), 0.0))

    async def release(self, leases: Lease | Iterable[Lease]) -> list[Lease]:
        """Give these tasks back as if they had never been claimed. Returns the leases that were lost."""
        self._check_open()
        chosen = self._held.settle("release", leases)
        return await asyncio.shield(self._sender.begin(self._sender.release, chosen))

    async def extend(self, leases: Lease | Iterable[Lease], by: timedelta | None = None) -> list[Lease]:
        """Renew these leases now. For `by` from now, if that is longer than the lease timeout: so long they hold even
        if this process stands still. Returns the leases that were lost.

        They are renewed in the background anyway; this is how to be sure of them before something that cannot be
        undone. A row that somebody else has locked just now is left to the background.
        """
        self._check_open()
        chosen = self._held.choose("extend", leases)
        seconds = max(self._lease_timeout, 0.0 if by is None else _seconds("by", by))
        return await asyncio.shield(self._sender.begin(self._sender.renew, chosen, seconds))

    # --- what goes on beside it

    def _hint(self) -> None:
        self._claim.hint()
        self._hinted.set()

    async def _listen(self, wake: Wake) -> None:
        try:
            await wake.run()
        except DatabaseError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """From any thread: it cannot go on."""
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


def _seconds(name: str, value: object) -> float:
    if not isinstance(value, timedelta) or not timedelta(0) <= value <= LONGEST:
        raise ConsumeError(f"{name}={value!r} must be a timedelta, zero or more, at most {LONGEST.days} days")
    return value.total_seconds()
