"""sweep: read an index that is full of dead entries to its beginning, in portions that are short.

Theory of operation. The index entries of finished tasks stay for as long as any transaction of the server might see
them, and a scan reads them again each time. So a worker that has read all entries of an index remembers a *floor*, and
reads from there on. Something may appear behind the floor: a task that is released keeps its old time, and a lease
whose row was locked is still there. A *sweep* finds that. It goes from now into the past in *portions*: spans of time,
each of which reads for some milliseconds. The spans grow while they hold few entries.

Invariants: the portions of a sweep leave no gap, whatever the time between them; those of one index take a twentieth of
the time of their worker; a portion that the server cancels is divided, and never sent again as it was. One of the
shortest span cannot be divided: its sweep passes over it and does not read what it holds; the next sweep tries again.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from pgtask._postgres.store import Link
from pgtask._postgres.writer import MAX_TIME
from pgtask.errors import StatementTimeout

__all__ = ["PORTION_TIME", "SHARE", "SLOW_HINT", "Portion", "Sweep", "read_bounded"]

SHARE = 20  # portions are this many times their own duration apart, at least
PORTION_TIME = 0.02  # seconds that one portion should take at most, or some that are read together
MIN_REST = 0.1  # seconds between portions, or some that take so little time that they are read together
MIN_SPAN = 1.0  # seconds; the span of the first portion, and of the shortest
GROWTH = 4  # of the span, from one short portion to the next
MAX_AGE = 10 * 365 * 86400.0  # seconds; what is older is read in one portion
SLOW_HINT = "it took too long and was cancelled; perhaps an open transaction keeps dead entries: see pgtask stats"


class Portion(NamedTuple):
    """A span of time: from `oldest` seconds before the time of the server until `youngest` seconds before it."""

    oldest: float
    youngest: float


class Sweep:
    """The state of the sweeps of one index."""

    def __init__(self) -> None:
        self.due_at = float("-inf")
        """The time of the next portion (monotonic seconds)."""
        self.took = float("inf")
        """The seconds that the last complete sweep has taken."""
        self._begin()

    def _begin(self) -> None:
        self.began_at = time.monotonic()
        self._oldest = 0.0  # how far this sweep had come,
        self._read_at = float("inf")  # and when; infinity before the first portion
        self._span = MIN_SPAN
        self._sum = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self.due_at

    def rest(self, spent: float) -> None:
        """Put the next portion off, since this worker has just spent so many seconds on some."""
        self.due_at = time.monotonic() + max(MIN_REST, SHARE * spent)

    def next_portion(self) -> Portion:
        """Return the portion to read now: it begins where the last one has ended, which has aged since."""
        youngest = self._oldest + max(0.0, time.monotonic() - self._read_at)
        oldest = youngest + self._span
        return Portion(oldest if oldest < MAX_AGE else float("inf"), youngest)

    def record(self, portion: Portion, took: float, *, overhead: float = 0.0) -> bool:
        """Note that a portion was read in `took` seconds, `overhead` of which it would have taken for any span. Return
        true if it was the last one of its sweep."""
        self._read_at, self._oldest = time.monotonic(), portion.oldest
        self._sum += took
        read = took - overhead
        if read > PORTION_TIME:
            self._span = max(self._span / 2, MIN_SPAN)
        elif read < PORTION_TIME / GROWTH:
            self._span *= GROWTH
        if portion.oldest < float("inf"):
            return False
        self.took = self._sum
        self._begin()
        return True

    def divide(self, portion: Portion) -> bool:
        """Note that the server has cancelled a portion. If it cannot be any shorter, pass it over. Return true if that
        was the last one."""
        if self._span > MIN_SPAN:
            self._span = max(min(self._span, MAX_AGE) / GROWTH**2, MIN_SPAN)
            return False
        return self.record(portion, MAX_TIME)


async def read_bounded(link: Link, name: str, *parameters: Any) -> list[Any] | None:
    """Run a statement that changes nothing, waiting for as long as the database is unavailable. Return None if it takes
    too long: to send it again would not help."""
    try:
        return await link.run(name, *parameters, raises=(StatementTimeout,))
    except StatementTimeout:
        return None
