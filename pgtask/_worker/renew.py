"""renew: prolong the leases of long steps, from a thread of its own, and release leases that wait for too long.

Invariants: renewal does not depend on user code: a step that blocks the worker's loop keeps its lease, because this
thread has its own loop and its own connection. A lease counts from when its renewal was *sent*, by `lease_clock`, which
also runs while the machine is suspended; this thread gives up a lease that it could not renew in time, before the
database lets another worker have it. A task that was claimed ahead and cannot start, since a step blocks the loop or
steps that last have all slots, is released within a second: another worker may be idle.

Only code that holds the interpreter's lock without pause (a C extension that never releases it) stops this thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import msgspec

from pgtask._fastpath import Leases, TaskLease, executing_held, lease_executing
from pgtask._lease_clock import lease_clock
from pgtask._log import EventLog
from pgtask._postgres.portions import Portions
from pgtask._postgres.store import Link
from pgtask._progress import Progress
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, RowsLocked, StatementTimeout

__all__ = ["Renew"]

log = EventLog("pgtask.renew")

LOCK_TIMEOUT = 50  # milliseconds for a row that another session has locked, one at a time
MAX_WAIT = 0.7  # seconds that a lease may wait for its turn
WATCH_INTERVAL = 0.2  # seconds between two searches for such leases, while the worker holds any
RETRY_INTERVAL = 1.0  # seconds
MIN_LIMIT = 0.5  # seconds of one statement, at least; one that is too slow is sent in parts


class Renew:
    """Renews `leases`, from its own thread, in which it calls all callbacks.

    `lost` gets the leases that this worker has lost; `refused` the error that ends renewal; `released` the leases that
    it has released, and how many it could not release since their rows are locked. Without `released` it releases none.
    `call_soon` has the worker's loop call a function, which shows whether it is blocked; `abandon_claim` names a claim
    whose answer a blocked loop cannot read.

    It does not touch leases younger than `heartbeat_interval`, so short steps never pay for a renewal.
    """

    def __init__(
        self,
        dsn: str,
        leases: Leases,
        *,
        name: str,
        pooled: bool,
        lease_timeout: float,
        heartbeat_interval: float,
        lost: Callable[[list[TaskLease]], None],
        refused: Callable[[BaseException], None],
        released: Callable[[list[TaskLease], int], None] | None = None,
        call_soon: Callable[[Callable[[], None]], None] | None = None,
        abandon_claim: Callable[[float], UUID | None] | None = None,
    ) -> None:
        self._dsn, self._name, self._pooled = dsn, name, pooled
        self._leases = leases
        self._lease_timeout = lease_timeout
        self._heartbeat_interval = heartbeat_interval
        # Given up this long before its end, checked this often: the step is cancelled in the remaining time.
        self._tick = min(heartbeat_interval, lease_timeout - heartbeat_interval) / 4
        self.margin = 2 * self._tick
        self._max_delay = max(1.0, self._tick)  # seconds for a statement that renewal has to wait for
        self._lifetime = lease_timeout - self.margin
        self._lost = lost
        self._refused = refused
        self._released = released
        self._call_soon, self._abandon_claim = call_soon, abandon_claim
        self._blocking: list[TaskLease] = []  # the first held lease whose step has the loop, and since when
        self._blocking_since = 0.0
        self._called_at: float | None = None  # the time of a call that the loop has not made yet
        self._is_watching = False  # whether it searches for leases that wait
        self._thread = threading.Thread(target=self._main, name="pgtask-renew", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._holding = asyncio.Event()
        self._turn = asyncio.Lock()  # of the connection
        self.is_failing = False
        """Whether the last renewal has found the database unavailable."""
        self._slow: set[TaskLease] = set()  # those whose renewal alone was too slow

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the thread."""
        return self._loop

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and its connection; wait three seconds for it at most."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(3)

    def watch_waiting(self) -> None:
        """Search for leases that wait from now on, since leases were added. Call it on the worker's loop; it costs
        nothing while the search goes on."""
        if not self._is_watching and self._thread.is_alive():
            self._is_watching = True
            self._loop.call_soon_threadsafe(self._holding.set)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        except BaseException as error:  # without renewal the worker must not continue
            self._refused(error)
        finally:
            self._loop.close()

    async def _run(self) -> None:
        limit = {"statement_timeout": f"{1000 * max(MIN_LIMIT, self._tick / 2):.0f}ms"}
        link = Link(self._dsn, self._name, pooled=self._pooled, settings=limit)
        beside = [asyncio.create_task(self._give_up_late())]
        if self._released is not None:
            beside.append(asyncio.create_task(self._release_waiting(link, self._released)))
        while not self._stopping.is_set():
            try:
                await self._renew_due(link)
                if self.is_failing:
                    log.warning("renew.recovered")
                self.is_failing = False
            except DatabaseUnavailable as error:
                if not self.is_failing:
                    log.warning("renew.failed", error=str(error))
                self.is_failing = True
            except DatabaseRefused as error:
                self._refused(error)
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._tick, 0.5) if self.is_failing else self._tick):
                    await self._stopping.wait()
        async with self._turn:
            for task in beside:
                task.cancel()
        await link.close()

    async def _renew_due(self, link: Link) -> None:
        """Renew the leases older than the heartbeat interval, less half a tick, so that none just misses its turn."""
        sent = lease_clock()
        due = self._leases.renewed_before(sent - self._heartbeat_interval + self._tick / 2)
        if not due:
            return
        self._slow = {lease for lease in self._slow if lease.is_open}
        left = [lease for lease in due if lease in self._slow]
        portions = Portions([lease for lease in due if lease not in self._slow])

        async def renew(portion: Sequence[TaskLease]) -> None:
            left.extend(await self._renew_portion(link, list(portion)))

        while portions:
            if (slow := await portions.send_next(renew)) is not None:
                self._slow.add(slow)
                log.warning("database.slow", statement="renew", task=slow.id, step=slow.label)
        await self._renew_alone(link, left)

    async def _renew_portion(self, link: Link, portion: list[TaskLease]) -> list[TaskLease]:
        """Renew leases in one statement, and write the progress of their steps. Return those whose rows another session
        has locked."""
        sent = lease_clock()
        reports = self._leases.unwritten_progress(portion)
        parameters: list[Any] = [
            *([lease.id for lease in portion], [lease.token for lease in portion], self._lease_timeout)
        ]
        if reports is not None:
            parameters.append([_progress_json(*one) for one in zip(portion, reports, strict=True)])
        name = "renew" if reports is None else "renew_progress"
        async with self._turn:
            rows = await link.once(name, *parameters, deadline=max(1.0, self._heartbeat_interval))
        ours = {row[0]: row[1] for row in rows}
        renewed = [lease for lease in portion if ours.get(lease.id)]
        self._leases.mark_renewed(renewed, sent)
        if reports is not None:
            written = dict(zip(portion, reports, strict=True))
            for lease in renewed:
                self._leases.mark_written(lease, written[lease])
        gone = [lease for lease in portion if lease.id not in ours and lease.is_open]
        if gone:
            self._lost(gone)
        return [lease for lease in portion if ours.get(lease.id) is False]

    async def _renew_alone(self, link: Link, left: list[TaskLease]) -> None:
        """Renew leases one by one: those whose rows were locked, the oldest first, as our own journal may have locked
        them, again and again; then those that were too slow. Stop when it is time to renew the others again."""
        until = lease_clock() + self._tick
        for lease in sorted(left, key=lambda lease: (lease in self._slow, lease.renewed)):
            sent = lease_clock()
            if sent > until:
                return
            with contextlib.suppress(RowsLocked, StatementTimeout):
                parameters = (lease.id, lease.token, self._lease_timeout, LOCK_TIMEOUT)
                async with self._turn:
                    rows = await link.once("renew_locked", *parameters, deadline=max(1.0, self._heartbeat_interval))
                if rows:
                    self._leases.mark_renewed([lease], sent)

    async def _give_up_late(self) -> None:
        """Give up leases before the database gives them to another worker; beside the renewal, which may hang."""
        while True:
            late = [lease for lease in self._leases.renewed_before(lease_clock() - self._lifetime) if lease.is_open]
            if late:
                self._lost(late)
            await asyncio.sleep(self._tick)

    async def _release_waiting(self, link: Link, released: Callable[[list[TaskLease], int], None]) -> None:
        """Release leases that have waited for their turn for too long. A lease whose row is locked is tried again."""
        taken: list[TaskLease] = []
        reported = 0  # of `taken`, the leases that `released` knows to be locked
        try:
            while True:
                if not len(self._leases) and not executing_held():
                    self._is_watching = False
                    if not len(self._leases):  # else they were added just before
                        await self._holding.wait()
                    self._is_watching = True
                self._holding.clear()
                await asyncio.sleep(WATCH_INTERVAL)
                await self._recover_claim(link)
                await self._lease_blocking(link)
                taken += self._leases.take_overdue(MAX_WAIT)
                if not taken:
                    continue
                try:
                    locked = await self._release(link, taken)
                except DatabaseUnavailable:  # no other worker could claim them now
                    await asyncio.sleep(RETRY_INTERVAL)
                    continue
                free = [lease for lease in taken if lease.id not in locked]
                taken = [lease for lease in taken if lease.id in locked]
                if free or len(taken) != reported:
                    reported = len(taken)
                    released(free, reported)
        except DatabaseRefused as error:
            self._refused(error)

    async def _recover_claim(self, link: Link) -> None:
        """Release what a claim took whose answer the loop cannot read, since it is blocked."""
        if self._call_soon is None or self._abandon_claim is None:
            return
        if self._called_at is None:
            self._called_at = time.monotonic()
            self._call_soon(self._answer_call)
        elif time.monotonic() - self._called_at > MAX_WAIT and (token := self._abandon_claim(MAX_WAIT)) is not None:
            with contextlib.suppress(DatabaseUnavailable):  # the worker's loop does it too, once it reads the answer
                async with self._turn:
                    await link.once("claim_recover", token, deadline=self._max_delay)

    async def _lease_blocking(self, link: Link) -> None:
        """Lease the tasks whose step, or call of a batch, blocks the loop, if the transaction that held their rows is
        over since then. Otherwise one worker after the other would run them, and block."""
        held = executing_held()
        if held[:1] != self._blocking:
            self._blocking, self._blocking_since = held[:1], time.monotonic()
        if not held or time.monotonic() - self._blocking_since < self._lease_timeout:
            return
        sent, token, ids = lease_clock(), held[0].token, [lease.id for lease in held]
        parameters = ids, token, self._lease_timeout, held[0].limit_key  # the steps of a call of a batch have none
        with contextlib.suppress(DatabaseUnavailable):
            async with self._turn:
                rows = await link.once("turn_lease", *parameters, deadline=self._max_delay)
            taken = {row[0] for row in rows}
            leased = [lease for lease in held if lease.id in taken]
            ended = lease_executing(self._leases, leased, sent)
            if ended:
                await self._release(link, ended)
            elif leased:
                log.warning("hold.blocked", task=leased[0].id, step=leased[0].label, tasks=len(leased), action="leased")

    def _answer_call(self) -> None:
        self._called_at = None

    async def _release(self, link: Link, leases: list[TaskLease]) -> set[UUID]:
        """Release leases; return the ids of those that stay ours, since another session has locked their rows.

        One whose release is too slow is given up: its lease expires, as it is renewed no more."""
        stay: set[UUID] = set()

        async def release(portion: Sequence[TaskLease]) -> None:
            ids, tokens = [lease.id for lease in portion], [lease.token for lease in portion]
            async with self._turn:
                ((_, _, _, locked),) = await link.once("release", ids, tokens, [], deadline=self._max_delay)
            stay.update(locked or ())

        portions = Portions(leases)
        while portions:
            if (slow := await portions.send_next(release)) is not None:
                log.warning("database.slow", statement="release", task=slow.id, step=slow.label)
        return stay


def _progress_json(lease: TaskLease, progress: Progress | None) -> str:
    """Return the progress as its row holds it."""
    if progress is None:
        return "null"
    fields = {"done": progress.done, "total": progress.total, "lease": str(lease.token)}
    return msgspec.json.encode(fields).decode()
