"""Checks of the pump: what must hold whenever it waits.

Invariants: a check changes nothing; a failed one ends the worker, so that its supervisor releases the leases.
"""

from __future__ import annotations

from pgtask._fastpath import Leases
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import Flush
from pgtask._worker.suspects import Suspects

__all__ = ["PumpInvariants"]


class PumpInvariants:
    """The invariants of one worker's pump."""

    def __init__(self, leases: Leases, dispatch: Dispatch, flush: Flush, suspects: Suspects) -> None:
        self._leases = leases
        self._dispatch = dispatch
        self._flush = flush
        self._suspects = suspects

    def check_owners(self) -> None:
        """Assert that every lease has an owner: with no outcome left to flush, it waits for its turn or runs. A leaked
        lease crashes the worker so that it is released."""
        here = (self._dispatch.waiting, self._dispatch.suspended, self._flush.blocked, len(self._suspects))
        owners = (*here, self._leases.releasing, self._flush.locked, self._dispatch.batches.unstarted)
        if len(self._leases) and not any(owners):
            raise AssertionError(f"{len(self._leases)} leases have no owner: please report this")

    def find_missed_wakeup(self, *, may_claim: bool, expected_claim: bool) -> AssertionError | None:
        """Return an error if the pump has slept on a changed world when its timer rings: a timer finds the event that
        it was set for, and no other. `may_claim`: a claim may bring tasks; `expected_claim`: the timer was set for
        that.
        """
        if (may_claim and not self._dispatch.ready and not expected_claim) or len(self._dispatch.outcomes):
            return AssertionError("the pump slept on a changed world: please report this")
        return None
