"""prefetch: how many tasks a worker claims: what it can start now, and a little ahead, so that it never waits for the
network.

Invariants: `concurrency` and a prefetch of `PREFETCH` seconds of work, two batches at most, bound the leases of a
worker; the tasks that it has not started take about `PREFETCH` seconds of the loop to start, more where the database is
slow to answer, or are one task.

The worker does not know beforehand how long starts take. So it begins with one task, and doubles what it claims each
time it has started all of it quickly; where it has not, it claims less at once. A few milliseconds lead from one to
five hundred. A step that computes is worth one: the next task goes to an idle worker. Steps that suspend at once hide
their cost: until some have ended, two claims are `PACE` seconds apart, and no larger while the loop is late.
"""

from __future__ import annotations

import time
from collections import deque

__all__ = ["PREFETCH", "Prefetch"]

PREFETCH = 0.05  # seconds of work that a worker claims ahead, at its recent rate
MAX_PREFETCH = 0.2  # seconds of work that it claims ahead where the database is slow to answer
STALE_AFTER = 1.0  # seconds without an outcome, or a start, after which the recent rates say nothing
PACE = 0.005


class Prefetch:
    """Measures the rate of outcomes, as a moving average over windows of a tenth of a second, and what starts take of
    the loop. The rate decays to nothing when outcomes stop, since steps that last have all slots."""

    def __init__(self, concurrency: int, batch: int) -> None:
        self._concurrency, self._batch = concurrency, batch
        self._per_second = 0.0
        self._since = time.monotonic()
        self._counted = 0
        self._window = 1  # tasks that may wait for their turn
        self._busy, self._started = 0.0, 0  # as of the last change of the window
        self._seen, self._seen_at = 0, float("-inf")  # the number of starts, and when it last changed
        self._ended = 0  # as of when it began with one
        self._is_proven = False  # whether some steps have ended since then
        self._not_before = self._paused_until = float("-inf")  # the time of the next claim
        self._trips = deque([0.0], 5)  # seconds that the last claims took

    def count_outcomes(self, outcomes: int) -> None:
        """Count outcomes that are about to be written."""
        self._counted += outcomes
        elapsed = time.monotonic() - self._since
        if elapsed >= 0.1:
            self._per_second += 0.5 * (self._counted / elapsed - self._per_second)
            self._since, self._counted = time.monotonic(), 0

    def update_window(self, *, busy: float, started: int, ended: int, late: float, is_stuck: bool) -> None:
        """Adapt to the totals of this worker since it began. Call it before `free_slots`.

        `busy`: seconds of the loop that its steps have taken; `started`, `ended`: steps; `late`: seconds by which the
        last timer was late; `is_stuck`: whether steps wait for a thread.
        """
        now = time.monotonic()
        if started != self._seen:
            self._seen, self._seen_at = started, now
        elif now > self._seen_at + STALE_AFTER:
            self._window, self._is_proven = 1, False
            self._busy, self._started, self._ended = busy, started, ended
        if not self._is_proven and ended > self._ended:
            self._is_proven, self._not_before = True, now
        fresh, took = started - self._started, busy - self._busy
        if fresh <= 0 and not is_stuck:
            return
        limit = self._concurrency + 2 * self._batch
        # A claim and a flush must end before all is started; the loop may have held up some of these, but not all.
        ahead = max(PREFETCH, min(3 * min(self._trips), MAX_PREFETCH))
        fits = 1 if is_stuck else limit if took <= 0 else max(1, min(int(ahead * fresh / took), limit))
        if fits < self._window or is_stuck:
            self._window = fits
        elif fresh < self._window:
            return  # not yet all of it
        elif self._is_proven or late <= PACE:
            self._window = min((2 if self._is_proven else 4) * self._window, fits)
        self._busy, self._started = busy, started + is_stuck  # the one that waits for a thread does not count

    def free_slots(self, held: int, ready: int, batch: int = 0) -> int:
        """Return how many tasks to claim with `held` leases, of which `ready` wait for their turn: the free capacity,
        or 0 while work remains and the free capacity is too small to be worth a claim. `batch`: the tasks that one free
        slot takes, where they run in batches."""
        if self.seconds_to_claim():
            return 0
        limit = self._concurrency + min(int(self._outcome_rate() * PREFETCH), 2 * self._batch)
        window = self._window
        if batch:
            limit, window = max(limit, held + batch), max(window, batch)
        free = min(limit - held, window - ready, self._batch)
        return 0 if ready and free < min(limit, window, self._batch) // 4 else free

    def record_claim(self, seconds: float) -> None:
        """Note a claim that has brought tasks, after so many seconds."""
        self._trips.append(seconds)
        if not self._is_proven:
            self._not_before = time.monotonic() + PACE

    def reset_rate(self) -> None:
        """Forget the recent rate: tasks that were claimed at this rate have waited for too long."""
        self._per_second, self._counted, self._since = 0.0, 0, time.monotonic()

    def pause_claims(self, seconds: float) -> None:
        """Claim nothing for so long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def seconds_to_claim(self) -> float:
        """Return the seconds until the next claim may be sent."""
        return max(0.0, max(self._not_before, self._paused_until) - time.monotonic())

    def _outcome_rate(self) -> float:
        """Outcomes per second."""
        elapsed = time.monotonic() - self._since
        return self._per_second if elapsed < STALE_AFTER else min(self._per_second, self._counted / elapsed)
