"""room: how many tasks a worker claims: what it can start, and a little ahead, so that it never waits for the network.

Invariant: what it holds is bounded by `concurrency` and a prefetch of `PREFETCH` seconds of work, two batches at most.
"""

from __future__ import annotations

import time

__all__ = ["Room"]

PREFETCH = 0.05  # seconds of work that are claimed ahead, at the rate of late
STALE_AFTER = 1.0  # seconds without an outcome after which the rate of before says nothing


class Room:
    """Counts outcomes, for their rate of late: a moving average over windows of a tenth of a second. Where they have
    stopped to come, since all slots are taken by steps that last, the rate goes down to nothing with the time."""

    def __init__(self, concurrency: int, batch: int) -> None:
        self._concurrency, self._batch = concurrency, batch
        self._per_second = 0.0
        self._since = time.monotonic()
        self._counted = 0

    def count(self, outcomes: int) -> None:
        self._counted += outcomes
        elapsed = time.monotonic() - self._since
        if elapsed >= 0.1:
            self._per_second += 0.5 * (self._counted / elapsed - self._per_second)
            self._since, self._counted = time.monotonic(), 0

    def left(self, held: int, ready: int) -> int:
        """How many to claim with `held` leases in hand of which `ready` wait for their turn: what there is room for,
        but not by driblets while there is work in hand."""
        most = self._concurrency + min(int(self._rate() * PREFETCH), 2 * self._batch)
        room = min(most - held, self._batch)
        return 0 if ready and room < min(most, self._batch) // 4 else room

    def _rate(self) -> float:
        """Outcomes per second."""
        elapsed = time.monotonic() - self._since
        return self._per_second if elapsed < STALE_AFTER else min(self._per_second, self._counted / elapsed)
