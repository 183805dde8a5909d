"""wake: learn by notification that a task may have become due.

Invariants: a notification is a hint and carries no truth; the connection listens first and then hints once, so nothing
that was committed before it listened is missed; nothing but LISTEN, a ping and the statements of `sleep` ever runs on
it. The one exception is the plain `stop_worker` of pg_task, whose sender leaves nothing else; `pgtask stop` leaves a
row that this stage reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from pgtask._log import EventLog
from pgtask._postgres.stops import read_last_stop
from pgtask._postgres.store import Link, statement
from pgtask._worker.sleep import Sleep

__all__ = ["BEHIND", "CHANNEL", "PAUSED", "STOP", "Wake"]

log = EventLog("pgtask.wake")

CHANNEL = "pg_task_changed"
STOP = "stop_worker"
BEHIND = "behind"
PAUSED = "paused"
PING_INTERVAL = 30.0
PING_DEADLINE = 10.0


class Wake:
    """Listens on a connection of its own, for a worker of `queues`; of all queues if there are none.

    It calls `hint` for each notification for these queues, and after each (re)connection; `behind` when a task was
    enqueued that waits behind another one; `paused` when something was paused or resumed, and after each
    (re)connection; `sleep` makes writers notify.
    It calls `stop`, unless that is None, when the workers of this schema are told to stop: by `pgtask stop`, or by
    `NOTIFY pg_task_changed, 'stop_worker'` if it `obeys_notify`.
    """

    def __init__(
        self,
        dsn: str,
        *,
        name: str,
        queues: tuple[str, ...],
        hint: Callable[[], None],
        stop: Callable[[], None] | None,
        behind: Callable[[], None] = lambda: None,
        paused: Callable[[], None] = lambda: None,
        obeys_notify: bool = True,
    ) -> None:
        self._link = Link(dsn, name, on_open=self._listen)
        self._hint = hint
        self._behind = behind
        self._paused = paused
        self._stop = stop
        self._obeys_notify = obeys_notify
        self._last_stop: int | None = None  # the last order in the table, as of the last read
        self._due = asyncio.Event()  # something to send
        self._ping_at = 0.0
        self._table = ""  # the oid of pg_task
        self._queues = frozenset(queues)
        self.sleep = Sleep(queues, look=hint, advance_soon=self._due.set)

    @property
    def is_listening(self) -> bool:
        """Return whether its connection listens, as far as it knows."""
        return self._link.is_open

    async def open(self) -> None:
        """Listen; wait for as long as the database is unavailable. Raises `DatabaseRefused`."""
        await self._link.connected()

    async def run(self) -> None:
        """Keep listening until cancelled. Raises `DatabaseRefused`."""
        try:
            while True:
                connection = await self._link.connected()
                try:
                    async with asyncio.timeout(max(0.0, self._ping_at - time.monotonic())):
                        await self._due.wait()
                except TimeoutError:
                    pass
                self._due.clear()
                if not connection.is_closed():
                    await self._send(connection)
        finally:
            await self._link.close()

    def _ping_now(self) -> None:
        self._ping_at = 0.0
        self._due.set()

    async def _listen(self, connection: Any) -> None:
        connection.add_termination_listener(lambda _: self._due.set())
        if self._last_stop is None and self._stop is not None:
            self._last_stop = await read_last_stop(connection, None)
        self._table = str(await connection.fetchval(statement("table_oid")))
        await connection.add_listener(CHANNEL, self._on_notification)
        self._ping_at = time.monotonic() + PING_INTERVAL
        if self._stop is not None:
            self._ping_now()  # for an order that was sent before it listened
        self.sleep.reset()
        self._paused()
        self._hint()

    def _on_notification(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        head, _, queue = payload.partition(" ")
        table = head.removesuffix("+")
        if payload == STOP and self._obeys_notify:
            self._obey_stop()
        elif head == STOP:
            self._ping_now()
        elif payload == BEHIND:
            self._behind()
        elif payload == PAUSED:
            self._paused()
        elif not (queue and table.isdecimal()):
            self._hint()
        elif table == self._table and (queue in self._queues or not self._queues):
            if table == head:  # else it comes from a worker that has released tasks
                self.sleep.count_notification()
            self._hint()

    def _obey_stop(self) -> None:
        stop, self._stop = self._stop, None  # once: the table holds the order of a notification as well
        if stop is not None:
            log.info("stop.received")
            stop()

    async def _send(self, connection: Any) -> None:
        """Prove the connection alive by an answer of the server, if it is time: a middlebox may keep a dead line open.
        Fall asleep or get up."""
        try:
            async with asyncio.timeout(PING_DEADLINE):
                if time.monotonic() >= self._ping_at:
                    self._ping_at = time.monotonic() + PING_INTERVAL
                    await self._read_stops(connection)
                await self.sleep.advance(connection)
        except Exception as error:
            log.warning("listen.lost", error=str(error) or type(error).__name__)
            self._link.drop()

    async def _read_stops(self, connection: Any) -> None:
        if self._stop is None:  # only for an answer
            await connection.execute("SELECT 1")
            return
        before, last = self._last_stop, await read_last_stop(connection, self._last_stop)
        self._last_stop = last
        if before is not None and last > before:  # a lower number means that rows were removed, which is no order
            self._obey_stop()
