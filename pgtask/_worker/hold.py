"""hold: run short steps while a transaction holds their rows, instead of leasing them.

Theory of operation. A lease costs an UPDATE and a DELETE of each row. A step that ends within microseconds needs no
lease: this stage locks a batch of rows in a transaction, runs the steps, deletes what is done, and commits. The lock of
the row is the lease, and the transaction is the fence. In a *turn*

- a step that goes on is leased by the statement that ends the turn: one that suspends, one whose next step follows now,
  one that may not run here, since its class has not proved that it does not suspend, and one whose outcome enqueues
  tasks, which the flush writes;
- a task that has not started is released by the commit;
- a task that has to wait for its limit is written so. One whose limit lets it run does so while the turn has the key of
  the limit locked, and if it goes on then its lease counts from the end of the turn.

A worker holds a lane only from its third claim there on, and while claims bring many tasks: so the claims of a lane
that kills a whole host are counted in its rows, and a claim of a few tasks costs no more round trips than it did. It
leases the tasks of a lane for a while when a turn has failed, has met suspects, or many steps that may not run in one.

Invariants: no lease of a turn is in `Leases` before the statement that writes it is sent; an outcome of a turn is
written by its transaction or dropped. A turn ends `MAX_TURN` seconds after its start, or after the step that then has
the loop.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import msgspec

from pgtask._backoff import Backoff
from pgtask._fastpath import CounterPage, Leases, Outcomes, TaskLease
from pgtask._lease_clock import lease_clock
from pgtask._log import EventLog
from pgtask._postgres.connection import was_rolled_back
from pgtask._postgres.held import HeldTransaction
from pgtask._postgres.store import Link
from pgtask._worker.capacity import Capacity
from pgtask._worker.claim import Claim
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import WITHOUT_NEW, Flush
from pgtask._worker.groups import Groups
from pgtask._worker.limits import HeldLimits, Limits
from pgtask._worker.suspects import Suspects
from pgtask._worker.turn_slots import TurnSlots
from pgtask.errors import DatabaseUnavailable, DataRefused

__all__ = ["Hold"]

log = EventLog("pgtask.hold")

MIN_CLAIMS = 2  # of a lane, by this worker, before it holds
MIN_BATCH = 50  # tasks of the last claim of the lane, and of a turn
MAX_TURN = 0.05  # seconds
INITIAL_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds for which a lane is leased after a bad turn
SUSPECT_PAUSE = 1.0  # seconds for which it is leased after a turn that met suspects
SLOW_TURN, SLOW_PAUSE = 1.0, 10.0  # seconds of the steps of a turn, and for which the lane is leased after it
SLOT_INTERVAL = 0.03  # seconds between two tries to get a slot for turns, on average
MAX_SLOT_WAIT = 1.0  # seconds without one after which this worker leases a batch, for the others may be stuck
KEY_PAUSE = 0.005  # seconds, on average, without claims after a turn of which most keys were locked
PROOF_PAUSE = 0.02  # seconds for which a lane is leased whose steps may soon prove not to suspend
MAX_LANES = 1000  # whose record is kept
IS_ON = os.environ.get("_PGTASK_HOLD") != "0"


class _Record:
    """The record of a lane."""

    def __init__(self) -> None:
        self.claims = 0
        self.last = 0  # tasks that the last claim has brought
        self.leased_until = 0.0  # monotonic seconds
        self.is_light = True  # the steps of the last turn took less than its statements
        self.is_limited = False  # most tasks of the last turn had limits that turns obey
        self.pauses = Backoff(INITIAL_PAUSE, MAX_PAUSE)

    def pause(self) -> None:
        self.leased_until = time.monotonic() + self.pauses.next()


class _Ended(msgspec.Struct):
    """What a turn has to write: its outcomes, and the leases of the steps that go on."""

    outcomes: Outcomes
    unended: list[TaskLease]
    waiting: list[tuple[TaskLease, str, float]]  # for their limits, each with its key and cost

    @property
    def limited(self) -> list[tuple[TaskLease, str, float]]:
        """The tasks whose rows get the key of a limit: those that wait, and those that go on under it."""
        suspended = [(lease, lease.limit_key, 0.0) for lease in self.unended if lease.limit_key is not None]
        return self.waiting + suspended

    @property
    def going_on(self) -> list[TaskLease]:
        """The leases whose next step may run when it is written."""
        return [lease for lease, _ in self.outcomes.continued]

    @property
    def is_done(self) -> bool:
        return not (self.unended or self.outcomes.continued or self.outcomes.rescheduled)


class Hold:
    """The turns of one worker, over the connection of its claims.

    `lose` gets leases of this worker that it has lost, and `watch` has the renewing thread watch the loop. `work` is
    the event that wakes the pump, and `is_over` says whether the worker is to start no more steps.
    """

    def __init__(
        self,
        link: Link,
        claim: Claim,
        dispatch: Dispatch,
        leases: Leases,
        flush: Flush,
        capacity: Capacity,
        suspects: Suspects,
        *,
        lease_timeout: float,
        concurrency: int,
        work: asyncio.Event,
        is_over: Callable[[], bool],
        lose: Callable[[list[TaskLease]], None],
        watch: Callable[[], None],
        groups: Groups,
        limits: Limits,
        slots: TurnSlots | None = None,
        page: CounterPage | None = None,
    ) -> None:
        self._transaction = HeldTransaction(link, idle_timeout=lease_timeout)
        self._link = link
        self._claim = claim
        self._dispatch = dispatch
        self._leases = leases
        self._flush = flush
        self._capacity = capacity
        self._suspects = suspects
        self._lease_timeout = lease_timeout
        self._concurrency = concurrency
        self._work = work
        self._is_over = is_over
        self._lose, self._watch = lose, watch
        self._records: dict[tuple[str, int], _Record] = {}
        self._is_late = False  # the turn has had its time
        self._groups, self._limits = groups, limits
        self._changed: list[int] = []  # groups whose members the present turn has written
        self._slots = slots
        self._page = page
        self._waits_since: float | None = None  # monotonic seconds, for a slot
        self._leaves_lane = False  # whether the last lane waits for a turn
        self.has_waited = False
        """Whether it has waited for too long, and leases its next batch."""

    def record_claim(self, lane: tuple[str, int] | None, tasks: int) -> None:
        """Note a claim of leases from a lane."""
        self._free_slot()
        self.has_waited = False
        if lane is None or not IS_ON:
            return
        if len(self._records) >= MAX_LANES:
            self._records.clear()
        record = self._records.setdefault(lane, _Record())
        record.claims += 1
        record.last = tasks

    def may_hold(self, lane: tuple[str, int] | None, limit: int) -> bool:
        """Return whether to hold the next batch of `limit` tasks of a lane, and not to lease it."""
        if lane is None or limit < MIN_BATCH or (record := self._records.get(lane)) is None:
            return False
        dispatch = self._dispatch
        return (
            record.claims >= MIN_CLAIMS
            and record.last >= MIN_BATCH
            and time.monotonic() >= record.leased_until
            and not dispatch.waiting
            and dispatch.suspended < self._concurrency
            and not len(self._suspects)
            and not self.has_waited
        )

    def should_wait(self, lane: tuple[str, int] | None) -> bool:
        """Return whether to leave a lane alone until what was leased has started: its tasks have limits, and a lease is
        one write more than a turn."""
        record = None if lane is None else self._records.get(lane)
        self._leaves_lane = record is not None and record.is_limited and time.monotonic() >= record.leased_until
        return self.is_waiting

    @property
    def is_waiting(self) -> bool:
        """Return whether it leaves a lane alone until what was leased has started; the last start wakes the pump."""
        return self._leaves_lane and bool(self._dispatch.waiting)

    def may_begin(self, lane: tuple[str, int]) -> bool:
        """Return whether a turn of a lane may begin; else this worker waits for a slot."""
        if not self._records[lane].is_light:
            self._free_slot()
            return True
        if self._slots is None or self._slots.take():
            return True
        self._waits_since = time.monotonic()
        return False

    def seconds_to_slot(self) -> float:
        """Return the seconds until the next try to get a slot, or 0 unless this worker waits for one. If that lasts for
        too long, it leases a batch."""
        if self._waits_since is None:
            return 0.0
        assert self._slots is not None
        self.has_waited = time.monotonic() - self._waits_since > MAX_SLOT_WAIT
        if self.has_waited or self._slots.take():
            self._waits_since = None
            return 0.0
        return random.uniform(0.5, 1.5) * SLOT_INTERVAL

    def _free_slot(self) -> None:
        if self._slots is not None:
            self._slots.free()

    async def end_unused(self) -> None:
        """End a transaction that was begun for a turn that does not follow at once: the server bounds its idle time."""
        self._free_slot()
        if self._transaction.is_open:
            await self._transaction.roll_back()

    async def run_turn(self, lane: tuple[str, int], limit: int) -> bool:
        """Hold a batch of the lane, and run it. Return whether tasks came, or may come from another lane."""
        with self._dispatch.in_turn():
            return await self._take_turn(lane, limit)

    async def _take_turn(self, lane: tuple[str, int], limit: int) -> bool:
        record = self._records[lane]
        began = time.monotonic()
        try:
            await self._transaction.begin()
            rows, token = await self._claim.hold_batch(limit, self._transaction.fetch)
        except DatabaseUnavailable:
            await self._transaction.roll_back()
            record.pause()
            return False
        self._capacity.prefetch.record_claim(time.monotonic() - began)
        record.last = len(rows)
        if self._page is not None:
            self._page.note_claim(len(rows))
        leases, displaced = self._leases.hold(rows, token)
        self._lose(displaced)
        self._watch()
        if len(leases) < len(rows):
            record.leased_until = time.monotonic() + SUSPECT_PAUSE
            self._claim.return_to(lane, min(row[5] for row in rows if row[3]))
        try:
            leases = await self._groups.remove_held(leases, self._transaction)
            held = await self._limits.hold(leases, self._dispatch, self._transaction)
        except (DatabaseUnavailable, DataRefused):
            await self._transaction.roll_back()
            record.pause()
            return False
        seconds = await self._run(held.runs)
        outcomes, unended, unstarted = self._dispatch.take_held()
        if unstarted or held.left:
            ids = {lease.id for lease in unstarted + held.left}
            self._claim.return_to(lane, min(row[5] for row in rows if row[0] in ids))
        ended = _Ended(outcomes, unended, held.waiting)
        self._dispatch.note_turn_leases(unended)
        if await self._end(ended, token, begins=record.last >= limit and not self._is_over()):
            record.is_light = 2 * seconds < time.monotonic() - began
            self._learn(record, ended, len(leases), seconds)
            self._learn_limits(record, held)
        else:
            record.pause()
        return bool(rows) or self._claim.has_more

    async def _run(self, leases: list[TaskLease]) -> float:
        """Run the steps until all have started, or it is time to end the turn. Return the seconds that it took."""
        if not leases:
            return 0.0
        dispatch, work, loop = self._dispatch, self._work, asyncio.get_running_loop()
        began = loop.time()
        self._is_late = False
        timer = loop.call_later(MAX_TURN, self._end_in_time)
        work.clear()
        dispatch.admit(leases)
        while True:
            await work.wait()
            if not (dispatch.ready or dispatch.batches.holds) or self._is_late or self._is_over():
                break
            work.clear()
        timer.cancel()
        work.set()  # it may have been set for another reason, which the pump looks for
        return loop.time() - began

    def _end_in_time(self) -> None:
        self._is_late = True
        self._work.set()

    async def _end(self, ended: _Ended, token: UUID, *, begins: bool) -> bool:
        """Write what a turn has brought, and commit. Return whether it is written."""
        outcomes = ended.outcomes
        transaction = self._transaction
        self._capacity.prefetch.count_outcomes(len(outcomes))
        is_uncertain = False
        try:
            written = await self._write(ended, token)
            is_uncertain = True
            await transaction.commit(begins=begins and ended.is_done)
        except (DatabaseUnavailable, DataRefused) as error:
            await transaction.roll_back()
            is_uncertain = is_uncertain and not (isinstance(error, DataRefused) or was_rolled_back(error))
            if not is_uncertain:
                self._limits.keep_held_notes()
            await self._drop(ended, token, error, is_uncertain=is_uncertain)
            return False
        finally:
            self._dispatch.marks.forget_held()
        self._groups.note_changed(self._changed)
        if ended.waiting:
            self._limits.look_soon()
        self._limits.note_leased(ended.unended)
        self._flush.count_held(outcomes, done=written[0], rescheduled=written[2])
        for row in outcomes.rescheduled:
            if row.error is None:
                self._claim.poll_in(row.delay)
        if ended.unended or outcomes.continued:
            self._dispatch.start_next_steps(ended.going_on)
            self._dispatch.admit([lease for lease in ended.unended if lease.is_open and not lease.is_running])
        return sum(written) == len(outcomes) + len(ended.unended)

    async def _write(self, ended: _Ended, token: UUID) -> tuple[int, int, int]:
        """Send the statement that writes a turn. Return how many rows are done, leased and rescheduled."""
        outcomes, mark = ended.outcomes, self._transaction.mark
        done = outcomes.done_ids()
        self._changed = []
        await self._limits.write_held_notes(self._dispatch.take_limit_notes(), self._transaction)
        if limited := ended.limited:
            leases, keys, costs = zip(*limited, strict=True)
            ids = [lease.id for lease in leases]
            await self._transaction.execute("limits/turn_wait", ids, mark, list(keys), list(costs))
        has_members = outcomes.has_members
        if ended.is_done and not has_members:
            return await self._transaction.execute("turn_done", done, mark) if done else 0, 0, 0
        if ended.is_done:
            self._changed, counts = outcomes.group_columns()
            args: tuple[Any, ...] = done, mark, self._changed, counts
            if not outcomes.results:
                return await self._transaction.execute("turn_done_members", *args), 0, 0
            args += outcomes.result_groups(), *outcomes.result_columns()
            return await self._transaction.execute("turn_done_members:kept", *args), 0, 0
        going_on = ended.going_on
        self._leases.lease(going_on + ended.unended, lease_clock())
        self._watch()
        ids = [lease.id for lease in going_on + ended.unended]
        steps = [step for _, step in outcomes.continued] + [None] * len(ended.unended)
        _, _, _, _, _, _, gone, _, *columns, tells = outcomes.parameters()[:WITHOUT_NEW]
        values = done, ids, steps, token, self._lease_timeout, gone, *columns, tells, mark
        if has_members:
            ((*written, _, self._changed),) = await self._transaction.fetch(
                "turn_end:grouped", *values, *outcomes.result_columns()
            )
        else:
            ((*written, _),) = await self._transaction.fetch("turn_end", *values)
        return written[0], written[1], written[2]

    async def _drop(self, ended: _Ended, token: UUID, error: Exception, *, is_uncertain: bool) -> None:
        """Drop what a turn has brought, since its transaction was rolled back. If that is not certain, count what is
        gone as done, and release what may have been leased."""
        outcomes = ended.outcomes
        leased = ended.going_on + ended.unended
        for lease in leased:
            self._dispatch.drop_lost(lease)
        dropped = outcomes.leases() + ended.unended
        if is_uncertain:
            if leased:
                self._claim.recover(token)
            ids = outcomes.done_ids()
            ((left,),) = await self._link.run("turn_left", ids)
            if not left:
                self._flush.count_done(outcomes.done)
                dropped = dropped[len(outcomes.done) :]
        self._flush.drop(dropped)
        log.warning("hold.lost", outcomes=len(dropped), error=str(error), hint="their steps run again, under leases")

    def _learn(self, record: _Record, ended: _Ended, tasks: int, seconds: float) -> None:
        """Lease the tasks of the lane for a while if many of a turn had to be, or a step has blocked the loop."""
        if seconds > SLOW_TURN:
            record.leased_until = time.monotonic() + SLOW_PAUSE
        elif 4 * len(ended.unended) > tasks:
            record.pause()
        elif tasks:
            record.pauses.reset()

    def _learn_limits(self, record: _Record, held: HeldLimits) -> None:
        """Leave the lane to others for a moment if most of a turn had to be left."""
        record.is_limited = held.are_mostly_limited
        if not held.are_mostly_left:
            return
        if self._dispatch.may_prove(held.left):
            record.leased_until = time.monotonic() + PROOF_PAUSE
        else:
            self._capacity.prefetch.pause_claims(random.uniform(0.5, 1.5) * KEY_PAUSE)
