"""capacity: how many tasks the pump may claim now, from the leases, the steps and the prefetch of one worker.

Invariant: each input of the limit wakes the pump, or the pump alone changes it, or it frees slots with time, for which
the pump has a timer: leases and steps that end (`wake_pump`), the last one that starts (`Runner.start_next`,
`start_set_aside`), released leases (`forget_released`), a quarantine (`Suspects.seconds_to_wait`), a pace
(`Prefetch.seconds_to_claim`).
"""

from __future__ import annotations

from pgtask._fastpath import Leases, TaskLease
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import Flush
from pgtask._worker.prefetch import Prefetch
from pgtask._worker.suspects import Suspects

__all__ = ["Capacity"]

MAX_BLOCKED = 5000  # outcomes that were set aside and take no slot: more than that, and this worker claims less


class Capacity:
    """The limit of the claims of one worker."""

    def __init__(
        self, leases: Leases, dispatch: Dispatch, flush: Flush, suspects: Suspects, *, concurrency: int, batch: int
    ) -> None:
        self._leases = leases
        self._dispatch = dispatch
        self._flush = flush
        self._suspects = suspects
        self._concurrency, self._batch = concurrency, batch
        self.prefetch = Prefetch(concurrency, batch)
        self._locked = 0  # leases that the renewing thread cannot release yet
        self.late = 0.0
        """Seconds by which the timer of the last wait was late."""

    def note_released(self, leases: list[TaskLease], locked: int, *, pause: float) -> None:
        """Note leases that the renewing thread has released, since they waited here for too long, for other workers to
        claim; and how many it could not release, since their rows are locked. If the dispatcher has set steps aside,
        claim nothing for the `pause`."""
        self._locked = locked
        if leases:
            self.prefetch.reset_rate()
            if self._dispatch.set_aside:
                self.prefetch.pause_claims(pause)

    def update(self) -> None:
        """Adapt the prefetch to the totals of the dispatcher. Call it before a claim."""
        dispatch, late, self.late = self._dispatch, self.late, 0.0
        dispatch.batches.note_claim()
        self.prefetch.update_window(
            busy=dispatch.busy,
            started=dispatch.steps + dispatch.refused,
            ended=dispatch.ended + dispatch.refused,
            late=late,
            is_stuck=dispatch.is_stuck,
        )

    def claim_limit(self) -> int:
        """Return how many tasks to claim. Waiting suspects take no slot, nor do leases that will be released, or whose
        outcome will be written, when their rows are free; a thread that a timeout gave up does, though its lease is
        gone. A group of suspects is claimed whole."""
        dispatch = self._dispatch
        if self._suspects.is_exclusive:
            return 0
        if self._suspects.is_filling:
            return min(self._concurrency - len(self._suspects), self._batch)
        if dispatch.waits_for_threads or dispatch.batches.has_waiting:
            return 0
        idle = (
            dispatch.batches.extra
            + len(self._suspects)
            + self._locked
            + self._flush.locked
            + min(self._flush.blocked, MAX_BLOCKED)
        )
        held = max(len(self._leases) - idle, dispatch.suspended + dispatch.waiting)
        return self.prefetch.free_slots(held, len(dispatch.ready), dispatch.batches.wanted)

    def expects_slots(self) -> bool:
        """Return whether there are free slots, or a pace will allow a claim."""
        return self.prefetch.seconds_to_claim() > 0 or self.claim_limit() > 0
