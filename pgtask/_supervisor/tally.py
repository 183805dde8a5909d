"""What all the processes of a supervisor have done, the dead and the living, and how it ended."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import msgspec

from pgtask._supervisor.child import Process, combine
from pgtask._supervisor.progress import ended
from pgtask._supervisor.states import ExitCode
from pgtask._supervisor.worker import Worker
from pgtask._worker.status import Totals

__all__ = ["Result", "Tally"]


class Result(msgspec.Struct, frozen=True):
    """How it ended: the exit code, the line of a failure, the sums over all processes, and how long it took.

    `finished` tells a burst that ran to its end from one that was stopped. `parked_left` as in `Gone`.
    """

    code: ExitCode
    message: str | None
    totals: Totals
    finished: bool
    seconds: float
    parked_left: int


class Tally:
    """Sums, and `expected`: how many tasks a burst has to do, once a worker has counted them."""

    def __init__(self) -> None:
        self.expected: int | None = None
        self.killed = 0
        self.failure: tuple[ExitCode, str] | None = None
        self._buried = Totals()
        self._ended_before_count = 0
        self._burst_over = False
        self._parked_left = 0

    def totals(self, workers: Iterable[Worker]) -> Totals:
        totals = self._buried
        for worker in workers:
            if worker.process:
                totals = combine(operator.add, totals, worker.process.totals)
        return totals

    def bury(self, process: Process) -> None:
        """Keep what a process has done, which is about to be forgotten."""
        self._buried = combine(operator.add, self._buried, process.totals)
        if process.gone:
            # A worker says so when nobody holds a task: that others were told to stop just then changes nothing.
            self._burst_over |= process.gone.reason == "burst"
            self._parked_left = max(self._parked_left, process.gone.parked_left)

    def count_begins(self, workers: Iterable[Worker]) -> None:
        self._ended_before_count = ended(self.totals(workers))

    def counted(self, waiting: int) -> None:
        self.expected = self._ended_before_count + waiting

    def result(self, seconds: float) -> Result:
        """When all processes are buried."""
        finished = self.failure is None and self._burst_over
        code, message = self.failure or (ExitCode.OK, None)
        if finished and self._parked_left:
            code = ExitCode.PARKED
        return Result(code, message, self._buried, finished, seconds, self._parked_left)
