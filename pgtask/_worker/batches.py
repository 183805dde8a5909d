"""batches: gathers the steps that run in batches, and starts each batch when it is closed and a slot is free.

Invariants: a step is in one group or one closed batch at most, until its batch begins; a batch takes one slot, however
many steps it has; the steps of a batch have one class and one value of `by`; suspects run alone.

A group is closed when it is full, when its `linger` has passed since its first step came, or when this worker has
nothing else to do and ends. Without a linger it takes the steps that are ready now. Steps of a closed batch that waits
for a slot are ready like others: if that takes too long, the renewing thread releases them for idle workers.

In a turn (hold.py) a batch has held steps only. The turn waits for it while it does not suspend.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from pgtask._fastpath import StepEntry, TaskLease
from pgtask._worker.running_batch import RunningBatch
from pgtask.batch import MAX_SIZE
from pgtask.errors import OutcomeError

if TYPE_CHECKING:
    from pgtask._worker.dispatch import Dispatch

__all__ = ["Batches"]

MAX_GATHERED = 2 * MAX_SIZE  # steps in open groups: beyond it the largest group does not wait for more
MAX_FLOAT = sys.float_info.max


class _Kind:
    """One class of steps that run in batches."""

    def __init__(self, entry: StepEntry) -> None:
        assert entry.batch is not None
        batch = entry.batch
        self.entry = entry
        self.size = batch.size
        self.linger = batch.linger.total_seconds()
        self.value_of = _getter(batch.by)
        self.weight_of = _getter(batch.weight)
        self.max_weight = math.inf if batch.max_weight is None else batch.max_weight
        self.takes_any = self.value_of is None and self.weight_of is None

    def classify(self, step: Any) -> tuple[Any, float]:
        """Return the value by which a step is grouped, and its weight. Raises what the user's code raises, and
        `OutcomeError`."""
        value = None if self.value_of is None else self.value_of(step)
        try:
            hash(value)
        except TypeError:
            raise OutcomeError(
                f"{self.entry.codec.label}: Batch(by=...) gives a {type(value).__name__}, which is not hashable"
            ) from None
        if self.weight_of is None:
            return value, 0.0
        weight = self.weight_of(step)
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight <= MAX_FLOAT:
            shown = repr(weight)[:100]
            raise OutcomeError(
                f"{self.entry.codec.label}: Batch(weight=...) gives {shown}, which is no number of 0 or more"
            )
        return value, float(weight)


def _getter(rule: str | Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    return attrgetter(rule) if isinstance(rule, str) else rule


class _Group:
    """Steps that wait for others of their batch."""

    def __init__(self, key: tuple[StepEntry, Any, bool]) -> None:
        self.key = key
        self.leases: list[TaskLease] = []
        self.weight = 0.0
        self.timer: asyncio.TimerHandle | None = None


class Batches:
    """The batches of one worker. Without `lingers`, only `close_all` and full groups end a linger, and `gather` sees
    each step."""

    def __init__(self, dispatch: Dispatch, *, concurrency: int, lingers: bool = True) -> None:
        self._dispatch = dispatch
        self._concurrency = concurrency
        self._lingers = lingers
        self._loop = asyncio.get_running_loop()
        self._kinds: dict[StepEntry, _Kind] = {}
        self._groups: dict[tuple[StepEntry, Any, bool], _Group] = {}
        self._closed = dispatch.closed_batches
        self._running: set[RunningBatch] = set()
        self._is_close_scheduled = self._is_start_scheduled = False
        self._size = 0  # of the class of the last step that came
        self._came_before = self._started_before = 0  # steps that had come, or started, at the last claim
        self._came_alone = False  # all steps that have started between the last two claims run in batches
        self._sure_size = 0  # of the largest batch, if all steps of the app run in batches

    def gather(self, lease: TaskLease) -> None:
        """Take a decoded step into the group of its like."""
        entry = lease.entry
        assert entry is not None
        kind = self._kinds.get(entry)
        if kind is None:
            kind = self._kinds[entry] = _Kind(entry)
        try:
            value, weight = kind.classify(lease.step)
            key = entry, value, lease.in_turn
            group = self._groups.get(key)  # which compares values of the user
        except BaseException as error:
            self._dispatch.end_batched([lease], None, error)
            return
        self._size = kind.size
        if lease.claims > 1:
            self._add_closed([lease])
            return
        if group is not None and group.weight + weight > kind.max_weight:
            self._close(group)
            group = None
        if group is None:
            group = self._open_group(key, kind)
        group.leases.append(lease)
        group.weight += weight
        self._dispatch.keep_gathered(lease)
        if len(group.leases) >= kind.size or group.weight >= kind.max_weight:
            self._close(group)
        elif len(self._groups) > 1 and self._gathered > MAX_GATHERED:
            self._close(next(iter(self._groups.values())))  # the oldest

    @property
    def _gathered(self) -> int:
        """The number of steps in groups."""
        return sum(len(group.leases) for group in self._groups.values())

    def _open_group(self, key: tuple[StepEntry, Any, bool], kind: _Kind) -> _Group:
        group = self._groups[key] = _Group(key)
        if kind.takes_any and self._lingers:
            kind.entry.group = group.leases
        if not self._lingers:
            self._dispatch.wake_pump()
        elif kind.linger > 0:
            group.timer = self._loop.call_later(kind.linger, self._close, group)
            self._dispatch.wake_pump()  # the end of a burst closes it
        elif not self._is_close_scheduled:
            self._is_close_scheduled = True
            self._loop.call_soon(self._close_unlingering)
        return group

    def _close_unlingering(self) -> None:
        """Close the groups that wait for nothing, once no step is ready that might join them."""
        dispatch = self._dispatch
        if dispatch.ready and dispatch.suspended < self._concurrency:
            self._loop.call_soon(self._close_unlingering)
            return
        self._is_close_scheduled = False
        for group in [group for group in self._groups.values() if group.timer is None]:
            self._close(group)

    def close_full(self, entry: StepEntry) -> None:
        """Close the open group of a class, which the dispatcher has filled."""
        self._close(next(group for group in self._groups.values() if group.leases is entry.group))

    def close_all(self) -> None:
        """Close all groups: nothing will join them."""
        for group in list(self._groups.values()):
            self._close(group)

    def _close(self, group: _Group) -> None:
        self._remove_group(group)
        self._add_closed(group.leases)

    def _remove_group(self, group: _Group) -> None:
        if self._groups.get(group.key) is group:
            del self._groups[group.key]
            entry = group.key[0]
            if entry.group is group.leases:
                entry.group = None
            if group.timer is not None:
                group.timer.cancel()

    def _add_closed(self, leases: list[TaskLease]) -> None:
        self._dispatch.keep_ready(leases)
        self._closed.append(leases)
        if not self._is_start_scheduled:
            self._is_start_scheduled = True
            self._loop.call_soon(self.start)

    def start(self) -> None:
        """Start the closed batches for which there is room."""
        self._is_start_scheduled = False
        dispatch = self._dispatch
        postponed = []
        while self._closed and dispatch.suspended < self._concurrency:
            leases = dispatch.keep_unbegun(self._closed.popleft())
            if not leases:
                continue
            is_barred = dispatch.quarantined and leases[0].claims == 1
            taken = self._concurrency + sum(batch.unmarked for batch in self._running)  # single steps need theirs
            has_marks = dispatch.marks.room - taken >= len(leases)
            if is_barred or (self._running and not has_marks):
                postponed.append(leases)
                continue
            batch = RunningBatch(dispatch, leases)
            self._running.add(batch)
            batch.start(self._note_end)
        self._closed.extendleft(reversed(postponed))

    def _note_end(self, batch: RunningBatch) -> None:
        self._running.discard(batch)
        self.start()

    def take_unstarted(self) -> list[TaskLease]:
        """Return the leases, suspects excepted, whose batch has not begun; none is held afterwards."""
        for group in list(self._groups.values()):
            self._remove_group(group)
            self._dispatch.keep_ready(group.leases)
            self._closed.append(group.leases)
        taken: list[TaskLease] = []
        closed = list(self._closed)
        self._closed.clear()
        for leases in closed:
            if leases[0].claims > 1:
                self._closed.append(leases)
            else:
                taken += [lease for lease in leases if lease.is_ready]
        self._dispatch.forget_started(len(taken))
        return taken

    # --- the steps of a turn

    @property
    def holds(self) -> bool:
        """Whether the turn that is under way waits for a batch."""
        return (
            any(batch.is_held for batch in self._running)
            or any(is_held for _, _, is_held in self._groups)
            or any(leases[0].in_turn for leases in self._closed)
        )

    def take_held(self) -> tuple[list[TaskLease], list[TaskLease]]:
        """End a turn. Return the held steps of batches that run, and of those that have not begun, which go."""
        unstarted: list[TaskLease] = []
        for group in [group for group in self._groups.values() if group.key[2]]:
            self._remove_group(group)
            unstarted += group.leases
        for leases in [leases for leases in self._closed if leases[0].in_turn]:
            self._closed.remove(leases)
            unstarted += leases
        running: list[TaskLease] = []
        for batch in self._running:
            executing, waiting = batch.leave_turn()
            running += executing
            unstarted += waiting
        self._dispatch.drop_held(unstarted)
        return running, unstarted

    @property
    def unstarted(self) -> int:
        """The number of steps whose batch has not begun."""
        return self._gathered + sum(len(leases) for leases in self._closed)

    @property
    def extra(self) -> int:
        """The number of leases that take no slot: those that are gathered, and all but one of each batch that runs."""
        return self._gathered + sum(batch.extra for batch in self._running)

    @property
    def has_waiting(self) -> bool:
        """True while a closed batch waits for a slot: this worker needs no more tasks."""
        return any(lease.is_ready for leases in self._closed for lease in leases)

    @property
    def wanted(self) -> int:
        """The number of tasks that would fill a batch for a free slot; 0 if those that came last do not run in
        batches."""
        if self._dispatch.suspended >= self._concurrency:
            return 0
        return self._size if self._came_alone else self._sure_size

    def note_claim(self) -> None:
        """Note, before a claim, whether all that has started since the last one runs in batches: a single step that
        computes is worth one slot, whatever runs beside it."""
        started = self._dispatch.steps
        if started > self._started_before:
            came = self._dispatch.batched
            self._came_alone = came - self._came_before >= started - self._started_before
            self._came_before, self._started_before = came, started

    def expect(self, sizes: list[int | None]) -> None:
        """Note the sizes of the batches of all steps of the app; None is a step that runs alone."""
        known = [size for size in sizes if size is not None]
        self._sure_size = max(known, default=0) if len(known) == len(sizes) else 0
