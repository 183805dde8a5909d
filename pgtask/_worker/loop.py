"""The worker's loop: knows every stage, and reads as the way of a row.

    claim -> decode -> dispatch -> (user code) -> outcome -> flush        beside it: renew, wake, journal

Invariants: one *pump* owns the claiming and flushing connection and alternates between the two, so claims never outrun
outcomes: what this worker holds is bounded by `concurrency` and a small prefetch, also while the database is away.
Every lease it holds waits for its turn, runs, or has its outcome in the buffer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from pgtask._events import log_event
from pgtask._fastpath import Lease, Leases, Marks, Outcomes
from pgtask._postgres.store import Link
from pgtask._worker.burst import Burst
from pgtask._worker.calls import Calls
from pgtask._worker.claim import Claim
from pgtask._worker.decode import PUT_BACK_DELAY, UnknownSteps, table_of
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import Flush
from pgtask._worker.journal import Journal
from pgtask._worker.renew import Renew
from pgtask._worker.room import Room
from pgtask._worker.runs import Runs
from pgtask._worker.status import Reason, Totals, session_name
from pgtask._worker.suspects import Suspects
from pgtask._worker.wake import Wake
from pgtask.app import App
from pgtask.config import Config

__all__ = ["UNWIND", "Loop"]

log = logging.getLogger("pgtask.loop")

GATHER = 0.004  # seconds between two looks whether outcomes of steps which await have found company,
MOST_GATHERING = 5  # and how many such looks there are at most
FEW = 100  # outcomes that are not worth a transaction of their own while there is work in hand
UNWIND = 1.5  # seconds that cancelled steps are given to clean up, and then the last outcomes to be written


class Loop:
    """The stages of one worker, wired to each other, and the pump that drives them. To be made on the running loop;
    `stopped` is called when `NOTIFY pg_task_changed, 'stop_worker'` came."""

    def __init__(self, config: Config, app: App, *, worker: bytes, marks: Marks, stopped: Callable[[], None]) -> None:
        assert config.dsn is not None
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.Event()  # something for the pump to do
        self._stop_now = False
        self._failure: BaseException | None = None
        self._room = Room(config.concurrency, config.batch)
        self.leaving: Reason | None = None
        """Why it claims no more, or None while it does."""
        self._build(config, config.dsn, app, worker, marks, stopped)

    def _build(
        self, config: Config, dsn: str, app: App, worker: bytes, marks: Marks, stopped: Callable[[], None]
    ) -> None:
        name = f"pgtask worker {os.getpid()}"
        pooled = not config.listen
        self.link = Link(dsn, session_name(os.getpid(), worker), pooled=pooled)
        self._leases = Leases()
        self._claim = Claim(
            self.link,
            worker=worker,
            queues=config.queue,
            lease_timeout=config.lease_timeout,
            max_step_bytes=config.max_step_bytes,
            shortest_poll=1.0 if config.listen and not config.burst else 0.05,
            longest_poll=1.0 if config.burst or not config.listen else 30.0,
        )
        self.burst = Burst(self.link, self._claim, queues=config.queue, horizon=config.burst_horizon)
        self._unknown = UnknownSteps(
            park=config.unknown == "park",
            delay=PUT_BACK_DELAY + (config.burst_horizon if config.burst else 0.0),
        )
        self.dispatch = Dispatch(
            table_of(app),
            self._leases,
            concurrency=config.concurrency,
            max_step_bytes=config.max_step_bytes,
            marks=marks,
            wake=self._work.set,
            unknown=self._unknown.delay,
            broke=self.fail,
        )
        self._suspects = Suspects(self.dispatch)
        self._flush = Flush(self.link, self._leases)
        self.renew = Renew(
            dsn,
            self._leases,
            name=f"{name} renew",
            pooled=pooled,
            lease_timeout=config.lease_timeout,
            heartbeat_interval=config.heartbeat_interval,
            lost=lambda leases: self._call_soon(self._lose, leases),
            refused=lambda error: self._call_soon(self.fail, error),
        )
        link = Link(dsn, f"{name} journal", pooled=pooled)
        self.journal = Journal(link, due_in=self._claim.due_in) if app.workflows else None
        if self.journal is not None:
            calls = Calls(self.dispatch, self.dispatch.threads, most_bytes=config.max_step_bytes)
            Runs(app, self._leases, self.dispatch, journal=self.journal, calls=calls)
        self.wake: Wake | None = None
        if config.listen:
            self.wake = Wake(
                dsn, name=f"{name} listen", hint=self.hint, stop=None if config.ignore_stop_notify else stopped
            )

    # --- what may happen at any time

    def _call_soon(self, function: Any, argument: Any) -> None:
        """From the renewing thread onto the loop, unless it has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    def hint(self) -> None:
        """Something may have become due."""
        self._claim.hint()
        self._work.set()

    def drain(self, reason: Reason) -> None:
        """Claim no more; let what runs come to its end."""
        if self.leaving is None:
            self.leaving = reason
            self.dispatch.draining = True
        self._work.set()

    @property
    def is_idle_and_away(self) -> bool:
        """Nothing is held, and the pump waits for a database that is away."""
        return self.link.is_away and not len(self._leases)

    @property
    def held(self) -> int:
        return len(self._leases)

    def stop_now(self) -> None:
        """Do not wait for what runs."""
        self.drain("drained")
        self._stop_now = True

    def _lose(self, leases: list[Lease]) -> None:
        for lease in leases:
            if lease.is_open:
                log_event(log, logging.WARNING, "lease.lost", task=lease.id, step=lease.label, outcome="cancelled")
                self.dispatch.lose(lease)
                self._flush.lose(lease, ends_in=self.renew.margin)
        self._work.set()

    def fail(self, error: BaseException) -> None:
        """A stage cannot go on, so neither can this worker: the pump raises it."""
        self._failure = self._failure or error
        self._work.set()

    # --- the pump

    async def pump(self) -> None:
        """Flush and claim in turn until the worker leaves and holds nothing that runs."""
        while True:
            self._work.clear()
            if self._failure is not None:
                raise self._failure
            await self._flush_gathered()
            await self._flush.release(self._flush.take_lost())
            if self.leaving is not None:
                await self._flush.release(self.dispatch.take_ready() + self._suspects.take())
                if self._stop_now or self._is_quiet():
                    return
            elif await self._claim_or_try_a_suspect() or (self._config.burst and await self._burst_over()):
                continue
            if not self._work.is_set() and not len(self.dispatch.outcomes):
                self._check_owners()
                await self._wait()

    def _check_owners(self) -> None:
        """Nothing is left to flush, so every lease waits for its turn or runs. If not, dying is how it is let go."""
        owners = (self.dispatch.ready, self.dispatch.suspended, len(self._flush.waiting), len(self._suspects))
        if len(self._leases) and not any(owners):
            raise AssertionError(f"{len(self._leases)} leases have no owner: please report this")

    def _is_quiet(self) -> bool:
        """No step is executing, and every outcome is in the database."""
        return not (self.dispatch.suspended or len(self.dispatch.outcomes) or len(self._flush.waiting))

    async def _flush_gathered(self) -> None:
        """Write the buffer, and let the tasks that go on here go on."""
        if len(self._flush.waiting):
            self.dispatch.go_on(await self._flush.flush_waiting())
        if len(self.dispatch.outcomes):
            for _ in range(MOST_GATHERING):
                if not self._is_early():
                    break
                await asyncio.sleep(GATHER)
            self.dispatch.go_on(await self._write(self.dispatch.take()))

    def _is_early(self) -> bool:
        """Steps that await end one by one. While the next ones are in hand, and no task waits for its outcome to be
        durable, to write them one by one would cost more than they do."""
        outcomes = self.dispatch.outcomes
        return len(outcomes) < FEW and not outcomes.kept and bool(self.dispatch.ready) and self.leaving is None

    async def _write(self, outcomes: Outcomes) -> list[Lease]:
        for delay, error in zip(outcomes.moved_delays, outcomes.moved_errors, strict=True):
            if error is None:
                self._claim.due_in(delay)
        self._room.count(len(outcomes))
        return await self._flush.flush(outcomes)

    async def _claim_or_try_a_suspect(self) -> bool:
        came = await self._claim_some()
        is_quiet = self._is_quiet()
        self._suspects.turn(is_quiet=is_quiet, is_idle=is_quiet and not (came or self.dispatch.ready))
        return came

    async def _claim_some(self) -> bool:
        """Claim for the free slots and a little ahead; whether anything came."""
        room = self._room_left()
        if room <= 0 or not self._claim.wanted:
            return False
        rows, token, sent = await self._claim.claim(room)
        if not rows:
            return False
        leases, displaced = self._leases.claimed(rows, token, sent)
        self._lose(displaced)
        if suspects := self._leases.take_suspects():
            self._suspects.receive(suspects)
            leases = [lease for lease in leases if lease.claims == 1]
        self.dispatch.admit(leases)
        return True

    def _room_left(self) -> int:
        """How many tasks to claim. Suspects that wait take nobody's place; a thread that was given up by a timeout
        does, though its lease is gone."""
        held = max(len(self._leases) - len(self._suspects), self.dispatch.suspended + len(self.dispatch.ready))
        return 0 if self._suspects.is_hushed else self._room.left(held, len(self.dispatch.ready))

    async def _wait(self) -> None:
        """Until something happens, or it is time to look again."""
        timer = None
        wait = max(0.0, min(self._suspects.wait(), self._flush.wait()))
        if self.leaving is None and self._room_left() > 0:
            wait = min(wait, max(0.0, self._claim.look_at - time.monotonic()))
        if wait < float("inf"):
            timer = self._loop.call_later(wait, self._work.set)
        await self._work.wait()
        if timer is not None:
            timer.cancel()

    # --- the end

    async def _burst_over(self) -> bool:
        """With --burst: leave when nothing is left to do; false if there is nothing new to look at either."""
        if len(self._leases) or not await self.burst.look():
            return False
        if self.burst.is_over:
            self.leaving = self.leaving or "burst"
        return True

    async def leave(self) -> None:
        """Cancel what still runs, give back what it holds, and write what came of it; not longer than 2 * UNWIND."""
        try:
            async with asyncio.timeout(UNWIND):
                for lease in self._leases.open():
                    self.dispatch.stop(lease)
                while self.dispatch.suspended:
                    self._work.clear()
                    await self._work.wait()
        except TimeoutError:
            ready = f"within {self._config.lease_timeout:g} s, when their leases end"
            log_event(log, logging.WARNING, "steps.abandoned", steps=self.dispatch.suspended, ready=ready)
        try:
            async with asyncio.timeout(UNWIND):
                # Nothing may start any more, so what could go on is given back; what still runs is left to run out.
                kept = await self._write(self.dispatch.take())
                unused = [lease for lease in self._leases.open() if not lease.is_running]
                await self._flush.release(kept + unused + self._flush.take_lost(before=float("inf")))
        except TimeoutError:
            log_event(log, logging.WARNING, "leases.abandoned", leases=len(self._leases))

    def totals(self) -> Totals:
        """What it has done since it began."""
        finished, parked, lost = self.journal.totals() if self.journal else (0, 0, 0)
        return Totals(
            done=self._flush.done + finished,
            steps=self.dispatch.steps,
            errors=self.dispatch.errors,
            parked=self._flush.parked + parked,
            lost=self._flush.lost + lost,
            put_back=self._unknown.put_back,
        )
