"""The meaning of each signal to the supervisor, except SIGCHLD.

Invariant: `handle_<signal>` runs from the supervisor's loop, never in a signal handler.
"""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pgtask._log import EventLog
from pgtask._status import Totals
from pgtask._supervisor.fork import has_terminal
from pgtask._supervisor.rolling_restart import RollingRestart
from pgtask._supervisor.slot import MAX_PROCS, SupervisedWorker
from pgtask._supervisor.states import Event, State
from pgtask._supervisor.watchdog import process_usage

__all__ = ["SignalHandlers"]

log = EventLog("pgtask.supervisor")

_STOPPING = "it is stopping"


class SignalHandlers:
    """A handler for each signal, by the signal's name.

    They act on the supervisor through callbacks: `workers` returns its workers, `is_stopping` tells if it stops;
    `add` starts a worker on trial with a number, `remove` tells one to drain, `reload` replaces all for a cause, and
    `stop` takes an event, a cause and fields for the log. `grace` in seconds.
    """

    def __init__(
        self,
        *,
        grace: float,
        restart: RollingRestart,
        workers: Callable[[], Sequence[SupervisedWorker]],
        is_stopping: Callable[[], bool],
        add: Callable[[int], Any],
        remove: Callable[[SupervisedWorker], Any],
        reload: Callable[[str], Any],
        stop: Callable[..., Any],
    ) -> None:
        self._grace = grace
        self._restart = restart
        self._workers, self._is_stopping = workers, is_stopping
        self._add, self._remove, self._reload, self._stop = add, remove, reload, stop
        self._had_terminal = has_terminal()
        self._stops = 0
        self._started = time.monotonic()

    def handle(self, number: signal.Signals) -> None:
        getattr(self, f"handle_{number.name[3:].lower()}")()

    def handle_term(self, name: str = "SIGTERM") -> None:
        """Drain at the first signal, stop now at the second."""
        self._stops += 1
        if self._stops > 1:
            self._stop(Event.QUIT, name)
            return
        again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
        hint = f"waiting up to {self._grace:g} s for the steps that run; {again} stops now"
        self._stop(Event.STOP, name, hint=hint)

    def handle_int(self) -> None:
        self.handle_term("SIGINT")

    def handle_quit(self) -> None:
        self._stop(Event.QUIT, "SIGQUIT")

    def handle_hup(self) -> None:
        """Reload the workers; if the controlling terminal has closed, stop instead of lingering unnoticed."""
        if self._had_terminal and not has_terminal():
            self.handle_term("SIGHUP")
        elif self._is_stopping():
            self._ignore("SIGHUP", _STOPPING)
        else:
            self._reload("SIGHUP")

    def handle_ttin(self) -> None:
        """Add a worker, on trial: its failure to start is no reason to stop the others."""
        size = len(self._wanted_workers())
        if self._is_stopping() or size >= MAX_PROCS:
            self._ignore("SIGTTIN", _STOPPING if self._is_stopping() else f"{MAX_PROCS} is the maximum")
            return
        taken = {worker.number for worker in self._workers()}
        number = next(number for number in itertools.count(1) if number not in taken)
        self._add(number)
        log.info("worker.added", worker=number, workers=size + 1)

    def handle_ttou(self) -> None:
        """Remove the worker with the highest number, except one that is being replaced."""
        wanted = self._wanted_workers()
        spare = [worker for worker in wanted if not self._restart.concerns(worker)]
        if self._is_stopping() or len(wanted) < 2 or not spare:
            self._ignore("SIGTTOU", _STOPPING if self._is_stopping() else "1 is the minimum")
            return
        surplus = max(spare, key=lambda worker: worker.number)
        log.info("worker.removed", worker=surplus.number, pid=surplus.pid, workers=len(wanted) - 1)
        self._remove(surplus)

    def handle_usr1(self) -> None:
        """Log a line about all workers, and one about each; its totals are those of its last tick."""
        workers = self._workers()
        states = Counter(worker.slot.state for worker in workers)
        fields: dict[str, Any] = {state.value: states[state] for state in State if state is not State.GONE}
        uptime = round(time.monotonic() - self._started, 1)
        log.info("supervisor.status", uptime=uptime, workers=len(workers), **fields)
        for worker in sorted(workers, key=lambda worker: worker.number):
            self._log_status(worker)

    def handle_usr2(self) -> None:
        self._ignore("SIGUSR2", "send it to a worker, for its stacks")

    def _wanted_workers(self) -> list[SupervisedWorker]:
        """Return the workers that stay, and those that were just added."""
        return [worker for worker in self._workers() if worker.stays or self._is_added(worker)]

    def _is_added(self, worker: SupervisedWorker) -> bool:
        return worker.slot.trial and not worker.leaves and not self._restart.concerns(worker)

    def _log_status(self, worker: SupervisedWorker) -> None:
        totals, measures = Totals(), {}
        if process := worker.process:
            totals = process.totals
            measures = {"uptime": round(time.monotonic() - process.started, 1), **process_usage(process.pid)}
        counts = msgspec.structs.asdict(totals)
        worker.log(logging.INFO, "worker.status", state=worker.slot.state.value, **measures, **counts)

    def _ignore(self, name: str, why: str) -> None:
        log.warning("signal.ignored", signal=name, why=why)
