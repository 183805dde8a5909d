"""The worker's process: opens what the loop needs, listens to signals and to its parent, and sees to it that it ends.

Invariants: it says `Ready` when all is open and `Gone` when it leaves. A stop always ends, at the latest four seconds
after its grace, whatever the database or the user's code does: the leases then run out. So does a burst, even if the
end of the lifespan blocks the loop; a step that does so is left to the supervisor.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from contextlib import AsyncExitStack
from typing import Any

import uvloop

from pgtask._events import log_event
from pgtask._fastpath import Marks
from pgtask._postgres.migrate import check_schema, migrate
from pgtask._postgres.pools import user_pool
from pgtask._postgres.store import Link
from pgtask._worker import orphan
from pgtask._worker.lifespan import OVERDUE, opened_resources
from pgtask._worker.loop import UNWIND, Loop
from pgtask._worker.status import Gone, Notified, Ready, Reason, StatusPipe, Tick, as_message
from pgtask.app import App
from pgtask.config import Config
from pgtask.errors import LifespanError, SchemaError

__all__ = ["run_worker"]

log = logging.getLogger("pgtask.worker")

TICK = 0.5  # seconds between two messages to the supervisor
IDLE_TICK = 2.0  # the same while there is nothing new to tell
CANCEL_AFTER, GIVE_UP_AFTER = 2 * UNWIND + 0.5, 2 * UNWIND + 1.0  # seconds after the grace
FAILED = 3  # the exit code of a worker that could not start, or whose lifespan could not end


def run_worker(
    config: Config,
    app: App,
    *,
    status: StatusPipe,
    parent_fd: int,
    counts_waiting: bool,
    embedded: bool,
    worker: bytes,
    marks: Marks,
) -> int:
    """Run one worker in this process until it is told to leave, or a burst is over; returns the exit code, 0.

    SIGTERM drains within `config.grace`, the end of `parent_fd` within half a second; SIGQUIT stops now. Tells
    `status`. With `embedded` a missing schema is created. All its tokens begin with the eight bytes `worker`; what it
    executes is in `marks`. Raises `DatabaseRefused` for what waiting will not mend, and `LifespanError`.
    """
    process = _Process(config, app, status, worker, marks, embedded=embedded, counts_waiting=counts_waiting)
    # The loop is not closed: that would wait for steps which ignore their cancellation, and the process ends here.
    uvloop.new_event_loop().run_until_complete(process.run(parent_fd))
    return 0


class _Process:
    def __init__(
        self,
        config: Config,
        app: App,
        status: StatusPipe,
        worker: bytes,
        marks: Marks,
        *,
        embedded: bool,
        counts_waiting: bool,
    ) -> None:
        self._worker = worker
        self._marks = marks
        self._config = config
        self._app = app
        self._status = status
        self._embedded = embedded
        self._counts_waiting = counts_waiting
        self._working = False
        self._stopping = False
        self._closing = False
        self._overtime: threading.Timer | None = None
        self._waiting: int | None = None

    async def run(self, parent_fd: int) -> None:
        """Work until it is time to leave, and say why."""
        self._main = asyncio.current_task()
        self._loop = Loop(
            self._config,
            self._app,
            worker=self._worker,
            marks=self._marks,
            stopped=self._be_notified,
        )
        self._handle_signals(parent_fd)
        ticking = asyncio.create_task(self._watch(self._tick()))  # from the start: who waits for a database is not dead
        try:
            async with AsyncExitStack() as stack:
                await self._open(stack)
                self._status.send(Ready())
                await self._work()
                self._closing = True
                self._end_in_time()
            await self._loop.link.close()
        except asyncio.CancelledError:
            if self._loop.leaving is None:
                raise
        except LifespanError as error:
            if self._loop.leaving is not None:  # its work is done: only its end has failed
                self._say_gone(str(error))
            raise
        finally:
            ticking.cancel()
            if self._overtime is not None:
                self._overtime.cancel()
        self._say_gone(None)

    def _say_gone(self, message: str | None) -> None:
        loop = self._loop
        message = None if message is None else as_message(message)
        self._status.send(Gone(loop.leaving or "drained", loop.totals(), loop.burst.parked_left, message, loop.held))

    async def _open(self, stack: AsyncExitStack) -> None:
        """The connections, the schema, the user's pool and resources; in the order in which they depend."""
        loop = self._loop
        assert self._config.dsn is not None
        try:
            await check_schema(await loop.link.connected())
        except SchemaError:
            if not self._embedded:
                raise
            await migrate(self._config.dsn)
        if loop.wake is not None:
            await loop.wake.open()
        loop.renew.start()
        stack.callback(loop.renew.stop)
        stack.callback(loop.dispatch.close)
        pool = user_pool(self._config.dsn, size=self._config.pool_size, pooled=not self._config.listen)
        loop.dispatch.db = await stack.enter_async_context(pool)
        loop.dispatch.resources = await stack.enter_async_context(opened_resources(self._app))

    async def _work(self) -> None:
        """The pump, and what goes on beside it."""
        services = []
        if self._loop.wake is not None:
            services.append(self._loop.wake.run())
        if self._loop.journal is not None:
            services.append(self._loop.journal.run())
        if self._counts_waiting:
            services.append(self._count_waiting())
        background = [asyncio.create_task(self._watch(service)) for service in services]
        self._working = True
        gc.freeze()  # the modules and the app are here to stay: spare the collector looking at them again and again
        gc.set_threshold(10_000)  # a batch of leases comes and goes without cycles
        try:
            await self._loop.pump()
            await self._loop.leave()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)

    async def _watch(self, service: Any) -> None:
        try:
            await service
        except Exception as error:
            self._loop.fail(error)

    # --- stopping

    def _handle_signals(self, parent_fd: int) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain, "drained")
        loop.add_signal_handler(signal.SIGQUIT, self._stop_now)
        loop.add_reader(parent_fd, self._parent_gone, parent_fd)

    def _parent_gone(self, parent_fd: int) -> None:
        asyncio.get_running_loop().remove_reader(parent_fd)
        log_event(log, logging.WARNING, "parent.gone")
        self._drain("drained")
        asyncio.get_running_loop().call_later(orphan.GRACE, self._stop_now)

    def _be_notified(self) -> None:
        self._status.send(Notified())
        self._drain("notified")

    def _drain(self, reason: Reason) -> None:
        """Claim no more, and let what runs come to its end within the grace."""
        self._end_in_time()
        self._loop.drain(reason)
        if self._main is not None and (not self._working or self._loop.is_idle_and_away):
            self._main.cancel()  # nothing is held, and it may be waiting for a database that is away

    def _stop_now(self) -> None:
        """Running steps are cancelled and their leases given back; if even that takes too long, leave as it is."""
        self._drain("drained")
        self._loop.stop_now()
        if not self._stopping:
            self._stopping = True
            assert self._main is not None
            asyncio.get_running_loop().call_later(CANCEL_AFTER, self._main.cancel)

    def _end_in_time(self) -> None:
        """From the first reason to leave on. A thread sees to it at last: the end of a lifespan may block the loop."""
        if self._overtime is None:
            grace = self._config.grace
            asyncio.get_running_loop().call_later(grace, self._stop_now)
            self._overtime = threading.Timer(grace + GIVE_UP_AFTER, self._give_up)
            self._overtime.daemon = True
            self._overtime.start()

    def _give_up(self) -> None:
        if self._closing:
            self._say_gone(OVERDUE)
            os._exit(FAILED)

    # --- telling the supervisor

    async def _tick(self) -> None:
        """From the loop, so that the supervisor also knows that the loop lives."""
        told: Tick | None = None
        stall = self._config.stall or float("inf")
        pause, longest = TICK, max(TICK, min(IDLE_TICK, stall / 4))
        while True:
            tick = Tick(self._loop.totals(), self._waiting)
            self._status.send(tick)
            pause = TICK if tick != told else min(2 * pause, longest)
            told = tick
            await asyncio.sleep(pause)

    async def _count_waiting(self) -> None:
        """For the progress of a burst: how much there was to do when it began, counted once beside the work."""
        assert self._config.dsn is not None
        link = Link(self._config.dsn, f"pgtask worker {os.getpid()} count", pooled=not self._config.listen)
        queues = list(self._config.queue) or None
        ((self._waiting,),) = await link.run("count_due", queues, self._config.burst_horizon, 10_000_000)
        await link.close()
