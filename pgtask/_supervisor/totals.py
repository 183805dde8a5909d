"""The totals of all processes of a supervisor, dead and alive, and the result of its run."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import msgspec

from pgtask._status import ExitCode, Totals
from pgtask._supervisor.child import combine_totals
from pgtask._supervisor.death import Death
from pgtask._supervisor.slot import SupervisedWorker

__all__ = ["FleetTotals", "Result"]


class Result(msgspec.Struct, frozen=True):
    """The end of a supervisor: its exit code, the line of a failure, the totals of all processes, and its seconds.

    `finished` tells a burst that ran to its end from one that was stopped. `parked_left`, `parked_others` and `paused`
    as in `ExitNotice`.
    """

    code: ExitCode
    message: str | None
    totals: Totals
    finished: bool
    seconds: float
    parked_left: int
    parked_others: int = 0
    paused: tuple[str, ...] = ()


class FleetTotals:
    """The sums, and `expected`: the number of tasks that a burst has to do, once a worker has counted them."""

    def __init__(self) -> None:
        self.expected: int | None = None
        self.killed = 0
        self.failure: tuple[ExitCode, str] | None = None
        self.interrupted: ExitCode | None = None
        """The exit code of a burst that is stopped before its end."""
        self._finished = Totals()
        self._settled_before_count = 0
        self._burst_over = False
        self._parked_left = self._parked_others = 0
        self._paused: tuple[str, ...] = ()

    def sum_up(self, workers: Iterable[SupervisedWorker]) -> Totals:
        """Return the totals of the processes that have ended and of those in `workers`."""
        totals = self._finished
        for worker in workers:
            if worker.process:
                totals = combine_totals(operator.add, totals, worker.process.totals)
        return totals

    def add_finished(self, death: Death) -> None:
        """Keep the totals of a process that has ended."""
        self._finished = combine_totals(operator.add, self._finished, death.totals)
        if death.notice:
            # A worker sends this when no task is leased: an order to stop for the other workers changes nothing then.
            self._burst_over |= death.notice.reason == "burst"
            self._parked_left = max(self._parked_left, death.notice.parked_left)
            self._parked_others = max(self._parked_others, death.notice.parked_others)
            self._paused = death.notice.paused

    def begin_count(self, workers: Iterable[SupervisedWorker]) -> None:
        """Note that a worker is about to count the tasks of the burst that are due."""
        self._settled_before_count = self.sum_up(workers).settled

    def end_count(self, waiting: int) -> None:
        self.expected = self._settled_before_count + waiting

    def result(self, seconds: float) -> Result:
        """Return the result, once all processes have ended."""
        finished = self.failure is None and self._burst_over
        code, message = self.failure or (ExitCode.OK, None)
        if finished and self._parked_left:
            code = ExitCode.PARKED
        elif not finished and self.failure is None and self.interrupted is not None:
            code = self.interrupted
        left = self._parked_left, self._parked_others, self._paused
        return Result(code, message, self._finished, finished, seconds, *left)
