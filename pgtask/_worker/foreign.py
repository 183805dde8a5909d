"""foreign: tasks of other apps in the same table, and of paused tasks, steps and keys, which this worker skips.

Theory of operation. A worker claims any task that is due in its queues. When it meets a task whose family (the outer
name of the envelope) its app does not have, it releases that task at once, as if never claimed. From then on it claims
from that *lane* (a queue and a priority) by a statement that skips foreign families. Before, this costs nothing.

Tasks of a paused task, step or key count as foreign: while there is such a pause, in all lanes.

Another app may have a million tasks there. So each search finds the first task of our own, and remembers the time
before which all tasks were foreign: the next search begins there. A task that is released with an old time lies before
that. So a search begins at the first task of the lane again, but only for a share of the time, which matters where the
foreign tasks are very many.

Invariant: a task that is not known to be foreign is claimed; a row that is no envelope belongs to no other app.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple
from uuid import UUID

from pgtask._postgres.store import Link
from pgtask._postgres.writer import MAX_TIME
from pgtask._worker.sweep import read_bounded

__all__ = ["READ_LIMIT", "Foreign", "paused_pattern", "pattern_of"]

SPACE = r"[ \t\n\r]*"
MAX_TOKENS = 1000  # claims whose lane is remembered
READ_LIMIT = 20_000  # tasks that one statement reads
MAX_READ_LIMIT = 2_000_000  # the same, where all of them have the same time
TIME_RESOLUTION = 1e-6  # seconds: no two times differ by less
SEARCH_SHARE = 20  # searches from the first task on are this many times their own duration apart, at most
MAX_SEARCH_INTERVAL = 600.0  # seconds
MAX_SEARCH_TIME = 0.1  # seconds of reading after which a search continues at the next poll


def pattern_of(families: Iterable[str]) -> str:
    """Return a regular expression of Postgres that matches the beginning of an envelope of any other family."""
    ours = "|".join(sorted(map(_json_pattern, families)))
    return rf'^{SPACE}\{{{SPACE}"(?!(?:{ours})")(?:[^"\\]|\\.)*"{SPACE}:{SPACE}\{{'


def paused_pattern(tasks: Iterable[str], steps: Iterable[str], keys: Iterable[str] = ()) -> str | None:
    """Return a regular expression of Postgres that matches the beginning of an envelope of one of these tasks, or of
    one of these steps (`Task.Step`), or one of these keys (`Task/key`) behind it, as shared/envelope.sql has it; None
    if there are none."""
    begins = [_begin(task) for task in sorted(tasks)]
    begins += [_begin(task) + _begin(name) for task, _, name in (step.partition(".") for step in sorted(steps))]
    patterns = [f"^(?:{'|'.join(begins)})"] if begins else []
    if names := [re.sub(r"([^\w])", r"\\\1", key, flags=re.ASCII) for key in sorted(keys)]:
        patterns.append(rf"\x01(?:{'|'.join(names)})$")
    return "|".join(patterns) or None


def _begin(name: str) -> str:
    return rf'{SPACE}\{{{SPACE}"{_json_pattern(name)}"{SPACE}:'


def _json_pattern(name: str) -> str:
    """Match a name as JSON may write it: each character as itself, or escaped."""
    return "".join(map(_character_pattern, name))


def _character_pattern(character: str) -> str:
    units = character.encode("utf-16-be").hex()
    escapes = "".join(rf"\\u{_any_case(units[at : at + 4])}" for at in range(0, len(units), 4))
    plain = re.sub(r"([^\w])", r"\\\1", character, flags=re.ASCII) if character.isascii() else character
    if character in '"\\':
        return rf"(?:\\{plain}|{escapes})"
    return rf"(?:{plain}|\\/|{escapes})" if character == "/" else f"(?:{plain}|{escapes})"


def _any_case(digits: str) -> str:
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in digits)


class FirstKnown(NamedTuple):
    """The result of a search of a lane: the seconds until our first task falls due, and its time (seconds since the
    epoch); both None if there is no such task. `again_at`: the time of the next search (monotonic seconds), since this
    one has not read the whole lane."""

    wait: float | None
    first: float | None
    again_at: float


class _LaneSearch:
    """The state of the searches of one lane."""

    def __init__(self) -> None:
        self.until: float | None = None  # all tasks before it are foreign; seconds since the epoch
        self.again_at = float("-inf")  # monotonic seconds: when to begin at the first task again
        self.at: float | None = None  # of a search that is not complete: the time at which it continues
        self.is_whole = False  # whether that search began at the first task
        self.took = 0.0  # seconds that it has taken so far
        self.limit = READ_LIMIT
        self.next_due = float("inf")  # monotonic seconds: when our first task falls due, as of the last whole search


class Foreign:
    """Knows the lanes in which this worker has met foreign tasks, those of no family of `families` (None: there are
    none)."""

    def __init__(self, link: Link, families: Iterable[str] | None) -> None:
        self._link = link
        self._of_others = None if families is None else pattern_of(families)
        self.pattern = self._of_others
        """A regular expression that matches the envelopes of foreign tasks; None if there are none."""
        self._is_everywhere = False
        self._met: set[tuple[str, int]] = set()  # lanes that held tasks of other apps
        self._lanes: dict[tuple[str, int], _LaneSearch] = {}
        self._claims: dict[UUID, tuple[str, int]] = {}  # by token: the lane of a claim

    def remember_claim(self, token: UUID, queue: str, priority: int) -> None:
        """Remember the lane of a claim, which may bring foreign tasks."""
        if len(self._claims) >= MAX_TOKENS:
            del self._claims[next(iter(self._claims))]
        self._claims[token] = queue, priority

    def mark_lane(self, token: UUID) -> None:
        """Mark the lane from which the claim of `token` has brought a foreign task."""
        if (lane := self._claims.get(token)) is not None:
            self._met.add(lane)
            self._lanes.setdefault(lane, _LaneSearch())

    def set_paused(self, tasks: Iterable[str], steps: Iterable[str], keys: Iterable[str] = ()) -> None:
        """Skip the tasks of these tasks, steps and keys as well, and no others that were paused. All searches begin
        anew."""
        paused = paused_pattern(tasks, steps, keys)
        patterns = [pattern for pattern in (self._of_others, paused) if pattern is not None]
        self.pattern = "|".join(patterns) or None
        self._is_everywhere = paused is not None
        self._lanes = {lane: _LaneSearch() for lane in self._met}

    def is_mixed(self, queue: str, priority: int) -> bool:
        """Return whether there may be foreign tasks in that lane, as far as this worker knows."""
        if self._is_everywhere:
            self._lanes.setdefault((queue, priority), _LaneSearch())
        return (queue, priority) in self._lanes

    async def find_known(
        self, queue: str, priority: int, floor: float, now: float, *, is_complete: bool
    ) -> tuple[FirstKnown, float]:
        """Find our first task in such a lane, where no task waits before the `floor`; for a short time, unless
        `is_complete`. Return it, and the seconds that the database took. `now` is the time; both are seconds since the
        epoch, by the clock of the database."""
        search = self._lanes[queue, priority]
        if search.at is None or (is_complete and not search.is_whole):
            search.is_whole = is_complete or time.monotonic() >= search.again_at
            search.at = floor if search.is_whole or search.until is None else search.until
            search.took = 0.0
        took = 0.0
        while is_complete or took <= MAX_SEARCH_TIME:
            rows = await read_bounded(
                *(self._link, "first_known", queue, priority),
                *(search.at, search.limit, self.pattern, search.is_whole, float("inf")),
            )
            if rows is None:  # between our tasks and the first one lie too many dead entries
                search.until, search.at, search.limit = now, None, READ_LIMIT
                search.again_at = time.monotonic() + SEARCH_SHARE * MAX_TIME
                return FirstKnown(None, None, search.again_at), took
            ((wait, first, tasks, last, now, seconds),) = rows
            took += seconds
            search.took += seconds
            if first is not None or tasks < search.limit:
                again_at = float("inf") if search.is_whole or first is not None else search.again_at
                self._end_search(search, wait, now if first is None else min(first - TIME_RESOLUTION, now))
                return FirstKnown(*_known_before(search, wait, first, now), again_at), took
            if last - TIME_RESOLUTION > search.at:
                search.at = last - TIME_RESOLUTION
            elif search.limit < MAX_READ_LIMIT:
                search.limit *= 4  # all of one time
            elif last < now:
                search.at = last + TIME_RESOLUTION
            else:
                self._end_search(search, None, now)
                break
        return FirstKnown(None, None, float("inf") if search.at is None else 0.0), took

    async def find_between(
        self, queue: str, priority: int, floor: float, until: float, *, is_complete: bool
    ) -> tuple[float | None, float]:
        """Search such a lane between two times for due tasks of ours, for a short time unless `is_complete`. Return the
        time before which there are none, or None if there are none at all; and the seconds that the database took."""
        took, limit = 0.0, READ_LIMIT
        while is_complete or took <= MAX_SEARCH_TIME or limit > READ_LIMIT:
            parameters = queue, priority, floor, limit, self.pattern, False, until
            if (rows := await read_bounded(self._link, "first_known", *parameters)) is None:
                return None, took + MAX_TIME  # the next sweep tries again
            ((_, first, tasks, last, _, seconds),) = rows
            took += seconds
            if first is not None or tasks < limit:
                return first, took
            if last - TIME_RESOLUTION > floor:
                floor = last - TIME_RESOLUTION
            elif limit < MAX_READ_LIMIT:
                limit *= 4  # all of one time
            elif last >= until:
                return None, took
            else:
                floor, limit = last + TIME_RESOLUTION, READ_LIMIT
        return floor, took

    def _end_search(self, search: _LaneSearch, wait: float | None, until: float) -> None:
        """Note the result of a complete search."""
        now = time.monotonic()
        search.until, search.at, search.limit = until, None, READ_LIMIT
        if search.is_whole:
            search.again_at = now + min(SEARCH_SHARE * search.took, MAX_SEARCH_INTERVAL)
            search.next_due = float("inf") if wait is None else now + wait


def _known_before(
    search: _LaneSearch, wait: float | None, first: float | None, now: float
) -> tuple[float | None, float | None]:
    """Return the task that was found, or a later one that an earlier search has found."""
    known = search.next_due - time.monotonic()
    if known <= 0:  # it is due, so this search has found it if it still exists
        known = search.next_due = float("inf")
    if wait is None and known < float("inf"):
        return known, now + known
    return wait, first
