"""What each signal to the supervisor means.

Invariant: `handle_<signal>` runs from the supervisor's loop, never in a signal handler.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from pgtask._events import log_event
from pgtask._supervisor.states import Event, State
from pgtask._supervisor.watch import usage
from pgtask._supervisor.worker import MOST_PROCS, Worker
from pgtask._worker.status import Totals

if TYPE_CHECKING:
    from pgtask._supervisor.parent import Supervisor

__all__ = ["Orders"]

log = logging.getLogger("pgtask.supervisor")


class Orders:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._had_terminal = _has_terminal()
        self._to_stop = 0
        self._began = time.monotonic()

    def handle_term(self, name: str = "SIGTERM") -> None:
        """The first order drains, the second stops now."""
        self._to_stop += 1
        if self._to_stop > 1:
            self._supervisor.stop(Event.QUIT, name)
            return
        again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
        grace = self._supervisor.config.grace
        hint = f"waiting up to {grace:g} s for the steps that run; {again} stops now"
        self._supervisor.stop(Event.STOP, name, hint=hint)

    def handle_int(self) -> None:
        self.handle_term("SIGINT")

    def handle_quit(self) -> None:
        self._supervisor.stop(Event.QUIT, "SIGQUIT")

    def handle_hup(self) -> None:
        """Fresh code; but a closed terminal stops us, or we would be left behind unseen."""
        if self._had_terminal and not _has_terminal():
            self.handle_term("SIGHUP")
        elif self._supervisor.stopping:
            self._ignore("SIGHUP", "it is stopping")
        else:
            self._supervisor.reload("SIGHUP")

    def handle_ttin(self) -> None:
        """One worker more. It is on trial: that it cannot start is no reason to stop the others."""
        size = len(self._wanted())
        if self._supervisor.stopping or size >= MOST_PROCS:
            self._ignore("SIGTTIN", "it is stopping" if self._supervisor.stopping else f"{MOST_PROCS} is the most")
            return
        taken = {worker.number for worker in self._supervisor.workers}
        number = next(number for number in itertools.count(1) if number not in taken)
        self._supervisor.add(number, trial=True)
        log_event(log, logging.INFO, "worker.added", worker=number, workers=size + 1)

    def handle_ttou(self) -> None:
        """One worker less: the last one, but not one that is just being replaced."""
        wanted = self._wanted()
        spare = [worker for worker in wanted if not self._supervisor.replacements.concerns(worker)]
        if self._supervisor.stopping or len(wanted) < 2 or not spare:
            self._ignore("SIGTTOU", "it is stopping" if self._supervisor.stopping else "1 is the least")
            return
        surplus = max(spare, key=lambda worker: worker.number)
        log_event(log, logging.INFO, "worker.removed", worker=surplus.number, pid=surplus.pid, workers=len(wanted) - 1)
        self._supervisor.happen(surplus, Event.STOP)

    def _wanted(self) -> list[Worker]:
        """Those that are to stay, and those that were just added."""
        return [worker for worker in self._supervisor.workers if worker.stays or self._is_added(worker)]

    def _is_added(self, worker: Worker) -> bool:
        return worker.slot.trial and not worker.leaves and not self._supervisor.replacements.concerns(worker)

    def handle_usr1(self) -> None:
        """A line about all workers, and a line for each; what it has done is as of its last tick."""
        workers = self._supervisor.workers
        states = Counter(worker.slot.state for worker in workers)
        fields: dict[str, Any] = {state.value: states[state] for state in State if state is not State.GONE}
        uptime = round(time.monotonic() - self._began, 1)
        log_event(log, logging.INFO, "supervisor.status", uptime=uptime, workers=len(workers), **fields)
        for worker in sorted(workers, key=lambda worker: worker.number):
            self._say(worker)

    def _say(self, worker: Worker) -> None:
        totals, measures = Totals(), {}
        if worker.process:
            totals = worker.process.totals
            measures = {"uptime": round(time.monotonic() - worker.process.started, 1), **usage(worker.process.pid)}
        worker.log(
            logging.INFO,
            "worker.status",
            state=worker.slot.state.value,
            **measures,
            **msgspec.structs.asdict(totals),
        )

    def handle_usr2(self) -> None:
        self._ignore("SIGUSR2", "send it to a worker, for its stacks")

    def _ignore(self, name: str, why: str) -> None:
        log_event(log, logging.WARNING, "signal.ignored", signal=name, why=why)


def _has_terminal() -> bool:
    """Whether there is a controlling terminal; none is left when it has been closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
