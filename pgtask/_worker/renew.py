"""renew: prolong the leases of long steps, from a thread of its own.

Invariants: renewal does not depend on user code: a step that blocks the worker's loop keeps its lease, because this
thread has its own loop and its own connection. A lease counts from when its renewal was *sent*, by the local monotonic
clock; one that could not be renewed in time is given up here before the database lets somebody else have it.

What stops this thread is code that holds the interpreter's lock without pause (a C extension that never releases it).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

from pgtask._events import log_event
from pgtask._fastpath import Lease, Leases
from pgtask._postgres.store import Link
from pgtask.errors import DatabaseRefused, DatabaseUnavailable

__all__ = ["Renew"]

log = logging.getLogger("pgtask.renew")


class Renew:
    """Renews `leases`; `lost` is called, in the renewing thread, with those that are no longer ours.

    Leases younger than `heartbeat_interval` are not touched, so short steps never pay for a renewal.
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
        lost: Callable[[list[Lease]], None],
        refused: Callable[[BaseException], None],
    ) -> None:
        self._dsn, self._name, self._pooled = dsn, name, pooled
        self._leases = leases
        self._lease_timeout = lease_timeout
        self._heartbeat_interval = heartbeat_interval
        # Given up this long before its end, checked this often: the rest is for the step to be cancelled in.
        self._tick = min(heartbeat_interval, lease_timeout - heartbeat_interval) / 4
        self.margin = 2 * self._tick
        self._lifetime = lease_timeout - self.margin
        self._lost = lost
        self._refused = refused
        self._thread = threading.Thread(target=self._main, name="pgtask-renew", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and its connection; waits three seconds for it at most."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(3)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._run())
        except BaseException as error:  # without renewal the worker must not go on
            self._refused(error)
        finally:
            self._loop.close()

    async def _run(self) -> None:
        link = Link(self._dsn, self._name, pooled=self._pooled)
        watch = asyncio.create_task(self._give_up_late())
        away = False
        while not self._stopping.is_set():
            try:
                await self._renew_due(link)
                if away:
                    log_event(log, logging.WARNING, "renew.back")
                away = False
            except DatabaseUnavailable as error:
                if not away:
                    log_event(log, logging.WARNING, "renew.failed", error=str(error))
                away = True
            except DatabaseRefused as error:
                self._refused(error)
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._tick, 0.5) if away else self._tick):
                    await self._stopping.wait()
        watch.cancel()
        await link.close()

    async def _renew_due(self, link: Link) -> None:
        """Renew what is older than the heartbeat interval (less half a tick, so that none just misses its turn)."""
        sent = time.monotonic()
        due = self._leases.due(sent - self._heartbeat_interval + self._tick / 2)
        if not due:
            return
        rows = await link.once(
            "renew",
            [lease.id for lease in due],
            [lease.token for lease in due],
            self._lease_timeout,
            deadline=max(1.0, self._heartbeat_interval),
        )
        ours = {row[0]: row[1] for row in rows}
        self._leases.renewed([lease for lease in due if ours.get(lease.id)], sent)
        gone = [lease for lease in due if lease.id not in ours and lease.is_open]
        if gone:
            self._lost(gone)

    async def _give_up_late(self) -> None:
        """Beside the renewal, which may hang: a lease ends here before the database gives it to somebody else."""
        while True:
            late = [lease for lease in self._leases.due(time.monotonic() - self._lifetime) if lease.is_open]
            if late:
                self._lost(late)
            await asyncio.sleep(self._tick)
