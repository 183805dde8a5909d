"""The worker: knows every stage, and reads as the way of a row.

    claim -> decode -> dispatch -> (user code) -> outcome -> flush        beside it: renew, wake

Invariants: one *pump* owns the claiming and flushing connection and alternates between the two, so claims never outrun
outcomes: what this worker holds is bounded by `concurrency` and a small prefetch, also while the database is away. A
stop always ends: at the latest four seconds after its grace the process leaves, and the leases run out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from contextlib import AsyncExitStack
from typing import Any, Literal

import uvloop

from pgtask._events import log_event
from pgtask._fastpath import Lease, Leases
from pgtask._postgres.migrate import check_schema, migrate
from pgtask._postgres.pools import user_pool
from pgtask._postgres.store import Link
from pgtask._worker.claim import Claim
from pgtask._worker.decode import PUT_BACK_DELAY, UnknownSteps, table_of
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import Flush
from pgtask._worker.renew import Renew
from pgtask._worker.status import Gone, Ready, StatusPipe, Tick, Totals
from pgtask._worker.wake import Wake
from pgtask.app import App
from pgtask.config import Config
from pgtask.errors import SchemaError

__all__ = ["run_worker"]

log = logging.getLogger("pgtask.worker")

TICK = 0.5  # seconds between two messages to the supervisor
PREFETCH = 0.05  # seconds of work that are claimed ahead, at the rate of late
UNWIND = 1.5  # seconds that cancelled steps are given to clean up, and then the last outcomes to be written


def run_worker(
    config: Config, app: App, *, status: StatusPipe, parent_fd: int, counts_waiting: bool, embedded: bool
) -> int:
    """Run one worker in this process until it is told to leave, or a burst is over; returns the exit code, 0.

    SIGTERM, or the end of `parent_fd`, drains within `config.grace`; SIGQUIT stops now. Tells `status`. With
    `embedded` the schema is created or upgraded first. Raises `DatabaseRefused` for what waiting will not mend.
    """
    worker = _Worker(config, app, status, embedded=embedded, counts_waiting=counts_waiting)
    # The loop is not closed: that would wait for steps which ignore their cancellation, and the process ends here.
    uvloop.new_event_loop().run_until_complete(worker.run(parent_fd))
    return 0


class _Worker:
    def __init__(self, config: Config, app: App, status: StatusPipe, *, embedded: bool, counts_waiting: bool) -> None:
        assert config.dsn is not None
        self._config = config
        self._dsn = config.dsn
        self._app = app
        self._status = status
        self._embedded = embedded
        self._counts_waiting = counts_waiting
        self._work = asyncio.Event()  # something for the pump to do
        self._leaving: Literal["drained", "notified", "burst"] | None = None
        self._stop_now = False
        self._failure: BaseException | None = None
        self._pumping = False
        self._some_parked = False
        self._waiting: int | None = None
        self._rate = _Rate()

    async def run(self, parent_fd: int) -> None:
        """Work until it is time to leave, and say why; `_quit` cuts this short when even leaving takes too long."""
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        self._build()
        self._handle_signals(parent_fd)
        try:
            await self._work_and_leave()
        except asyncio.CancelledError:
            if self._leaving is None:
                raise
        self._status.send(Gone(self._leaving or "drained", self._totals(), self._some_parked))

    async def _work_and_leave(self) -> None:
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._status.send(Ready())
            services = [self._tick()]
            if self._wake is not None:
                services.append(self._wake.run())
            if self._counts_waiting:
                services.append(self._count_waiting())
            background = [asyncio.create_task(self._watch(service)) for service in services]
            self._pumping = True
            try:
                await self._pump()
                await self._leave()
            finally:
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
        await self._link.close()

    def _build(self) -> None:
        """The stages, wired to each other."""
        config = self._config
        name = f"pgtask worker {os.getpid()}"
        pooled = not config.listen
        self._link = Link(self._dsn, name, pooled=pooled)
        self._leases = Leases()
        self._claim = Claim(
            self._link,
            worker=os.urandom(8),
            queues=config.queue,
            lease_timeout=config.lease_timeout,
            max_step_bytes=config.max_step_bytes,
            shortest_poll=1.0 if config.listen and not config.burst else 0.05,
            longest_poll=1.0 if config.burst or not config.listen else 15.0,
        )
        unknown = UnknownSteps(
            park=config.unknown == "park",
            delay=PUT_BACK_DELAY + (config.burst_horizon if config.burst else 0.0),
        )
        self._dispatch = Dispatch(
            table_of(self._app),
            self._leases,
            concurrency=config.concurrency,
            max_step_bytes=config.max_step_bytes,
            wake=self._work.set,
            unknown=unknown.delay,
            broke=self._fail,
        )
        self._flush = Flush(self._link, self._leases)
        self._renew = Renew(
            self._dsn,
            self._leases,
            name=f"{name} renew",
            pooled=pooled,
            lease_timeout=config.lease_timeout,
            heartbeat_interval=config.heartbeat_interval,
            lost=lambda leases: self._call_soon(self._lose, leases),
            refused=lambda error: self._call_soon(self._fail, error),
        )
        self._wake: Wake | None = None
        if config.listen:
            stop = None if config.ignore_stop_notify else lambda: self._drain("notified")
            self._wake = Wake(self._dsn, name=f"{name} listen", hint=self._hint, stop=stop)

    def _call_soon(self, function: Any, argument: Any) -> None:
        """From the renewing thread onto the loop, unless it has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    async def _open(self, stack: AsyncExitStack) -> None:
        """The connections, the schema, the user's pool and resources; in the order in which they depend."""
        try:
            await check_schema(await self._link.connected())
        except SchemaError:
            if not self._embedded:
                raise
            await migrate(self._dsn)
        if self._wake is not None:
            await self._wake.open()
        self._renew.start()
        stack.callback(self._renew.stop)
        stack.callback(self._dispatch.close)
        self._dispatch.db = await stack.enter_async_context(user_pool(self._dsn, pooled=not self._config.listen))
        if self._app.lifespan is not None:
            self._dispatch.resources = await stack.enter_async_context(self._app.lifespan())

    # --- what may happen at any time

    def _handle_signals(self, parent_fd: int) -> None:
        self._loop.add_signal_handler(signal.SIGTERM, self._drain, "drained")
        self._loop.add_signal_handler(signal.SIGQUIT, self._quit)
        self._loop.add_reader(parent_fd, self._parent_gone, parent_fd)

    def _parent_gone(self, parent_fd: int) -> None:
        self._loop.remove_reader(parent_fd)
        log_event(log, logging.WARNING, "parent.gone")
        self._drain("drained")

    def _hint(self) -> None:
        self._claim.hint()
        self._work.set()

    def _drain(self, reason: Literal["drained", "notified"]) -> None:
        """Claim no more; let what runs come to its end within the grace."""
        if self._leaving is None:
            self._leaving = reason
            self._dispatch.draining = True
            self._loop.call_later(self._config.grace, self._quit)
        self._work.set()

        if not self._pumping and self._main is not None:
            self._main.cancel()  # still opening, perhaps waiting for a database that is away: nothing is held yet

    def _quit(self) -> None:
        """Stop now: running steps are cancelled and their leases given back."""
        self._drain("drained")
        if not self._stop_now:
            self._stop_now = True
            assert self._main is not None
            self._loop.call_later(2 * UNWIND + 0.5, self._main.cancel)
        self._work.set()

    def _lose(self, leases: list[Lease]) -> None:
        for lease in leases:
            if lease.is_open:
                log_event(log, logging.WARNING, "lease.lost", task=lease.id, step=lease.label, outcome="cancelled")
                self._flush.lost += 1
                self._dispatch.lose(lease)
        self._work.set()

    def _fail(self, error: BaseException) -> None:
        """A stage cannot go on, so neither can this worker."""
        self._failure = self._failure or error
        self._work.set()

    async def _watch(self, service: Any) -> None:
        try:
            await service
        except Exception as error:
            self._fail(error)

    # --- the pump

    async def _pump(self) -> None:
        """Flush and claim in turn until the worker leaves and holds nothing that runs."""
        while True:
            self._work.clear()
            if self._failure is not None:
                raise self._failure
            await self._flush_gathered()
            if self._leaving is not None:
                await self._flush.release(self._dispatch.take_ready())
                if self._stop_now or not (self._dispatch.suspended or len(self._dispatch.outcomes)):
                    return
            elif await self._claim_some() or (self._config.burst and await self._burst_over()):
                continue
            if not self._work.is_set() and not len(self._dispatch.outcomes):
                self._check_owners()
                await self._wait()

    def _check_owners(self) -> None:
        """Every lease waits for its turn, runs, or has an outcome in the buffer. If not, to die is the way to let go."""
        if len(self._leases) and not (self._dispatch.ready or self._dispatch.suspended):
            raise AssertionError(f"{len(self._leases)} leases have no owner: please report this")

    async def _flush_gathered(self) -> None:
        if not len(self._dispatch.outcomes):
            return
        outcomes = self._dispatch.take()
        for delay, error in zip(outcomes.moved_delays, outcomes.moved_errors, strict=True):
            if error is None:
                self._claim.due_in(delay)
        self._dispatch.go_on(await self._flush.flush(outcomes))
        self._rate.count(len(outcomes))

    async def _claim_some(self) -> bool:
        """Claim for the free slots and a little ahead; whether anything came."""
        room = self._room()
        if room <= 0 or not self._claim.wanted:
            return False
        rows, token, sent = await self._claim.claim(room)
        if not rows:
            return False
        leases, displaced = self._leases.claimed(rows, token, sent)
        self._lose(displaced)
        self._dispatch.admit(leases)
        return True

    def _room(self) -> int:
        """How many tasks to claim: what there is room for, but not by driblets while there is work in hand."""
        config = self._config
        hold = config.concurrency + min(int(self._rate.per_second * PREFETCH), 2 * config.batch)
        room = min(hold - len(self._leases), config.batch)
        if self._dispatch.ready and room < min(hold, config.batch) // 4:
            return 0
        return room

    async def _wait(self) -> None:
        """Until something happens, or it is time to look again."""
        timer = None
        if self._leaving is None and self._room() > 0:
            delay = max(0.0, self._claim.look_at - time.monotonic())
            timer = self._loop.call_later(delay, self._work.set)
        await self._work.wait()
        if timer is not None:
            timer.cancel()

    # --- the end

    async def _burst_over(self) -> bool:
        """With --burst: leave when nothing is held here or elsewhere, and nothing falls due within the horizon."""
        if len(self._leases) or self._claim.wanted or self._more_to_come():
            return False
        ((leased, self._some_parked),) = await self._link.run("burst_left", list(self._config.queue) or None)
        if leased:
            return False
        await self._claim.look()  # for what came back from the last lease since we looked
        if not self._claim.wanted and not self._more_to_come():
            self._leaving = "burst"
        return True

    def _more_to_come(self) -> bool:
        due = self._claim.next_due
        return due is not None and due - time.monotonic() <= self._config.burst_horizon

    async def _leave(self) -> None:
        """Cancel what still runs, give back what it holds, and write what came of it; not longer than 2 * UNWIND."""
        try:
            async with asyncio.timeout(UNWIND):
                for lease in self._leases.open():
                    self._dispatch.stop(lease)
                while self._dispatch.suspended:
                    self._work.clear()
                    await self._work.wait()
        except TimeoutError:
            log_event(log, logging.WARNING, "steps.abandoned", steps=self._dispatch.suspended)
        try:
            async with asyncio.timeout(UNWIND):
                await self._flush_gathered()
                await self._flush.release(self._leases.open())
        except TimeoutError:
            log_event(log, logging.WARNING, "leases.abandoned", leases=len(self._leases))

    async def _count_waiting(self) -> None:
        """For the progress of a burst: how much there was to do when it began, counted once beside the work."""
        link = Link(self._dsn, f"pgtask worker {os.getpid()} count", pooled=not self._config.listen)
        queues = list(self._config.queue) or None
        ((self._waiting,),) = await link.run("count_due", queues, self._config.burst_horizon, 10_000_000)
        await link.close()

    async def _tick(self) -> None:
        """Tell the supervisor, from the loop, so that it also knows that the loop lives."""
        while True:
            self._status.send(Tick(self._totals(), self._waiting))
            await asyncio.sleep(TICK)

    def _totals(self) -> Totals:
        return Totals(
            done=self._flush.done,
            steps=self._dispatch.steps,
            errors=self._dispatch.errors,
            parked=self._dispatch.parked_count,
            lost=self._flush.lost,
        )


class _Rate:
    """Outcomes per second of late: a moving average over windows of a tenth of a second."""

    def __init__(self) -> None:
        self.per_second = 0.0
        self._since = time.monotonic()
        self._counted = 0

    def count(self, outcomes: int) -> None:
        self._counted += outcomes
        elapsed = time.monotonic() - self._since
        if elapsed >= 0.1:
            self.per_second += 0.5 * (self._counted / elapsed - self.per_second)
            self._since, self._counted = time.monotonic(), 0
