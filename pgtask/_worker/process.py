"""process: a worker at work: opens connections and lifespan, reacts to signals and its parent, and ends in time.

Invariants: it sends `Ready` when all is open and `ExitNotice` when it leaves. A stop always ends, at the latest four
seconds after its grace, also if the database or user code blocks: the leases then expire. So does a burst, even if the
end of the lifespan blocks the loop; the supervisor handles a step that blocks it. The end of the program follows, by
`at_exit`.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import uvloop

from pgtask._backoff import Backoff
from pgtask._fastpath import CounterPage, Marks
from pgtask._log import EventLog
from pgtask._postgres.migrate import check_schema, migrate
from pgtask._postgres.pools import user_pool
from pgtask._postgres.store import Link
from pgtask._status import ExitCode, ExitNotice, Ready, Reason, StatusPipe, StopNotice, Tick, fit_message
from pgtask._step_tools import StepTools
from pgtask._worker import parent_watch
from pgtask._worker.at_exit import AFTER_GRACE, abandon_threads, end_children, set_grace_end
from pgtask._worker.forked import protect_loop
from pgtask._worker.gauges import Gauges
from pgtask._worker.leaving import UNWIND
from pgtask._worker.lifespan import OVERDUE, opened_resources
from pgtask._worker.pipeline import Pipeline
from pgtask._worker.step_client import StepClient
from pgtask._worker.to_thread import ToThreadExecutor
from pgtask._worker.turn_slots import TurnSlots
from pgtask.app import App
from pgtask.config import Config
from pgtask.errors import LifespanError, SchemaError

__all__ = ["run_worker"]

log = EventLog("pgtask.worker")

MakeClient = Callable[[Any, Config, App], Any]
"""Makes the client of the steps, on their pool."""

TICK = 0.5  # seconds between two messages to the supervisor
MAX_TICK = 2.0  # the same while the totals do not change
CANCEL_AFTER, GIVE_UP_AFTER = 2 * UNWIND + 0.5, AFTER_GRACE  # seconds after the grace


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
    make_client: MakeClient,
    turn_slots: TurnSlots | None = None,
    page: CounterPage | None = None,
) -> int:
    """Run one worker in this process until it is told to leave, or a burst is over; return the exit code, 0.

    SIGTERM drains within `config.grace`, the end of `parent_fd` within half a second; SIGQUIT stops now. Sends its
    messages to `status`. With `embedded` it creates a missing schema. All its tokens begin with the eight bytes
    `worker`; `marks` hold the tasks that it executes; `make_client` makes `ctx.client`; `turn_slots` are those of
    its supervisor; `page` is for its counters, if there are metrics. Raises `DatabaseRefused` on permanent errors, and
    `LifespanError`.
    """
    options = {"embedded": embedded, "counts_waiting": counts_waiting}
    process = _WorkerProcess(config, app, status, worker, marks, make_client, turn_slots, page, **options)
    # The loop is not closed: that would wait for steps that ignore their cancellation, and the process ends here.
    uvloop.new_event_loop().run_until_complete(process.run(parent_fd))
    return 0


async def check_or_create(dsn: str, connection: Any) -> None:
    """Check the schema, and create it or upgrade it where that helps."""
    try:
        await check_schema(connection)
    except SchemaError:
        await migrate(dsn)


class _WorkerProcess:
    """The pipeline of one worker, and its signals, ticks and end."""

    def __init__(
        self,
        config: Config,
        app: App,
        status: StatusPipe,
        worker: bytes,
        marks: Marks,
        make_client: MakeClient,
        turn_slots: TurnSlots | None,
        page: CounterPage | None,
        *,
        embedded: bool,
        counts_waiting: bool,
    ) -> None:
        self._worker = worker
        self._marks = marks
        self._make_client = make_client
        self._turn_slots = turn_slots
        self._page = page
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
        """Work until it is time to leave, and send the exit notice."""
        self._main = asyncio.current_task()
        self._threads = ToThreadExecutor(thread_name_prefix="asyncio")
        asyncio.get_running_loop().set_default_executor(self._threads)
        self._pipeline = Pipeline(
            self._config,
            self._app,
            worker=self._worker,
            marks=self._marks,
            turn_slots=self._turn_slots,
            page=self._page,
            stopped=self._handle_stop_worker,
        )
        self._handle_signals(parent_fd)
        # Tick while connecting too, so that a slow database does not look like a hang.
        ticking = [asyncio.create_task(self._fail_with(self._send_ticks()))]
        if self._page is not None:
            gauges = Gauges(self._page, self._pipeline, is_ready=lambda: self._working)
            ticking.append(asyncio.create_task(self._fail_with(gauges.run())))
        try:
            async with AsyncExitStack() as stack:
                await self._open_all(stack)
                self._status.send(Ready())
                await self._run_pump()
                self._closing = True
                self._end_in_time()
            await self._pipeline.link.close()
        except asyncio.CancelledError:
            if self._pipeline.leaving is None:
                raise
        except LifespanError as error:
            if self._pipeline.leaving is not None:  # the work is done: only the end of the lifespan has failed
                self._send_exit_notice(str(error))
            raise
        finally:
            abandon_threads([self._threads])
            for task in ticking:
                task.cancel()
            if self._overtime is not None:
                self._overtime.cancel()
        self._send_exit_notice(None)

    def _send_exit_notice(self, message: str | None) -> None:
        pipeline = self._pipeline
        self._status.send(
            ExitNotice(
                reason=pipeline.leaving or "drained",
                totals=pipeline.totals(),
                parked_left=pipeline.burst.parked_left,
                message=None if message is None else fit_message(message),
                held=pipeline.held,
                parked_others=pipeline.burst.parked_others,
                paused=pipeline.pauses.labels,
            )
        )

    async def _open_all(self, stack: AsyncExitStack) -> None:
        """Open the connections, the schema, the user's pool and resources, in the order of their dependencies."""
        pipeline = self._pipeline
        assert self._config.dsn is not None
        create = functools.partial(check_or_create, self._config.dsn)
        await pipeline.link.connected(create if self._embedded else check_schema)
        if pipeline.wake is not None:
            await pipeline.wake.open()
        pipeline.renew.start()
        stack.callback(pipeline.renew.stop)
        stack.callback(pipeline.dispatch.close)
        stack.push_async_callback(pipeline.transactions.close)
        pool = user_pool(self._config.dsn, size=self._config.pool_size, pooled=not self._config.listen)
        pipeline.dispatch.db = await stack.enter_async_context(pool)
        client = StepClient(functools.partial(self._make_client, pipeline.dispatch.db, self._config, self._app))
        stack.push_async_callback(client.close)
        pipeline.dispatch.tools = StepTools(
            client=client.get,
            transactions=pipeline.transactions,
            progress=pipeline.dispatch.leases.report_progress,
            charge=pipeline.dispatch.charge_limit,
        )
        pipeline.dispatch.resources = await stack.enter_async_context(opened_resources(self._app))
        pipeline.trace_steps(stack)  # the lifespan may have set the provider

    async def _run_pump(self) -> None:
        """Run the pump, and the services beside it."""
        services = []
        if self._pipeline.wake is not None:
            services.append(self._pipeline.wake.run())
        if self._pipeline.journal is not None:
            services.append(self._pipeline.journal.run())
        services.append(self._pipeline.aside.run())
        if self._counts_waiting:
            services.append(self._count_waiting())
        background = [asyncio.create_task(self._fail_with(service)) for service in services]
        self._working = True
        gc.freeze()  # the modules and the app stay: exempt them from garbage collection
        gc.set_threshold(10_000)  # the leases of a batch make no cycles
        try:
            await self._pipeline.pump()
            await self._pipeline.leave()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)

    async def _fail_with(self, service: Any) -> None:
        """Run a service; its error ends the worker."""
        try:
            await service
        except Exception as error:
            self._pipeline.fail(error)

    # --- stopping

    def _handle_signals(self, parent_fd: int) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._drain, "drained")
        loop.add_signal_handler(signal.SIGQUIT, self._stop_now)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup and a shell's background have it
            # Not by the loop: there it would wait behind the step that fails because of the same Ctrl-C.
            signal.signal(signal.SIGINT, lambda *_: self._pipeline.dispatch.note_interrupt())
            signal.siginterrupt(signal.SIGINT, False)
        protect_loop(loop, self._pipeline.renew.loop)
        loop.add_reader(parent_fd, self._handle_parent_end, parent_fd)

    def _handle_parent_end(self, parent_fd: int) -> None:
        asyncio.get_running_loop().remove_reader(parent_fd)
        log.warning("supervisor.lost")
        self._drain("drained")
        asyncio.get_running_loop().call_later(parent_watch.GRACE, self._stop_now)

    def _handle_stop_worker(self) -> None:
        self._status.send(StopNotice())
        self._drain("notified")

    def _drain(self, reason: Reason) -> None:
        """Stop claiming, and let the running steps finish within the grace."""
        self._end_in_time()
        self._pipeline.drain(reason)
        if self._main is not None and (not self._working or self._pipeline.is_idle_in_outage):
            self._main.cancel()  # it holds no lease, and may be waiting for an unavailable database

    def _stop_now(self) -> None:
        """Cancel the running steps and release their leases; if that takes too long, cancel the whole worker."""
        self._drain("drained")
        self._pipeline.stop_now()
        set_grace_end(time.monotonic())
        if not self._stopping:
            self._stopping = True
            assert self._main is not None
            asyncio.get_running_loop().call_later(CANCEL_AFTER, self._main.cancel)

    def _end_in_time(self) -> None:
        """Bound the time from the first reason to leave. A thread enforces it, since a lifespan may block the loop."""
        if self._overtime is None:
            grace = self._config.grace
            set_grace_end(time.monotonic() + grace)
            asyncio.get_running_loop().call_later(grace, self._stop_now)
            self._overtime = threading.Timer(grace + GIVE_UP_AFTER, self._give_up)
            self._overtime.daemon = True
            try:
                self._overtime.start()
            except RuntimeError as error:  # the system has no more threads: the loop's timer must suffice
                log.warning("threads.scarce", error=str(error))

    def _give_up(self) -> None:
        if self._closing:
            self._send_exit_notice(OVERDUE)
            end_children()
            os._exit(ExitCode.BOOT)

    # --- messages to the supervisor

    async def _send_ticks(self) -> None:
        """Send ticks from the loop, so that they also show that the loop is alive."""
        previous: Tick | None = None
        stall = self._config.stall or float("inf")
        pauses = Backoff(TICK, max(TICK, min(MAX_TICK, stall / 4)))
        while True:
            error = self._pipeline.link.outage
            tick = Tick(self._pipeline.totals(), self._waiting, None if error is None else fit_message(error))
            self._status.send(tick)
            if tick != previous:
                pauses.reset()
            previous = tick
            await asyncio.sleep(pauses.next())

    async def _count_waiting(self) -> None:
        """Count the tasks that are due at the start of a burst, once and beside the work, for its progress."""
        assert self._config.dsn is not None
        link = Link(self._config.dsn, f"pgtask worker {os.getpid()} count", pooled=not self._config.listen)
        queues = list(self._config.queue) or None
        ((self._waiting,),) = await link.run("count_due", queues, self._config.burst_horizon, 10_000_000)
        await link.close()
