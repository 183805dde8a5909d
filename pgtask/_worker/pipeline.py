"""The pipeline of a worker: knows every stage, and reads as the way of a row.

    claim -> decode -> dispatch -> (user code) -> outcome -> flush        beside it: renew, wake, journal

Invariants: one *pump* owns the claiming and flushing connection and alternates between the two, so claims never outrun
outcomes: `concurrency` and a small prefetch bound the leases of this worker, also while the database is unavailable.
Every lease waits for its turn, runs, or has its outcome in the buffer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from pgtask._fastpath import CounterPage, Leases, Marks, Outcomes, TaskLease
from pgtask._invariants import CHECKS_INVARIANTS
from pgtask._log import EventLog
from pgtask._postgres.store import Link
from pgtask._postgres.times import allow_far_times
from pgtask._postgres.writer import ASIDE_SETTINGS, SHARED_SETTINGS, Aside
from pgtask._status import Reason, Totals, session_name
from pgtask._traces import find_tracer
from pgtask._worker.behind import Behind
from pgtask._worker.burst import Burst
from pgtask._worker.capacity import Capacity
from pgtask._worker.claim import Claim
from pgtask._worker.decode import PUT_BACK_DELAY, UnknownSteps, build_table
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import Flush
from pgtask._worker.forked import end_if_copy
from pgtask._worker.groups import Groups
from pgtask._worker.hold import Hold
from pgtask._worker.invariants import PumpInvariants
from pgtask._worker.leaving import cancel_steps, release_leases
from pgtask._worker.limits import Limits
from pgtask._worker.pauses import Pauses
from pgtask._worker.renew import MAX_WAIT, Renew
from pgtask._worker.schedules import Schedules
from pgtask._worker.suspects import Suspects
from pgtask._worker.transactions import Transactions
from pgtask._worker.turn_slots import TurnSlots
from pgtask._worker.wake import Wake
from pgtask._workflow.executor import RunExecutor
from pgtask._workflow.journal import PostgresJournal
from pgtask._workflow.steps import StepRunner
from pgtask.app import App
from pgtask.config import Config

__all__ = ["Pipeline"]

log = EventLog("pgtask.pipeline")

GATHER_INTERVAL = 0.004  # seconds in which more outcomes of steps that await may join a batch,
MAX_GATHERING = 5  # and how many such intervals there are at most
OTHERS_FIRST = {True: 0.4, False: 2.0}  # seconds for idle workers that listen, or poll, to claim what was released
CHECK_INTERVAL = 1.0  # seconds until the pump checks all its inputs in any case
MEETING_BATCH = 200  # tasks in a claim without a free slot, of which most have to wait for limits
SMALL_BATCH = 100  # outcomes that are not worth a transaction of their own while the worker has tasks to start


class Pipeline:
    """The stages of one worker, wired to each other, and the pump that drives them. Make it on the running loop.

    It calls `stopped` when the workers are told to stop, by `pgtask stop` or a notification.
    """

    def __init__(
        self,
        config: Config,
        app: App,
        *,
        worker: bytes,
        marks: Marks,
        turn_slots: TurnSlots | None,
        page: CounterPage | None = None,
        stopped: Callable[[], None],
    ) -> None:
        assert config.dsn is not None
        self._config = config
        self._dsn = config.dsn
        self._pooled = not config.listen
        self._page = page
        self._session = f"pgtask worker {os.getpid()}"
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.Event()  # something for the pump to do
        self._stop_now = False
        self._failure: BaseException | None = None
        self._meets_limited = False  # whether most tasks of the last claim have to wait for limits
        self._done_before = 0  # tasks that were done at the last turn of the pump
        self.leaving: Reason | None = None
        """The reason why it claims no more, or None while it does."""
        name = session_name(os.getpid(), worker)
        self.link = Link(self._dsn, name, pooled=self._pooled, settings=SHARED_SETTINGS)
        self.aside = Aside(self._link("aside", ASIDE_SETTINGS, far_times=bool(app.workflows)))
        self._leases = Leases()
        self._table = build_table(app)
        self._build_claim(app, worker)
        self._build_dispatch(app, marks)
        self._flush = Flush(
            *(self.link, self._leases, self.aside, self._work.set, self._look_in),
            changed=self.groups.note_changed,
            page=page,
        )
        self._build_renew()
        look = self._link("look", {}, far_times=False)
        self.transactions = Transactions(
            self.dispatch, self._flush, look, lease_timeout=config.lease_timeout, written=self._note_outcomes
        )
        self._build_journal(app)
        self._build_wake(stopped)
        self._capacity = Capacity(
            *(self._leases, self.dispatch, self._flush, self._suspects),
            concurrency=config.concurrency,
            batch=config.batch,
        )
        self._hold = Hold(
            *(self.link, self._claim, self.dispatch, self._leases, self._flush, self._capacity, self._suspects),
            lease_timeout=config.lease_timeout,
            concurrency=config.concurrency,
            work=self._work,
            is_over=lambda: self.leaving is not None or self._failure is not None,
            lose=self._lose,
            watch=self.renew.watch_waiting,
            groups=self.groups,
            limits=self.limits,
            slots=turn_slots,
            page=page,
        )
        self._invariants = PumpInvariants(self._leases, self.dispatch, self._flush, self._suspects)

    # --- the stages

    def _link(self, purpose: str, settings: Mapping[str, str], *, far_times: bool) -> Link:
        on_open = allow_far_times if far_times else None
        return Link(self._dsn, f"{self._session} {purpose}", pooled=self._pooled, on_open=on_open, settings=settings)

    def _build_claim(self, app: App, worker: bytes) -> None:
        config = self._config
        skips_foreign = config.unknown != "park"
        self._claim = Claim(
            self.link,
            worker=worker,
            queues=config.queue,
            lease_timeout=config.lease_timeout,
            max_step_bytes=config.max_step_bytes,
            min_poll=1.0 if config.listen and not config.burst else 0.05,
            max_poll=1.0 if config.burst or not config.listen else 30.0,
            families=self._table.families if skips_foreign else None,
        )
        self._behind = Behind(self.link, listens=config.listen)
        self.groups = Groups(self.link)
        self.limits = Limits(
            *(self.link, self._claim, app.limits.values()),
            worker=worker,
            queues=config.queue,
            lease_timeout=config.lease_timeout,
            max_step_bytes=config.max_step_bytes,
        )
        self.pauses = Pauses(
            *(self.link, self._claim, self._table),
            listens=config.listen,
            limited=self.limits.learn,
            groups=self.groups,
        )
        self.schedules = Schedules(self.link, config.app or "", {} if config.burst else app.schedules)
        self.burst = Burst(
            self.link,
            self._claim,
            names=app.tasks if skips_foreign else None,
            queues=config.queue,
            horizon=config.burst_horizon,
            foreign=self._claim.foreign.pattern,
            limits=self.limits,
        )

    def _build_dispatch(self, app: App, marks: Marks) -> None:
        config = self._config
        self._unknown = UnknownSteps(
            park=config.unknown == "park",
            delay=PUT_BACK_DELAY + (config.burst_horizon if config.burst else 0.0),
        )
        self.dispatch = Dispatch(
            self._table,
            self._leases,
            concurrency=config.concurrency,
            max_step_bytes=config.max_step_bytes,
            marks=marks,
            page=self._page,
            wake=self._work.set,
            unknown=self._unknown.delay_for,
            is_foreign=self._is_foreign,
            broke=self.fail,
        )
        self.dispatch.batches.expect([None if step.batch is None else step.batch.size for step in app])
        self.dispatch.returns = 1 if config.listen else 2  # another worker may have had it between two polls
        self._suspects = Suspects(self.dispatch, max_group=config.concurrency)

    def _build_renew(self) -> None:
        self.renew = Renew(
            self._dsn,
            self._leases,
            name=f"{self._session} renew",
            pooled=self._pooled,
            lease_timeout=self._config.lease_timeout,
            heartbeat_interval=self._config.heartbeat_interval,
            lost=lambda leases: self._call_soon(self._lose, leases),
            refused=lambda error: self._call_soon(self.fail, error),
            released=lambda leases, locked: self._call_soon(self._note_released, leases, locked),
            call_soon=self._call_soon,
            abandon_claim=self._claim.abandon_stalled,
        )

    def _build_journal(self, app: App) -> None:
        self.journal: PostgresJournal | None = None
        if app.workflows:
            link = self._link("journal", SHARED_SETTINGS, far_times=True)
            self.journal = PostgresJournal(link, self.aside, due_in=self._poll_in, page=self._page)
            runner = StepRunner(
                self.dispatch, self.dispatch.threads, max_bytes=self._config.max_step_bytes, end_if_copy=end_if_copy
            )
            RunExecutor(app, self._leases, self.dispatch, journal=self.journal, runner=runner)

    def _build_wake(self, stopped: Callable[[], None]) -> None:
        self.wake: Wake | None = None
        if self._config.listen:
            self.wake = Wake(
                self._dsn,
                name=f"{self._session} listen",
                queues=self._config.queue,
                hint=self._poll_soon,
                behind=self._look_behind,
                paused=self._look_for_pauses,
                stop=stopped,
                obeys_notify=not self._config.ignore_stop_notify,
            )

    def trace_steps(self, stack: AsyncExitStack) -> None:
        """Make spans of the steps whose rows carry a trace, if this process traces; export the last ones at the end."""
        if (tracer := find_tracer()) is not None:
            from pgtask._worker.spans import StepSpans  # loads OpenTelemetry, which a worker that does not trace lacks

            self._claim.read_traces()
            self._leases.has_traces = True
            self.dispatch.spans = spans = StepSpans(tracer)
            stack.push_async_callback(spans.flush)

    # --- what may happen at any time

    def _call_soon(self, function: Any, *arguments: Any) -> None:
        """Call a function on the loop, from the renewing thread, unless the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _poll_soon(self) -> None:
        """Poll at once, since a task may have become due."""
        self._claim.poll_soon()
        self.limits.look_soon()
        self._work.set()

    def _look_behind(self) -> None:
        """Look for tasks that wait behind others, since one was enqueued."""
        self._behind.look_soon()
        self._work.set()

    def _look_for_pauses(self) -> None:
        """Look for what is paused, since that may have changed."""
        self.pauses.look_soon()
        self._work.set()

    def _look_in(self, seconds: float) -> None:
        """Poll when a task falls due that a step of this worker has enqueued."""
        if seconds <= 0:
            self._poll_soon()
        else:
            self._poll_in(seconds)

    def _poll_in(self, seconds: float) -> None:
        """Poll when a run falls due that the journal has put off, beside the pump."""
        before = self._claim.next_poll
        self._claim.poll_in(seconds)
        if self._claim.next_poll < before:
            self._work.set()

    def _note_released(self, leases: list[TaskLease], locked: int) -> None:
        """Note leases that the renewing thread has released, and how many it could not release yet."""
        pause = OTHERS_FIRST[self._config.listen]
        self._capacity.note_released(leases, locked, pause=pause)
        self._leases.remove_released(leases)
        self.dispatch.forget_released(leases, pause + MAX_WAIT / 2)  # not those that another worker has had meanwhile
        log.debug("prefetch.released", tasks=len(leases), locked=locked)

    def _is_foreign(self, lease: TaskLease, family: str) -> bool:
        if not self._unknown.is_foreign(family):
            return False
        self._claim.skip_foreign(lease.token)
        return True

    def drain(self, reason: Reason) -> None:
        """Claim no more; let the running steps end."""
        if self.leaving is None:
            self.leaving = reason
            self.dispatch.draining = True
        self._work.set()

    @property
    def is_idle_in_outage(self) -> bool:
        """Return whether it holds no lease, and the pump waits for a database that is unavailable."""
        return self.link.is_unavailable and not len(self._leases)

    @property
    def held(self) -> int:
        return len(self._leases)

    @property
    def database_clock(self) -> tuple[float, float] | None:
        """A time of the database, and how many seconds ago that was; None if it is not known."""
        return self._claim.database_clock

    @property
    def unwritten(self) -> int:
        """The outcomes that are not in the database yet."""
        return len(self.dispatch.outcomes) + self._flush.blocked

    def stop_now(self) -> None:
        """Do not wait for the running steps."""
        self.drain("drained")
        self._stop_now = True

    def _lose(self, leases: list[TaskLease]) -> None:
        for lease in leases:
            if lease.is_open:
                self.dispatch.drop_lost(lease)
                self._flush.add_lost(lease, ends_in=self.renew.margin)
        self._work.set()

    def fail(self, error: BaseException) -> None:
        """End this worker, since a stage has failed: the pump raises the error."""
        self._failure = self._failure or error
        self._work.set()

    # --- the pump

    async def pump(self) -> None:
        """Flush and claim in turn until the worker leaves and no step of it runs."""
        while True:
            self._work.clear()
            if self._failure is not None:
                raise self._failure
            await self._flush_gathered()
            await self._obey_pauses()
            await self._promote()
            await self._start_scheduled()
            await self._let_wait()
            await self._tend_groups()
            unused = self._flush.take_releasable() + self._suspects.take_unwanted() + self.dispatch.take_unwanted()
            if self.dispatch.quarantined:
                unused += self.dispatch.batches.take_unstarted()
            elif self.dispatch.closed_batches:
                self.dispatch.batches.start()
            await self._flush.release(unused)
            if self.leaving is not None:
                await self._flush.release(self.dispatch.take_ready() + self._suspects.take_unstarted())
                if self._stop_now or self._is_quiet():
                    return
            elif await self._claim_or_try_suspects() or (self._config.burst and await self._end_burst()):
                continue
            if not self._work.is_set() and not len(self.dispatch.outcomes):
                self._invariants.check_owners()
                await self._wait_for_work()

    async def _obey_pauses(self) -> None:
        """Look for what is paused if it is time, and start nothing more of it: release what waits here to start."""
        if self.leaving is None and time.monotonic() >= self.pauses.due_at and await self.pauses.look():
            await self._flush.release(self.dispatch.take_ready() + self._suspects.take_unstarted())

    async def _tend_groups(self) -> None:
        """Look after groups if it is time, and start nothing more of cancelled ones: release what waits here to
        start."""
        if time.monotonic() >= self.groups.due_at and await self.groups.work():
            unstarted = self.dispatch.batches.take_unstarted()
            await self._flush.release(unstarted + self.dispatch.take_ready() + self._suspects.take_unstarted())

    async def _without_cancelled(self, leases: list[TaskLease]) -> list[TaskLease]:
        """Return those of the leases that are no members of cancelled groups; the tasks of the others are removed."""
        if not self.groups.cancelled or not (gone := await self.groups.remove_cancelled(leases)):
            return leases
        self._leases.remove_all([lease for lease in leases if lease.id in gone])
        return [lease for lease in leases if lease.id not in gone]

    async def _promote(self) -> None:
        """Make tasks due that wait behind others which are gone."""
        if self._flush.done != self._done_before:
            self._behind.note_outcomes()
        self._done_before = self._flush.done
        if self.leaving is None and time.monotonic() >= self._behind.due_at and await self._behind.promote():
            self._poll_soon()

    async def _start_scheduled(self) -> None:
        """Start the tasks of schedules whose time has come."""
        if self.leaving is None and time.monotonic() >= self.schedules.due_at and await self.schedules.look():
            self._poll_soon()

    async def _let_wait(self) -> None:
        """Write what steps have shown about their limits, and have tasks wait for theirs that were claimed without."""
        await self._note_limits()
        if unlimited := self.dispatch.take_unlimited():
            await self._flush.let_wait(unlimited)
            self.limits.look_soon()

    async def _note_limits(self) -> None:
        if self.limits.is_used:
            await self.limits.write_notes(self.dispatch.take_limit_notes())
            await self.limits.forget()

    def _is_quiet(self) -> bool:
        """Return whether no step executes, and every outcome is in the database."""
        return not (self.dispatch.suspended or len(self.dispatch.outcomes) or self._flush.blocked)

    async def _flush_gathered(self) -> None:
        """Write the buffer, and continue the tasks that stay in this worker."""
        if returned := await self._without_cancelled(self._flush.take_returned()):
            if self.dispatch.quarantined:  # which did not wait for them
                await self._flush.release(returned)
            else:
                self.dispatch.start_next_steps(returned)
        if len(self.dispatch.outcomes) or self.transactions.ended:
            for _ in range(MAX_GATHERING):
                if not self._may_gather():
                    break
                await asyncio.sleep(GATHER_INTERVAL)
            self.transactions.ended = 0
        if len(self.dispatch.outcomes):
            await self._write(self.dispatch.take_outcomes())
            self.dispatch.start_next_steps(await self._without_cancelled(self._flush.take_continuing()))

    def _may_gather(self) -> bool:
        """Return whether it is too early to write and to claim. Steps that await end one by one: while the worker has
        tasks to start, and no task waits for its outcome to be durable, doing that one by one would cost more than the
        steps do."""
        outcomes, ended = self.dispatch.outcomes, self.transactions.ended
        goes_on = outcomes.continued or self._flush.returned
        is_small = len(outcomes) + ended < SMALL_BATCH and not goes_on
        return is_small and bool(self.dispatch.ready) and self.leaving is None

    async def _write(self, outcomes: Outcomes) -> None:
        await self._note_limits()
        self._note_outcomes(outcomes)
        await self._flush.flush(outcomes)

    def _note_outcomes(self, outcomes: Outcomes) -> None:
        """Note what the outcomes say about the next claims."""
        for row in outcomes.rescheduled:
            if row.error is None:
                self._claim.poll_in(row.delay)
        self._capacity.prefetch.count_outcomes(len(outcomes))
        if self.limits.is_used:
            self.limits.note_outcomes(outcomes)

    def _is_empty(self) -> bool:
        """Return whether no step executes or waits for its turn, and every outcome is in the database, or was set
        aside, which may last: that step has ended."""
        return not (self.dispatch.suspended or len(self.dispatch.outcomes) or self.dispatch.waiting)

    async def _claim_or_try_suspects(self) -> bool:
        came = await self._claim_tasks()
        is_empty = self._is_empty()
        self._suspects.advance(is_empty=is_empty, is_idle=is_empty and not came)
        return came

    async def _claim_tasks(self) -> bool:
        """Claim for the free slots and a little ahead. Returns whether tasks came, or may come from another lane."""
        self._capacity.update()
        limit = self._claim_limit()
        same_lane_from = self._suspects.fills_from
        if same_lane_from is None and self.pauses.was_read and (room := self._room_for_limits()) > 0:
            return await self._claim_limited(room)
        if not self.pauses.was_read or limit <= 0 or (same_lane_from is None and not self._claim.may_find_tasks):
            return False
        if seconds := self._hold.seconds_to_slot():
            self._capacity.prefetch.pause_claims(seconds)
            return False
        lane = await self._claim.prepare() if same_lane_from is None else None
        if lane is not None and self._hold.may_hold(lane, limit):
            self._note_waiting(False)
            return self._hold.may_begin(lane) and await self._hold.run_turn(lane, limit)
        if self._hold.should_wait(lane):
            return False
        began = time.monotonic()
        wanted = self._suspects.may_claim
        rows, token, sent = await self._claim.claim_batch(
            limit, suspects=wanted, same_lane_from=same_lane_from, is_prepared=True
        )
        self._hold.record_claim(lane, len(rows))
        if self._page is not None:
            self._page.note_claim(len(rows))
        if not rows:
            self._meets_limited = False
            return self._claim.has_more
        self._capacity.prefetch.record_claim(time.monotonic() - began)
        leases, displaced = self._leases.add_claimed(rows, token, sent)
        await self._admit(leases, displaced, requested=self._claim.requested)
        return True

    def _claim_limit(self) -> int:
        """Return how many tasks to claim. Those that turn out to wait for limits take no slot: while most do, it goes
        on without one, so that the key of each takes part in the turns."""
        limit = self._capacity.claim_limit()
        if limit <= 0 and self._meets_limited and len(self.dispatch.ready) < MEETING_BATCH:
            return MEETING_BATCH
        return limit

    def _sort_limited(self, leases: list[TaskLease]) -> list[TaskLease]:
        """Leave out, of claimed tasks, those that have to wait for the limits of their steps."""
        if not self.limits.is_used:
            return leases
        within = self.dispatch.sort_limited(leases)
        if leases and leases[0].limit_key is None:
            self._meets_limited = 2 * len(within) < len(leases) and not self.dispatch.may_prove(leases)
        return within

    def _room_for_limits(self) -> int:
        """Return how many tasks to claim under limits now."""
        if not self.limits.is_used or (limit := self._capacity.claim_limit()) <= 0:
            return 0
        return limit if self.limits.is_due(others_wait=self._claim.may_find_tasks) else 0

    async def _claim_limited(self, most: int) -> bool:
        """Claim what a limit allows. Returns whether tasks came."""
        rows, token, sent = await self.limits.claim(most, suspects=self._suspects.may_claim)
        if rows:
            leases, displaced = self._leases.add_claimed(rows, token, sent)
            self.limits.mark(leases, rows)
            await self._admit(leases, displaced, requested=most)
        return bool(rows) or self._claim.may_find_tasks

    async def _admit(self, leases: list[TaskLease], displaced: list[TaskLease], *, requested: int) -> None:
        """Start claimed tasks, but those of cancelled groups, and those that have to wait for limits."""
        self._lose(displaced)
        self._note_waiting(False)
        self.renew.watch_waiting()
        suspects = await self._without_cancelled(self._leases.take_suspects())
        leases = self._sort_limited(await self._without_cancelled(leases))
        if self.limits.is_used:
            suspects = [lease for lease in suspects if lease.is_ready]
        is_empty = self._is_empty()
        self.dispatch.admit(self._suspects.sort_claimed(leases, suspects, requested=requested, is_empty=is_empty))

    async def _wait_for_work(self) -> None:
        """Wait until something happens, or a timer rings; there always is a timer, unless the worker leaves."""
        await self._hold.end_unused()
        wait = max(0.0, min(self._suspects.seconds_to_wait(), self._flush.seconds_to_wait()))
        if self.leaving is None:
            looks = min(self._behind.due_at, self.pauses.due_at, self._limits_due_at(), self.schedules.due_at)
            looks = min(looks, self.groups.due_at)
            wait = min(wait, self._seconds_to_claim(), max(0.0, looks - time.monotonic()))
        self._note_waiting(self.leaving is None and self._capacity.claim_limit() > 0 and not self._claim.may_find_tasks)
        timer = None
        if wait < float("inf"):
            due, expected = time.monotonic() + wait, self._capacity.expects_slots()
            timer = self._loop.call_later(wait, self._on_timer, due, expected, self._claim.next_poll)
        await self._work.wait()
        if timer is not None:
            timer.cancel()

    def _note_waiting(self, waits: bool) -> None:
        """Note whether this worker waits for tasks, so that writers notify it."""
        if self.wake is not None:
            self.wake.sleep.set_waiting(waits)

    def _limits_due_at(self) -> float:
        """The time of the next claim under limits, if there is room for one."""
        has_room = self.pauses.was_read and self._capacity.claim_limit() > 0
        return self.limits.due_at if has_room else float("inf")

    def _seconds_to_claim(self) -> float:
        """Seconds until a claim may bring tasks, as far as this worker knows, or until it checks for free slots."""
        if pace := self._capacity.prefetch.seconds_to_claim():
            return pace
        if self._claim_limit() <= 0 or not self.pauses.was_read or self._hold.is_waiting:
            return CHECK_INTERVAL
        return 0.0 if self._claim.may_find_tasks else max(0.0, self._claim.next_poll - time.monotonic())

    def _on_timer(self, due: float, expected_slots: bool, next_poll: float) -> None:
        """Wake the pump."""
        self._capacity.late = time.monotonic() - due
        if CHECKS_INVARIANTS and self.leaving is None and not self._work.is_set():
            may_claim = self._capacity.claim_limit() > 0 and self._claim.may_find_tasks and self.pauses.was_read
            expected = expected_slots and self._claim.next_poll >= next_poll
            if error := self._invariants.find_missed_wakeup(may_claim=may_claim, expected_claim=expected):
                self.fail(error)
        self._work.set()

    # --- the end

    async def _end_burst(self) -> bool:
        """With --burst: leave when nothing is left to do. Returns false if there is nothing new to find either."""
        if self._is_empty() and not self._claim.may_find_tasks:
            self.dispatch.batches.close_all()
        if len(self._leases) or not await self.burst.check_end():
            return False
        if self.burst.is_over and (await self._behind.promote_all() or await self.groups.end_all()):
            self.burst.is_over = False
            self._poll_soon()
        if self.burst.is_over:
            self.leaving = self.leaving or "burst"
        return True

    async def leave(self) -> None:
        """Cancel what still runs, write the last outcomes and release the rest, within 2 * `UNWIND` seconds."""
        await cancel_steps(self._leases, self.dispatch, self._work, lease_timeout=self._config.lease_timeout)
        await release_leases(self._leases, self.dispatch, self._flush, self.aside, self._write)

    def totals(self) -> Totals:
        """Return the counts of this worker since it began."""
        finished, parked, lost = self.journal.totals() if self.journal else (0, 0, 0)
        return Totals(
            done=self._flush.done + finished,
            steps=self.dispatch.steps,
            errors=self.dispatch.errors,
            parked=self._flush.parked + parked,
            lost=self._flush.lost + lost,
            put_back=self._unknown.put_back,
        )
