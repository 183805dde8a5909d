"""lanes: find the lanes that have due tasks, in a time that does not grow with dead index entries.

A poll reads the whole index of waiting tasks, one probe per lane. While some transaction of the server keeps the
entries of finished tasks, each probe reads those first. Where that has become slow, this stage remembers the lanes,
each with a *floor*: no task of the lane waited before it, as of the last poll. Then a poll reads

- the known lanes, each from its floor;
- lanes that it does not know, but only tasks that fell due since the last poll;
- a portion of a sweep (sweep.py), for tasks behind the floors: those that were released, enqueued with an old time, or
  committed long after they were written.

The floors are those of the polls, and claims do not raise them: a task whose row was locked when a claim passed it, or
that was committed after that, lies above them. Only a task that holds up its floor from one poll to the next, while
claims have come further, is left behind: claims go on where they were, and others try that task.

Invariant: a task behind the floors is found within the time of one sweep, except in a span that the sweep passes over,
since the server cancels even the shortest portion of it.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec

from pgtask._log import EventLog
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.store import Link
from pgtask._postgres.writer import MAX_TIME
from pgtask._worker.sweep import PORTION_TIME, SHARE, SLOW_HINT, Sweep, read_bounded

__all__ = ["FLOOR_SLACK", "DueLane", "Lanes"]

log = EventLog("pgtask.claim")

FLOOR_SLACK = 1e-4  # seconds; times arrive as floats, which are ten times more exact than that for some centuries
SLOW = 0.05  # seconds of a poll that reads all, twice in a row, from which on floors pay,
LANE_TIME = 1e-4  # beside so many for the probes of each lane
MAX_KNOWN = 1000  # lanes that are remembered beside those that hold tasks
MIN_RECENT = 1.0  # seconds before the last poll that a poll reads again, for tasks that were committed late,
MAX_RECENT = 3600.0  # and at most so many after a notification, which may be about a task that was released
UNKNOWN_AGE = 60.0  # seconds that stand for the time since the last poll if the server has cancelled it
_FIRST = float("-inf")
_LAST = float("inf")


class DueLane(NamedTuple):
    """A lane with its first task, in a span of time: claims begin at `floor` and end at `until`. All times but `wait`
    are seconds since the epoch by the clock of the database; `wait` is the seconds until that task falls due."""

    queue: str
    priority: int
    wait: float
    floor: float
    until: float = _LAST


class _Known(msgspec.Struct):
    """A lane that holds tasks, or has held some. `first`: the time of the first, infinity if there was none. `passed`:
    the time up to which claims have come since `first` has not changed."""

    first: float
    passed: float = _FIRST

    @property
    def floor(self) -> float:
        return max(self.first, self.passed) - FLOOR_SLACK


class _Span(msgspec.Struct):
    """A span of time behind the floor of a lane, whose first task a poll has found at `found_at` (monotonic seconds).
    `floor`: where claims have come since."""

    first: float
    floor: float
    until: float
    found_at: float

    @property
    def is_single(self) -> bool:
        """Return whether it is about one task, which was locked."""
        return self.until - self.first < 2 * FLOOR_SLACK


class Lanes:
    """Finds the lanes of some queues (all, if there are none) over `link`."""

    def __init__(self, link: Link, queues: list[str]) -> None:
        self._link = link
        self._queues = queues or None
        self._known: dict[tuple[str, int], _Known] = {}
        self._behind: dict[tuple[str, int], list[_Span]] = {}
        self._sweep: Sweep | None = None  # while it uses the floors
        self._recent = MIN_RECENT
        self._polled_at = self._walked_at = self._walk_at = 0.0
        self._walks_took = 0.0, 0.0
        self._last_took = 0.0
        self.read: tuple[float, Any] | None = None
        """The last answer of the database, its first row, and when it came (monotonic seconds)."""
        self.took = 0.0
        """The seconds that the next poll may take, as the last one of its kind has, by the clock of the database."""

    @property
    def again_at(self) -> float:
        """The time at which to poll again for tasks behind the floors (monotonic seconds)."""
        return _LAST if self._sweep is None else max(self._sweep.due_at, self._polled_at + SHARE * self.took)

    async def poll(self, *, is_hinted: bool, is_complete: bool) -> list[DueLane]:
        """Return the lanes that hold waiting tasks, and the first of these. With `is_complete`, none of them is missed,
        however long that takes."""
        if self._sweep is None and (found := await self._poll_all()) is not None:
            return found
        self._sweep = self._sweep or Sweep()
        found = await self._poll_from_floors(is_hinted=is_hinted)
        if is_complete:
            found += await self._poll_behind(Sweep(), float("inf"))
        elif self._sweep.is_due:
            found += await self._poll_behind(self._sweep, PORTION_TIME)
        found += [DueLane(*lane, 0.0, span.floor, span.until) for lane, spans in self._behind.items() for span in spans]
        if len(self._known) > MAX_KNOWN:
            self._known = {lane: known for lane, known in self._known.items() if known.first < _LAST}
        return found

    def record_claim(self, lane: tuple[str, int], until: float, passed: float | None, *, is_drained: bool) -> None:
        """Note that a claim up to `until` has come to the time `passed`, and whether it has found nothing more. In a
        lane with foreign tasks it does not know that: `record_search` does."""
        if until == _LAST:
            if passed is not None and (known := self._known.get(lane)) is not None:
                known.passed = max(known.passed, passed)
        elif (span := self._span(lane, until)) is not None:
            if is_drained and (passed is not None or not span.is_single):
                self._behind[lane].remove(span)
            elif passed is not None:
                span.floor = passed - FLOOR_SLACK

    def record_search(self, one: DueLane, first: float | None) -> None:
        """Note that all tasks of a span before the time `first` are foreign; all, if it is None."""
        if (span := self._span((one.queue, one.priority), one.until)) is None:
            return
        if first is None:
            self._behind[one.queue, one.priority].remove(span)
        else:
            span.floor = first - FLOOR_SLACK

    # --- the three kinds of polls

    async def _poll_all(self) -> list[DueLane] | None:
        """Read the whole index. Return None if that takes too long."""
        sent = time.monotonic()
        rows = await self._read(lane_parameters(self._queues))
        self._polled_at = self._walked_at = sent
        if rows is None:
            log.warning("poll.slow", hint=SLOW_HINT)
            self._polled_at = self._walked_at = sent - UNKNOWN_AGE
            return None
        self.took = rows[0][4]
        rows = [row for row in rows if row[0] is not None]
        firsts = {(queue, priority): first for queue, priority, _, first, *_ in rows}
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        for lane in self._known.keys() - firsts.keys():
            self._known[lane] = _Known(_LAST)
        self._known |= {lane: _Known(first) for lane, first in firsts.items()}
        is_slow = min(self.took, self._last_took) > SLOW + LANE_TIME * len(rows)
        self._last_took = self.took
        if is_slow:  # for the last time
            self._sweep, self.took = Sweep(), 0.0
        return [DueLane(queue, priority, wait, first - FLOOR_SLACK) for queue, priority, wait, first, *_ in rows]

    async def _poll_from_floors(self, *, is_hinted: bool) -> list[DueLane]:
        """Read the known lanes from their floors, and what is new in other lanes."""
        sent = time.monotonic()
        recent = self._recent if is_hinted else MIN_RECENT
        walks = sent >= self._walk_at
        rows = await self._read(
            lane_parameters(
                self._queues if walks else [],
                oldest=sent - self._walked_at + recent,
                known=[(*lane, known.first - FLOOR_SLACK) for lane, known in self._known.items()],
                age=sent - self._polled_at + recent,
            )
        )
        if rows is None:
            self._walk_at = time.monotonic() + SHARE * MAX_TIME
            return self._pass_floors()
        self.took = took = rows[0][4]
        self._polled_at = sent
        if walks:
            self._walked_at = sent
            self._walks_took = self._walks_took[1], took
            self._walk_at = sent + (SHARE * took if min(self._walks_took) > SLOW else 0.0)
        if is_hinted:
            self._recent = max(recent / 2, MIN_RECENT) if took > PORTION_TIME / 4 else min(2 * recent, MAX_RECENT)
        found = self._learn_firsts([row for row in rows if row[5]])
        return found + self._learn_others([row for row in rows if row[5] is False], _FIRST)

    async def _poll_behind(self, sweep: Sweep, seconds: float) -> list[DueLane]:
        """Read portions of all lanes until they have taken so many seconds, or the sweep is complete. Return new lanes.
        Give the floors up where reading all has become fast."""
        found: list[DueLane] = []
        spent, is_swept, began_at = 0.0, False, sweep.began_at
        while spent < seconds and not is_swept:
            portion = sweep.next_portion()
            rows = await self._read(lane_parameters(self._queues, oldest=portion.oldest, youngest=portion.youngest))
            if rows is None:
                is_swept = sweep.divide(portion)
                spent += MAX_TIME
                continue
            spent += (took := rows[0][4])
            is_swept = sweep.record(portion, took, overhead=min(self._walks_took))
            found += self._learn_others(rows, portion.youngest)
        sweep.rest(spent)
        if is_swept:  # it has found again what is still there
            for lane, spans in list(self._behind.items()):
                self._behind[lane] = [span for span in spans if span.found_at >= began_at]
                if not self._behind[lane]:
                    del self._behind[lane]
        if is_swept and sweep.took < SLOW:
            self._sweep, self._last_took = None, 0.0
        return found

    async def _read(self, parameters: tuple[Any, ...]) -> list[Any] | None:
        rows = await read_bounded(self._link, "lanes", *parameters)
        if rows is not None:
            self.read = time.monotonic(), rows[0]
        return rows

    # --- what they teach

    def _learn_firsts(self, rows: list[Any]) -> list[DueLane]:
        """Learn the first task of each known lane, by a poll that has searched for all of them."""
        found = []
        missing = set(self._known)
        for queue, priority, wait, first, *_ in rows:
            lane = queue, priority
            missing.discard(lane)
            known = self._known[lane]
            if first == known.first and known.passed > first + FLOOR_SLACK:  # claims have come further: it is locked
                self._add_span(lane, first, first + FLOOR_SLACK)
                first = known.passed
            self._known[lane] = _Known(first)
            found.append(DueLane(*lane, wait, first - FLOOR_SLACK))
        for lane in missing:
            self._known[lane] = _Known(_LAST)
        return found

    def _learn_others(self, rows: list[Any], youngest: float) -> list[DueLane]:
        """Learn of lanes that were not known, and of tasks behind the floors of the others: those that fell due
        `youngest` seconds before the poll, or earlier."""
        found = []
        for queue, priority, wait, first, *_ in rows:
            if queue is None:
                continue
            lane = queue, priority
            known = self._known.setdefault(lane, _Known(_LAST))
            if first >= known.floor:
                continue
            until = first if first == _FIRST else min(first - wait - youngest, known.floor)
            if until == _LAST:
                known.first = first
                found.append(DueLane(*lane, wait, known.floor))
            else:
                self._add_span(lane, first, until)
        return found

    def _span(self, lane: tuple[str, int], until: float) -> _Span | None:
        return next((span for span in self._behind.get(lane, ()) if span.until == until), None)

    def _add_span(self, lane: tuple[str, int], first: float, until: float) -> None:
        """Remember a span beside the others of its lane, whose first tasks may be locked. It continues the one that an
        earlier poll has found for the same task."""
        new = _Span(first, first - FLOOR_SLACK, until, time.monotonic())
        spans = self._behind.setdefault(lane, [])
        for span in list(spans):
            if span.first == first and span.is_single == new.is_single:
                new.floor, new.until = span.floor, max(span.until, until)
                spans.remove(span)
            elif span.until == until:
                new.floor = min(span.floor, new.floor)
                spans.remove(span)
        spans.append(new)

    def _pass_floors(self) -> list[DueLane]:
        """Return the lanes that held tasks at the last poll: they may still be due. From now on, read them from where
        the claims have come, or from now: one of the floors has so many dead entries behind it that no poll can."""
        found = [DueLane(*lane, 0.0, known.floor) for lane, known in self._known.items() if known.first < _LAST]
        self._known = {
            lane: _Known(known.passed if known.passed > _FIRST else _LAST) for lane, known in self._known.items()
        }
        return found
