"""suspects: the tasks that the death of their worker implicates run again in groups, each alone in its process.

Theory of operation. The column `claims` counts the claims of a step that ended without an outcome, and the present one.
A task with more than one is a *suspect*: it killed its process, or ran beside the task that did. The tasks that were
executing when a process died are one *group*. The statement that releases these rows (release_orphaned.sql, expire.sql)
divides them into two halves, and gives each half a `wakeup_at` of its own. So the suspects of one claim that fall due
at the very same time are one group, and a group that dies again is halved again, until the poison is alone in its
process. A death parks only a task that was alone. Any outcome clears the count.

A worker runs one group at a time and nothing beside it. For that it goes into *quarantine*: it claims nothing, and the
steps that execute come to their end. The cost for other tasks is bounded:

- A busy worker releases a group that it has not met before at once, and claims no suspects for a second: idle workers
  have that time. If it meets the same group again, it enters quarantine with it. If it is not empty within `MAX_HOLD`,
  it releases the group untouched. It tries again after one second, then two, four, up to a minute.
- After a group has run, the worker claims no suspects for as long as the quarantine took.
- A worker that has nothing else to do claims suspects at once.
- After the first death of its members a group has company again when `ISOLATION_TIME` has passed. A death then
  implicates that company as well. From the second death on a group is alone to its end, so that each further death
  leaves half of it.

Invariants: when a group starts, all that executed before has ended, and its outcome is written or waits for a locked
row; until the group is over, nothing starts but its members. A group is over when the code of its members has ended,
also that of a thread whose task has its outcome. A member stays marked until then, since what it left behind may kill
the process under another task. So if the marks name one task, it was alone in its process. Two groups are never joined.
"""

from __future__ import annotations

import time

from pgtask._backoff import Backoff
from pgtask._fastpath import TaskLease
from pgtask._log import EventLog
from pgtask._worker.dispatch import Dispatch

__all__ = ["Suspects"]

log = EventLog("pgtask.suspects")

MAX_CLAIMS = 3  # of a task: after that many losses, the last one alone, it is parked without another try
ISOLATION_TIME = 5.0  # seconds
MAX_HOLD = 1.0  # seconds for which a busy worker holds a group, and claims nothing, to become empty
INITIAL_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds until a busy worker tries again


class Suspects:
    """The group of suspects that one worker holds, and its quarantine. `max_group`: tasks in a group."""

    def __init__(self, dispatch: Dispatch, *, max_group: int) -> None:
        self._dispatch = dispatch
        self._max_group = max_group
        self._group: list[TaskLease] = []
        self._unwanted: list[TaskLease] = []  # to be released
        self._marked: list[TaskLease] = []  # members of groups that have started, until their marks are released
        self._entered_at = 0.0  # of the quarantine
        self._started_at: float | None = None  # of the group
        self._over_since: float | None = None  # when the last member of the group stopped executing
        self.is_filling = False
        """True if the next claim is to bring the rest of the group."""
        self._has_more = False  # the last such claim brought as many members as it asked for
        self._put_off: float | None = None  # due time of the group that was released last
        self._backoff = Backoff(INITIAL_PAUSE, MAX_PAUSE)  # of this group, each time that it is put off
        self._not_before = 0.0

    def __len__(self) -> int:
        """The number of unstarted leases that it holds."""
        return len(self._unwanted) + (len(self._group) if self._started_at is None else 0)

    @property
    def may_claim(self) -> bool:
        """True if a claim may bring suspects."""
        return self.is_filling or time.monotonic() >= self._not_before

    @property
    def is_exclusive(self) -> bool:
        """True while the worker is in quarantine and must claim nothing."""
        return bool(self._group) and not self.is_filling

    @property
    def fills_from(self) -> float | None:
        """The due time of the group of which the next claim is to bring the rest."""
        return self._group[0].due if self.is_filling else None

    def sort_claimed(
        self, leases: list[TaskLease], suspects: list[TaskLease], *, requested: int, is_empty: bool
    ) -> list[TaskLease]:
        """Sort the leases of a claim for `requested` tasks, the `suspects` among them. Return those that may start.
        `is_empty`: no other step executes here or is about to."""
        others = [lease for lease in leases if lease.claims == 1] if suspects else leases
        if self._group:
            due = self._group[0].due
            self._has_more = sum(lease.due == due for lease in suspects) >= requested
        suspects = [lease for lease in suspects if not self._park_poisoned(lease)]
        if self._group:  # the rest of the group
            self._add_members(suspects, due)
            self._unwanted += others
            return []
        if suspects:
            self._receive_group(suspects, is_empty=is_empty and not others)
        return others

    def _park_poisoned(self, lease: TaskLease) -> bool:
        """Park a task that was lost alone too often. Return whether it was."""
        if lease.claims <= MAX_CLAIMS:
            return False
        self._dispatch.park_unstarted(lease, f"was running when its worker was lost {lease.claims - 1} times")
        return True

    def _receive_group(self, suspects: list[TaskLease], *, is_empty: bool) -> None:
        """Enter quarantine with the first group, or leave all to another worker.

        The record of a group that was put off does not count for another one. It stays when a claim brings no suspects:
        such a claim may be from another lane, or from behind the group in its own."""
        now, due = time.monotonic(), suspects[0].due
        if is_empty or self._put_off == due:
            self._enter_exclusive(now)
            self._add_members(suspects, due)
        else:
            self._unwanted += suspects
            self._put_off = due
            self._backoff.reset()
            self._not_before = now + INITIAL_PAUSE

    def _add_members(self, suspects: list[TaskLease], due: float) -> None:
        for lease in suspects:
            fits = lease.due == due and len(self._group) < self._max_group
            (self._group if fits else self._unwanted).append(lease)

    def take_unwanted(self) -> list[TaskLease]:
        """Return the leases to be released at once; none is held afterwards."""
        unwanted, self._unwanted = self._unwanted, []
        return [lease for lease in unwanted if lease.is_open]

    def take_unstarted(self) -> list[TaskLease]:
        """Return all leases that have not started; none is held afterwards."""
        if self._started_at is None:
            self._unwanted += self._group
            if self._group:
                self._leave_exclusive(time.monotonic())
            self.is_filling = False
        return self.take_unwanted()

    def advance(self, *, is_empty: bool, is_idle: bool) -> None:
        """Take the next step after a claim: start the group, end it, or put it off. `is_empty`: no step executes here,
        none waits for its turn, and no outcome is unwritten but those that wait for a locked row; `is_idle`: the claim
        brought nothing either."""
        now = time.monotonic()
        if self._started_at is not None:
            self._end_if_over(now)
        elif self._group:
            self._start_if_empty(now, is_empty)
        elif is_idle:
            self._not_before = now
        if self._started_at is None:
            self._release_marks()

    def _start_if_empty(self, now: float, is_empty: bool) -> None:
        self._group = [lease for lease in self._group if lease.is_open]
        if not self._group:
            self._leave_exclusive(now)
        elif is_empty and (len(self._group) >= self._max_group or (self.is_filling and not self._has_more)):
            self._start_group(now)
        elif is_empty or now < self._entered_at + MAX_HOLD:
            self.is_filling = is_empty  # the claim that brought the first members may have had no room for more
            self._has_more = False
        else:
            self._put_off_group(now)

    def _put_off_group(self, now: float) -> None:
        waited = round(now - self._entered_at, 3)
        pause = self._backoff.next()
        log.info("suspects.put_off", tasks=len(self._group), waited=waited, again_in=pause)
        self._put_off = self._group[0].due
        self._unwanted += self._group
        self._leave_exclusive(now)
        self._not_before = now + max(pause, waited)

    def _start_group(self, now: float) -> None:
        self.is_filling = self._has_more = False
        self._put_off = None
        self._backoff.reset()
        self._started_at = now
        log.debug("suspects.run", tasks=len(self._group), first=self._group[0].id)
        self._marked += self._group
        self._dispatch.admit(self._group)

    def _end_if_over(self, now: float) -> None:
        """Leave quarantine when the outcomes of all members are written and their code has ended, or when the group has
        been alone for long enough."""
        if any(lease.is_open and lease.claims > 1 for lease in self._group):
            self._over_since = None
        elif self._over_since is None:
            self._over_since = now
        has_ended = self._over_since is not None and not self._dispatch.suspended
        is_over = has_ended or now >= self._company_at()
        if is_over and (self._over_since is None or not len(self._dispatch.outcomes)):
            self._leave_exclusive(now)

    def _company_at(self) -> float:
        """Return the time from which others may start, though code of the group executes. Code without a lease may be
        a thread that a timeout has given up, which may never end."""
        assert self._started_at is not None
        if self._over_since is not None:
            return self._over_since + ISOLATION_TIME
        is_first = all(lease.claims < MAX_CLAIMS for lease in self._group)
        return self._started_at + ISOLATION_TIME if is_first else float("inf")

    def _enter_exclusive(self, now: float) -> None:
        self._entered_at = now
        self._dispatch.quarantined = True

    def _leave_exclusive(self, now: float) -> None:
        self._group = []
        self._started_at = self._over_since = None
        self.is_filling = self._has_more = False
        self._not_before = now + (now - self._entered_at)
        self._dispatch.quarantined = False

    def _release_marks(self) -> None:
        """Release the marks of members whose code has ended, and whose outcome is in the database or dropped."""
        marked, self._marked = self._marked, []
        for lease in marked:
            is_held = self._dispatch.leases.get(lease.id) is lease
            if lease.is_executing or (is_held and (lease.claims > 1 or not lease.is_open)):
                self._marked.append(lease)
            else:
                self._dispatch.marks.release(lease)

    def seconds_to_wait(self) -> float:
        """Return the seconds until `advance` has something to do, unless a step ends before."""
        if self._unwanted or self.is_filling:
            return 0.0
        if not self._group:
            return float("inf")
        until = self._entered_at + MAX_HOLD if self._started_at is None else self._company_at()
        return until - time.monotonic()
