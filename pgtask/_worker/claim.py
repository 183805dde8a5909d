"""claim: take due tasks in batches, highest priority first; within it the lane with the oldest task, oldest first.

Invariants: a claim never takes more tasks than its caller requested; each claim uses a fresh token, which no other
session has ever held; when nothing is due, this stage knows when to poll next.

A *lane* is a queue and a priority. One cheap statement, the *poll*, finds the lanes that have due tasks, and when the
next task of the other lanes falls due; claims then go lane by lane. While a lane is being drained, polls refresh that
picture ten times a second, so a task of higher priority, or an older one in another queue, waits no longer than that.

Each lane has a *floor*: the time of its first task at the poll, then that of the last claimed task. Claims start there,
since the index entries before it mostly belong to finished tasks, and those entries stay for as long as any transaction
of the server might see them. The floor is a hint, not the truth (a task that is released keeps its old time), so the
next poll starts at the beginning again. Where that has become slow, polls start at the floors too (lanes.py).

In lanes that hold tasks of other apps, other statements poll and claim, which skip those tasks: for this app such a
lane is due when a task of its own is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable
from operator import itemgetter
from typing import Any
from uuid import UUID

import msgspec

from pgtask._backoff import Backoff
from pgtask._lease_clock import lease_clock
from pgtask._lease_token import lease_token
from pgtask._log import EventLog
from pgtask._postgres.connection import was_rolled_back
from pgtask._postgres.store import Link
from pgtask._worker.expired import ExpiredLeases
from pgtask._worker.foreign import READ_LIMIT, Foreign
from pgtask._worker.lanes import FLOOR_SLACK, DueLane, Lanes
from pgtask.errors import DatabaseUnavailable, StatementTimeout

__all__ = ["Claim"]

log = EventLog("pgtask.claim")

POLL_INTERVAL = 0.1  # seconds; also when a claim could not take a due task because its row is locked
POLL_SHARE = 20  # while a lane is being drained, polls are this many times their own duration apart, at most
MAX_POLL_INTERVAL = 60.0  # seconds
DEBOUNCE = 0.01  # seconds between two polls, for any number of notifications
MAX_POLL_TIME = 1.0  # seconds; a slower poll counts as one of this duration when something requests the next one
MAX_CLAIM_BYTES = 16 * 1024 * 1024  # of steps in one claim; an estimate from the batches before
MAX_LIMIT = 1_000_000  # tasks in one claim; less after a claim that was too slow
_DUE = itemgetter(5)


class _Lane(msgspec.Struct):
    queue: str
    priority: int
    floor: float  # seconds since the epoch, by the clock of the database
    until: float = float("inf")  # the same, where claims end


class Claim:
    """Finds and takes due tasks over `link`. Without a notification, the time between two polls grows from
    `min_poll` to `max_poll`. `families`: the tasks of the app; None claims all tasks."""

    def __init__(
        self,
        link: Link,
        *,
        worker: bytes,
        queues: tuple[str, ...],
        lease_timeout: float,
        max_step_bytes: int,
        min_poll: float,
        max_poll: float,
        families: Iterable[str] | None = None,
    ) -> None:
        self._link = link
        self._worker = worker
        self._finder = Lanes(link, list(queues))
        self.expired = ExpiredLeases(link, lease_timeout)
        self._lease_timeout = lease_timeout
        self._max_step_bytes = max_step_bytes
        self._idle = Backoff(2 * min_poll, max_poll)  # between two polls that find nothing due
        self._lanes: list[_Lane] = []
        self._polled = -1.0
        self._poll_took = self._last_took = 0.0
        self._hinted = False  # since the last poll began
        self._mean_bytes = 0.0
        self._max_limit = MAX_LIMIT
        self._last_lane: _Lane | None = None
        self.requested = 0
        """The number of tasks that the last claim requested, which may be fewer than its limit."""
        self._lost_tokens: list[UUID] = []
        self.has_more = False
        """True if another lane was known to be due when the last claim returned."""
        self._under_way: list[tuple[UUID, float]] = []  # the claim that was sent and has no answer yet, and since when
        self.foreign = Foreign(link, families)
        self._variant = ""  # of the statements that take tasks
        self._paused_queues: frozenset[str] = frozenset()
        self.next_poll = 0.0
        """The time of the next poll (monotonic seconds), unless a hint comes first."""
        self.next_due: float | None = None
        """The time at which the next waiting task of the served queues falls due (monotonic), as of the last poll."""

    def read_traces(self) -> None:
        """Have the rows of all claims have two more columns before the last: trace, and the queue if there is one."""
        self._variant = ":traced"

    def poll_soon(self) -> None:
        """Poll at once, since a task may have become due; a known lane is drained first."""
        self._hinted = True
        self._idle.reset()
        if not self._lanes:
            self.next_poll = min(self.next_poll, self._earliest_poll())

    def _earliest_poll(self) -> float:
        """The earliest time for a poll that an event requests."""
        return self._polled + max(DEBOUNCE, min(self._poll_took, MAX_POLL_TIME))

    def poll_in(self, seconds: float) -> None:
        """Poll when a task falls due that this worker has put off."""
        due = time.monotonic() + seconds
        self.next_poll = min(self.next_poll, max(due, self._earliest_poll()))
        self.next_due = due if self.next_due is None else min(self.next_due, due)

    @property
    def database_clock(self) -> tuple[float, float] | None:
        """The time of the database (seconds since the epoch) as the last poll has found it, and how many seconds ago;
        None if it has found no task."""
        if (read := self._finder.read) is None or read[1][0] is None:
            return None
        read_at, (_, _, wait, first, *_) = read
        return (first - wait, time.monotonic() - read_at) if math.isfinite(first - wait) else None

    @property
    def may_find_tasks(self) -> bool:
        """Return whether a claim may find something now."""
        return bool(self._lanes) or time.monotonic() >= self.next_poll

    async def prepare(self) -> tuple[str, int] | None:
        """Find the lane of the next claim: poll if it is time, after the release of what a claim took whose reply was
        lost. Return that lane, unless it has tasks of other apps, or the claim may not take all of it."""
        await self._recover_claims()
        if not self._lanes or time.monotonic() >= self.next_poll:
            await self.poll_lanes()
        if not self._lanes or (lane := self._lanes[0]).until < float("inf"):
            return None
        return None if self.foreign.is_mixed(lane.queue, lane.priority) else (lane.queue, lane.priority)

    async def hold_batch(self, limit: int, hold: Callable[..., Awaitable[list[Any]]]) -> tuple[list[Any], UUID]:
        """Lock up to `limit` tasks of the lane that `prepare` has returned, by the statement that `hold` runs.

        Returns the rows as `claim_batch` does, and a token that no row has yet. Raises `DatabaseUnavailable`."""
        lane = self._lanes[0]
        token = lease_token(self._worker)
        self.has_more = False
        limit = self._lower(limit)
        try:
            rows = await hold(
                "turn_lock" + self._variant, lane.queue, lane.priority, limit, self._max_step_bytes, lane.floor
            )
        except StatementTimeout:
            self._max_limit = max(1, limit // 2)
            raise
        rows.sort(key=_DUE)
        self._measure_steps(rows)
        self._update_lane(lane, rows, limit)
        self.foreign.remember_claim(token, lane.queue, lane.priority)
        return rows, token

    def return_to(self, lane: tuple[str, int], due: float) -> None:
        """Claim from that lane from that time on (seconds since the epoch): a task of a claim was not started."""
        for known in self._lanes:
            if (known.queue, known.priority) == lane:
                known.floor = min(known.floor, due - FLOOR_SLACK)
                return
        self.poll_soon()

    def recover(self, token: UUID) -> None:
        """Release, before the next claim, what a statement may have leased whose reply was lost."""
        self._lost_tokens.append(token)

    async def claim_batch(
        self, limit: int, *, suspects: bool = True, same_lane_from: float | None = None, is_prepared: bool = False
    ) -> tuple[list[Any], UUID, float]:
        """Claim up to `limit` tasks of one lane, oldest first.

        Returns the rows (id, step, tried, claims, size, due, group), their token, and the time, by `lease_clock`, from
        which their lease counts. There are no rows when nothing is due, when other sessions have locked what is due, or
        when the connection was lost. Without `suspects`, it takes no task whose last claim ended without an outcome.
        With `same_lane_from` it claims from the lane of the last claim, and no task that fell due before that time.
        With `is_prepared` it is the claim for which `prepare` was called.

        Raises `DatabaseRefused`. Cancelling it loses the answer; the leases then expire.
        """
        if same_lane_from is not None:
            await self._recover_claims()
        elif not is_prepared:
            await self.prepare()
        token = lease_token(self._worker)
        self.has_more = False
        sent = lease_clock()
        if (lane := self._choose_lane(same_lane_from)) is None:
            return [], token, sent
        self.requested = limit = self._lower(limit)
        self._under_way.append((token, time.monotonic()))
        try:
            rows = await self._send_claim(lane, limit, token, suspects=suspects)
        except DatabaseUnavailable as error:
            self._note_failure(token, limit, error)
            return [], token, sent
        self._max_limit = min(MAX_LIMIT, 2 * self._max_limit)
        try:
            self._under_way.pop()
        except IndexError:  # abandoned: the renewing thread has released its tasks, unless the server was even later
            self._lost_tokens.append(token)
            return [], token, sent
        rows.sort(key=_DUE)
        self._measure_steps(rows)
        if same_lane_from is None:
            self._update_lane(lane, rows, limit)
        return rows, token, sent

    def _lower(self, limit: int) -> int:
        """Return the limit, or a lower one if its answer would have too many bytes, or the claim would be too slow."""
        if self._mean_bytes:
            limit = max(1, min(limit, int(MAX_CLAIM_BYTES / self._mean_bytes)))
        return min(limit, self._max_limit)

    def _note_failure(self, token: UUID, limit: int, error: DatabaseUnavailable) -> None:
        self._under_way.clear()
        if isinstance(error, StatementTimeout):
            self._max_limit = max(1, limit // 2)
        if not was_rolled_back(error):
            self._lost_tokens.append(token)

    def _choose_lane(self, same_lane_from: float | None) -> _Lane | None:
        if same_lane_from is None:
            self._last_lane = self._lanes[0] if self._lanes else None
            return self._last_lane
        lane = self._last_lane
        return None if lane is None else _Lane(lane.queue, lane.priority, same_lane_from)

    async def _send_claim(self, lane: _Lane, limit: int, token: UUID, *, suspects: bool) -> list[Any]:
        parameters = (
            *(lane.queue, lane.priority, limit, token),
            *(self._lease_timeout, self._max_step_bytes, lane.floor),
        )
        pattern = None
        if self.foreign.is_mixed(lane.queue, lane.priority):
            pattern = self.foreign.pattern
        else:
            self.foreign.remember_claim(token, lane.queue, lane.priority)
        if pattern is not None or lane.until < float("inf"):
            known = (*parameters, pattern, READ_LIMIT, suspects, lane.until)
            return await self._link.once("claim_known" + self._variant, *known)
        name = "claim" if suspects else "claim_unsuspected"
        return await self._link.once(name + self._variant, *parameters)

    def abandon_stalled(self, seconds: float) -> UUID | None:
        """Give up a claim that has been under way for `seconds`, and return its token, or None.

        The caller releases what the claim took; `claim_batch` then returns nothing. Safe for the renewing thread: the
        thread that takes the entry off the list has the claim.
        """
        try:
            _, since = self._under_way[0]
            return self._under_way.pop()[0] if time.monotonic() - since > seconds else None
        except IndexError:
            return None

    def obey_pauses(
        self, queues: frozenset[str], tasks: Iterable[str], steps: Iterable[str], keys: Iterable[str]
    ) -> None:
        """Claim none of the tasks of these queues, tasks, steps (`Task.Step`) and keys (`Task/key`), and no
        others that were paused."""
        self._paused_queues = queues
        self.foreign.set_paused(tasks, steps, keys)
        self._lanes = [lane for lane in self._lanes if lane.queue not in queues]
        if self._last_lane is not None and self._last_lane.queue in queues:
            self._last_lane = None
        self.poll_soon()

    @property
    def variant(self) -> str:
        """That of the statements that take tasks: `:traced`, or nothing."""
        return self._variant

    @property
    def paused_queues(self) -> frozenset[str]:
        """The queues of which nothing is claimed."""
        return self._paused_queues

    def skip_foreign(self, token: UUID) -> None:
        """Claim no more tasks of other apps from the lane in which the claim of `token` has taken one."""
        self.foreign.mark_lane(token)

    def _update_lane(self, lane: _Lane, rows: list[Any], limit: int) -> None:
        """Learn from a claim of `limit`: the lane may be empty now."""
        is_drained = len(rows) < limit
        if is_drained:
            self._lanes.remove(lane)
        self.has_more = bool(self._lanes)
        passed = rows[-1][5] if rows else None
        is_mixed = self.foreign.is_mixed(lane.queue, lane.priority)
        if not is_mixed or lane.until < float("inf"):
            is_over = is_drained and not is_mixed
            self._finder.record_claim((lane.queue, lane.priority), lane.until, passed, is_drained=is_over)
        if passed is not None:
            lane.floor = passed - FLOOR_SLACK
            self._idle.reset()
        if not self._lanes:
            again = self._earliest_poll()
            if not rows and not self._hinted:  # other sessions have locked what is due: do not poll at once
                again = max(again, self._polled + POLL_INTERVAL)
            self.next_poll = min(self.next_poll, again)

    def _measure_steps(self, rows: list[Any]) -> None:
        """Learn from a claim how large steps are."""
        if rows:
            sample = rows[:: 1 + len(rows) // 20]
            self._mean_bytes += 0.2 * (sum(len(row[1] or "") for row in sample) / len(sample) - self._mean_bytes)

    async def _recover_claims(self) -> None:
        for token in list(self._lost_tokens):
            await self._recover_claim(token)

    async def _recover_claim(self, token: UUID) -> None:
        """Release what a claim took whose reply was lost with the connection; no worker knows of these leases. Those
        whose rows another session has locked are left to the next claim."""
        ((released, left),) = await self._link.run("claim_recover", token)
        if not left:
            self._lost_tokens.remove(token)
        if released:
            log.warning("claim.recovered", tasks=released)

    async def poll_lanes(self, *, is_complete: bool = False) -> None:
        """Free expired leases when it is time, then find the lanes that are due, and when the next one will be. With
        `is_complete` no lane is missed; otherwise one whose tasks came to lie behind its floor may be found later."""
        is_hinted, self._hinted = self._hinted, False
        if time.monotonic() >= self.expired.due_at:
            await self.expired.free()
        found = await self._finder.poll(is_hinted=is_hinted, is_complete=is_complete)
        took, found, again_at = await self._replace_foreign(found, is_complete=is_complete)
        self._polled = now = time.monotonic()
        # By the clock of the database, since ours includes the steps that held up the loop; and the lesser of two,
        # since the database's own clock includes its waits.
        self._poll_took, self._last_took = min(took, self._last_took), took
        due = [_Lane(one.queue, one.priority, one.floor, one.until) for one in found if one.wait <= 0]
        self._lanes = sorted(due, key=lambda lane: (-lane.priority, lane.floor, lane.queue))
        later = min((one.wait for one in found if one.wait > 0), default=None)
        self.next_due = None if later is None else now + later
        if due:
            self.next_poll = now + max(POLL_INTERVAL, min(POLL_SHARE * self._poll_took, MAX_POLL_INTERVAL))
            self.next_due = now
        else:
            self.next_poll = min(now + self._idle.next(), self.expired.due_at)
            if later is not None:
                self.next_poll = min(self.next_poll, now + later)
        self.next_poll = min(self.next_poll, max(again_at, now + max(POLL_INTERVAL, took)))
        if self._hinted:  # in the meantime, perhaps for a task that this poll did not see
            self.next_poll = min(self.next_poll, self._earliest_poll())

    async def _replace_foreign(self, found: list[DueLane], *, is_complete: bool) -> tuple[float, list[DueLane], float]:
        """Replace, in the answer of a poll, the first task of each lane with foreign tasks by our first one; leave the
        paused queues out.

        Returns the seconds that the poll took, the lanes, and the time (monotonic seconds) at which to continue it.
        """
        took, again_at = self._finder.took, self._finder.again_at
        lanes = []
        for one in found:
            if one.queue in self._paused_queues:
                continue
            if one.wait > 0 or not self.foreign.is_mixed(*one[:2]):
                lanes.append(one)
                continue
            wait: float | None = 0.0
            if one.until < float("inf"):
                span = one.floor, one.until
                first, seconds = await self.foreign.find_between(*one[:2], *span, is_complete=is_complete)
                self._finder.record_search(one, first)
            else:
                known, seconds = await self.foreign.find_known(
                    *one[:2], one.floor, one.floor - one.wait, is_complete=is_complete
                )
                wait, first, again_at = known.wait, known.first, min(again_at, known.again_at)
            took += seconds
            if wait is not None and first is not None:
                lanes.append(one._replace(wait=wait, floor=first - FLOOR_SLACK))
        return took, lanes, again_at
