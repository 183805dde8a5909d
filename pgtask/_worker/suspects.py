"""suspects: tasks whose last claim ended without an outcome, because a worker died or lost its lease, run alone.

Theory of operation. `claims` of a row counts the claims of its step that ended without an outcome, and the one that is
made now. A task with more than one may have killed its process, or only been beside the one that did. So it is run
with nothing beside it in its process: the next death convicts exactly one. Any outcome clears the count.

To be alone, a worker starts nothing else (it is *hushed*) and waits for what runs to end. The price is bounded:

- A hush takes at most as long as the normal work that follows it, so half of the time is for the others, if there are
  any. Suspects of one crash are tried one after the other within one hush, without a write in between: one that has
  ended stays marked until it is written, since a callback that it left behind may be what kills the process under the
  next. Behind a long one the rest is put back for other workers.
- What runs may be long: if it does not end within a patience, which doubles each time, the suspects are put back for
  other workers.
- A suspect of one crash that is still alive after `SOLITUDE` gets company again; another suspect is not started beside
  it, since that one would not be alone. Who dies in company is charged, but never convicted (handover.sql). One of two
  crashes is alone from before its first line until its outcome is written: for it, the next death is the verdict.
- A worker holds as many suspects as one crash makes, but one of two crashes at most, since all that it holds is charged
  if its host dies. The rest goes back for a short time, drawn at random, so that they do not meet again.

Invariants: what was executing before the first suspect of a hush, or before one of two crashes, has ended and is
flushed; while one executes, nothing else does, and nothing but another suspect begins before its outcome is written;
nothing is convicted but by a death alone, or by three claims lost to hosts, of which two were alone.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque

from pgtask._events import log_event
from pgtask._fastpath import Lease
from pgtask._worker.dispatch import Dispatch

__all__ = ["Suspects"]

log = logging.getLogger("pgtask.suspects")

MOST_CLAIMS = 3  # the claim after these parks the task unseen
MOST_HELD = 100
SESSION = 1.0  # seconds of one hush in which another suspect may be started
SOLITUDE = 5.0
PATIENCE, LONGEST_PATIENCE = 1.0, 60.0
PUT_OFF = (1.0, 5.0)  # seconds


class Suspects:
    """Holds the suspects of one worker, and decides when one of them has the process to itself."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._held: deque[Lease] = deque()
        self._trials: deque[Lease] = deque()  # started; the first of them is executing, or about to
        self._hushed_since: float | None = None
        self._tried_some = False  # in this hush
        self._alone_since = 0.0
        self._patience = PATIENCE
        self._not_before = 0.0

    def __len__(self) -> int:
        """How many leases it holds that have not been started."""
        return len(self._held)

    @property
    def is_hushed(self) -> bool:
        return self._hushed_since is not None

    def receive(self, suspects: list[Lease]) -> None:
        """Hold newly claimed suspects, as far as there is room."""
        for lease in suspects:
            if lease.claims > MOST_CLAIMS:
                self._dispatch.convict(lease, f"was running when its worker was lost {lease.claims - 1} times")
            elif len(self._held) >= MOST_HELD or (lease.claims == MOST_CLAIMS and self._has_last_chance()):
                self._put_off(lease)
            else:
                self._held.append(lease)

    def _has_last_chance(self) -> bool:
        return any(lease.claims == MOST_CLAIMS and lease.is_open for lease in [*self._held, *self._trials])

    def take(self) -> list[Lease]:
        """Those that have not been started; none is held afterwards."""
        held = [lease for lease in self._held if lease.is_open]
        self._held.clear()
        return held

    def turn(self, *, is_quiet: bool, is_idle: bool = False) -> None:
        """See what there is to do; `is_quiet` when no step is executing here and every outcome is in the database,
        `is_idle` when there is also no other task to be had."""
        now = time.monotonic()
        self._dispatch.unmark_written()
        while self._trials and not (self._trials[0].is_open and self._trials[0].claims > 1):
            self._trials.popleft()  # it has ended, or gone on to another step
            self._alone_since = now
        if self._trials:
            self._go_on_with_trials(now)
            return
        while self._held and not self._held[0].is_open:
            self._held.popleft()
        if not self._held or (self._tried_some and self._is_session_over(now)):
            if len(self._dispatch.outcomes):
                return  # until they are written
            self._end_hush(now)
        if self._held and (self._hushed_since is not None or now >= self._not_before or is_idle):
            self._try_held(now, is_quiet)

    def _is_session_over(self, now: float) -> bool:
        return self._hushed_since is not None and now >= self._hushed_since + SESSION

    def _go_on_with_trials(self, now: float) -> None:
        in_company = now >= self._in_company_at()
        if in_company or self._is_session_over(now):
            while len(self._trials) > 1:
                self._put_off(self._trials.pop())
            for lease in self.take():
                self._put_off(lease)
        if in_company:
            self._put_off(self._trials.pop())  # unless it is executing
            self._end_hush(now)

    def _in_company_at(self) -> float:
        """When the first trial has been alone for long enough; or could not start, since a thread that was given up
        by its timeout still executes."""
        first = self._trials[0]
        if not first.is_running:
            return self._alone_since + PATIENCE
        return self._alone_since + SOLITUDE if first.claims < MOST_CLAIMS else float("inf")

    def _try_held(self, now: float, is_quiet: bool) -> None:
        if self._hushed_since is None:
            self._hushed_since = now
        if is_quiet:
            self._patience = PATIENCE
            self._start_held(now)
        elif now >= self._hushed_since + self._patience:
            log_event(log, logging.INFO, "suspects.put_off", tasks=len(self._held), waited=self._patience)
            self._patience = min(2 * self._patience, LONGEST_PATIENCE)
            for lease in self.take():
                self._put_off(lease)
            self._end_hush(now)
        else:
            self._dispatch.hush(0)

    def _start_held(self, now: float) -> None:
        """Before whatever else is ready. With one executing at most, each is alone in its turn; one that has its last
        chance is the only one."""
        while self._held and (not self._trials or self._held[0].claims < MOST_CLAIMS):
            self._trials.append(self._held.popleft())
            if self._trials[0].claims == MOST_CLAIMS:
                break
        self._alone_since = now
        self._tried_some = True
        for lease in reversed(self._trials):
            log_event(log, logging.DEBUG, "suspect.runs_alone", task=lease.id, crashes=lease.claims - 1)
            self._dispatch.start_first(lease)
        self._dispatch.hush(1)

    def _end_hush(self, now: float) -> None:
        if self._hushed_since is not None:
            self._not_before = now + (now - self._hushed_since)
            self._hushed_since = None
            self._tried_some = False
            self._dispatch.end_hush()

    def _put_off(self, lease: Lease) -> None:
        self._dispatch.put_off(lease, random.uniform(*PUT_OFF))

    def wait(self) -> float:
        """Seconds until `turn` has something to do, unless a step ends before."""
        now = time.monotonic()
        if self._trials:
            others = len(self._trials) > 1 or self._held
            put_off_at = (self._hushed_since or now) + SESSION if others else float("inf")
            return min(self._in_company_at(), put_off_at) - now
        if not self._held:
            return float("inf")
        if self._hushed_since is not None:
            return self._hushed_since + self._patience - now
        return self._not_before - now
