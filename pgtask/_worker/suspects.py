"""suspects: tasks whose last claim ended without an outcome, because a worker died or lost its lease, run alone.

Theory of operation. `claims` of a row counts the claims of its step that ended without an outcome, and the one that is
made now. A task with more than one may have killed its process, or only been beside the one that did. So it is run
with nothing beside it in its process: the next death convicts exactly one. Any outcome clears the count.

To be alone, a worker starts nothing else (it is *hushed*) and waits for what runs to end. The price is bounded:

- A hush takes at most as long as the normal work that follows it, so half of the time is for the others. Short suspects
  are tried one after the other within one hush.
- What runs may be long: if it does not end within a patience, which doubles each time, the suspects are put back for
  other workers.
- A suspect of one crash that is still alive after `SOLITUDE` gets company again; another suspect is not started beside
  it, since that one would not be alone. Who dies in company is charged, but never convicted (handover.sql). One of two
  crashes stays alone to its end: there are few of them, since a crash among those who are tried alone makes one.
- A worker holds few suspects, and one of two crashes at most, since all that it holds is charged if its host dies. The
  rest goes back for a short time, drawn at random, so that they do not meet again.

Invariants: what a suspect does is flushed before the next one starts; nothing is convicted but by a death alone, or by
three claims lost to hosts, of which two were alone.
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
MOST_HELD = 10
SESSION = 1.0  # seconds of one hush in which another suspect may be started
SOLITUDE = 5.0
PATIENCE, LONGEST_PATIENCE = 1.0, 60.0
PUT_OFF = (1.0, 5.0)  # seconds


class Suspects:
    """Holds the suspects of one worker, and decides when one of them has the process to itself."""

    def __init__(self, dispatch: Dispatch, concurrency: int) -> None:
        self._dispatch = dispatch
        self._concurrency = concurrency
        self._held: deque[Lease] = deque()
        self._trial: Lease | None = None
        self._hushed_since: float | None = None
        self._in_company_at = 0.0
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
        trial = [self._trial] if self._trial is not None and self._trial.is_open else []
        return any(lease.claims == MOST_CLAIMS for lease in [*self._held, *trial])

    def take(self) -> list[Lease]:
        """Those that have not been started; none is held afterwards."""
        held = [lease for lease in self._held if lease.is_open]
        self._held.clear()
        return held

    def turn(self, *, is_quiet: bool) -> None:
        """See what there is to do; `is_quiet` when no step is executing here and every outcome is in the database."""
        now = time.monotonic()
        if self._trial is not None:
            goes_on = self._trial.is_open and self._trial.claims > 1  # 1: it has gone on to another step
            if goes_on and now < self._in_company_at:
                return
            self._trial = None
            if goes_on or self._hushed_since is None or now >= self._hushed_since + SESSION:
                self._end_hush(now)
        while self._held and not self._held[0].is_open:
            self._held.popleft()
        if not self._held:
            self._end_hush(now)
        elif self._hushed_since is not None or now >= self._not_before:
            self._try_next(now, is_quiet)

    def _try_next(self, now: float, is_quiet: bool) -> None:
        if self._hushed_since is None:
            self._hushed_since = now
        if is_quiet:
            self._patience = PATIENCE
            self._start(self._held.popleft(), now)
        elif now >= self._hushed_since + self._patience:
            log_event(log, logging.INFO, "suspects.put_off", tasks=len(self._held), waited=self._patience)
            self._patience = min(2 * self._patience, LONGEST_PATIENCE)
            for lease in self.take():
                self._put_off(lease)
            self._end_hush(now)
        else:
            self._dispatch.limit_to(0)

    def _start(self, lease: Lease, now: float) -> None:
        log_event(log, logging.DEBUG, "suspect.runs_alone", task=lease.id, crashes=lease.claims - 1)
        self._trial = lease
        self._in_company_at = now + SOLITUDE if lease.claims < MOST_CLAIMS else float("inf")
        self._dispatch.start_first(lease)
        self._dispatch.limit_to(1)

    def _end_hush(self, now: float) -> None:
        if self._hushed_since is not None:
            self._not_before = now + (now - self._hushed_since)
            self._hushed_since = None
            self._dispatch.limit_to(self._concurrency)

    def _put_off(self, lease: Lease) -> None:
        self._dispatch.put_off(lease, random.uniform(*PUT_OFF))

    def wait(self) -> float:
        """Seconds until `turn` has something to do, unless a step ends before."""
        now = time.monotonic()
        if self._trial is not None:
            return self._in_company_at - now
        if not self._held:
            return float("inf")
        if self._hushed_since is not None:
            return self._hushed_since + self._patience - now
        return self._not_before - now
