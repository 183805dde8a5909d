"""The transactions of steps whose tasks are in memory: what they write is in the database that the test has given.

Invariant: what a step writes is committed if and only if its outcome is written into the table in memory.
"""

from __future__ import annotations

from typing import Any

from pgtask._fastpath import Outcomes, TaskLease
from pgtask._memory.dispatch import MemoryDispatch
from pgtask._postgres.step_transaction import CommitUnknown, Interrupted, StepTransaction, forget
from pgtask._settings import DEFAULT_LEASE_TIMEOUT
from pgtask._worker.transactions import Transactions

__all__ = ["MemoryTransactions"]


class MemoryTransactions(Transactions):
    """Commits, and puts the outcome into the buffer of the dispatcher."""

    has_rows = False

    def __init__(self, dispatch: MemoryDispatch) -> None:
        absent: Any = None
        super().__init__(dispatch, absent, absent, lease_timeout=DEFAULT_LEASE_TIMEOUT, written=lambda outcomes: None)
        self._crashed = dispatch.crashed

    async def commit(self, transaction: StepTransaction, outcomes: Outcomes) -> list[TaskLease]:
        try:
            if self._crashed.isdisjoint(lease.id for lease in outcomes.leases()):
                await transaction.check_unbroken()
                await transaction.commit()
        except CommitUnknown as unknown:
            raise Interrupted(unknown.__cause__ or unknown) from unknown
        finally:
            await transaction.roll_back()
            forget(transaction)
        self._dispatch.outcomes.absorb(outcomes)
        return []
