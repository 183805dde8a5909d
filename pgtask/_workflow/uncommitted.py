"""The checkpoints of one run that its function has seen before their commit.

The function goes on with a result at once, since only what it asks for next may have an effect. That waits (`wait`).
If the function asks for nothing more, the end of the run carries the last checkpoints, and shares their commit.

Invariants: the journal gets each checkpoint once, by `wait`, unasked, or with the end of the run; those of one branch
reach it one after the other, so that none is durable without the ones before it. After `drop` it gets none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from pgtask._fastpath import TaskLease
from pgtask._workflow.entries import RecordCheckpoint
from pgtask._workflow.history import RunHistory
from pgtask._workflow.journal import Journal
from pgtask._workflow.steps import StepRunner, is_cancelled
from pgtask._workflow.values import Checkpoint

__all__ = ["Uncommitted"]

MAX_TURNS = 4  # of the loop until a checkpoint is handed in unasked; a gather takes three to return


class Uncommitted:
    """The checkpoints of one run between their making and their commit.

    Calls `refuse` with a checkpoint that was not written, and the error: `RunStopped` for a lost lease. Calls `cut_off`
    when a wait is cancelled.
    """

    __slots__ = (
        *("_cut_off", "_history", "_in_flight", "_is_dropped", "_is_kept", "_is_scheduled", "_journal", "_lease"),
        *("_loop", "_refuse", "_runner", "_unsent"),
    )

    def __init__(
        self,
        lease: TaskLease,
        history: RunHistory,
        *,
        journal: Journal,
        runner: StepRunner,
        refuse: Callable[[Checkpoint, BaseException], None],
        cut_off: Callable[[], None],
    ) -> None:
        self._lease = lease
        self._history = history
        self._journal = journal
        self._runner = runner
        self._refuse = refuse
        self._cut_off = cut_off
        self._loop = asyncio.get_running_loop()
        self._unsent: list[Checkpoint] = []
        self._is_scheduled = self._is_kept = self._is_dropped = False
        # Those that the journal has, with their answers, from the first one without an answer on.
        self._in_flight: list[tuple[Checkpoint, asyncio.Future[None]]] = []

    @property
    def unsent(self) -> Sequence[Checkpoint]:
        """Those that the journal does not have."""
        return self._unsent

    @property
    def has_progress(self) -> bool:
        """True if one of them is progress of the run."""
        in_flight = (checkpoint for checkpoint, _ in self._in_flight)
        return any(checkpoint.is_progress for checkpoint in (*in_flight, *self._unsent))

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint, which is handed in soon, unless the run ends before."""
        if self._is_dropped:
            return
        self._unsent.append(checkpoint)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._hand_in_unasked, MAX_TURNS)

    def _hand_in_unasked(self, turns: int) -> None:
        """Hand in what a function that now does something else has left, after a few more turns of the loop."""
        if turns and self._unsent and not self._is_kept:
            self._loop.call_soon(self._hand_in_unasked, turns - 1)
            return
        self._is_scheduled = False
        if self._unsent and not self._is_kept:
            self._hand_in()
            self._settle_unasked()

    def _hand_in(self) -> None:
        """Hand in all that the journal does not have."""
        unsent, self._unsent = self._unsent, []
        for checkpoint in unsent:
            entry = RecordCheckpoint(self._lease, checkpoint, self._history.take_version())
            self._in_flight.append((checkpoint, self._journal.submit(entry)))

    async def wait(self, *, is_last: bool = False) -> None:
        """Hand in all that was added, and wait until nothing is uncommitted, also of what other branches add meanwhile.
        The last time, keep what the journal does not have: the end of the run carries it."""
        if is_last:
            self._is_kept = True
        while self._in_flight or (self._unsent and not is_last):
            if self._unsent and not is_last:
                self._hand_in()
            # As a rule the journal answers in the order of the entries.
            _, answered = self._in_flight[-1]
            if answered.done():
                _, answered = self._in_flight[0]
            try:
                await answered
            except (asyncio.CancelledError, GeneratorExit) as cut_off:
                if is_cancelled() or isinstance(cut_off, GeneratorExit):
                    self._settle_unasked()
                    self._cut_off()
                    raise
                await asyncio.sleep(0)  # the branch that was cancelled has yet to say so
            except BaseException:
                pass  # `refuse` gets it
            self._settle()

    def _settle(self, _: object = None) -> None:
        """Take the answers that have come."""
        while self._in_flight:
            checkpoint, answered = self._in_flight[0]
            if not answered.done():
                return
            del self._in_flight[0]
            if answered.cancelled():
                continue  # with the branch that has waited for it, which stops the run
            if (error := answered.exception()) is not None:
                self._refuse(checkpoint, error)
                continue
            if checkpoint.is_progress:
                self._history.failed_before = 0
            self._runner.report_recorded(self._lease, checkpoint)

    def _settle_unasked(self) -> None:
        """Take the answers when they come, as nothing waits for them."""
        for _, answered in self._in_flight:
            answered.add_done_callback(self._settle)

    def close(self) -> None:
        """Call nothing from now on."""
        self._refuse = self._cut_off = _ignore

    def drop(self) -> None:
        """Drop all that is unsent, now and later: the lease was lost."""
        self._is_dropped = True
        self._unsent.clear()


def _ignore(*_: object) -> None:
    """Stand for the callbacks of a run that has ended."""
