"""A worker as its supervisor knows it: a slot of the state table, and the process in it now.

Invariant: the supervisor owns it; the other modules only read it, except that `watchdog` writes `silence` and
`dump_requested`.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from typing import Any
from uuid import UUID

import msgspec

from pgtask._log import EventLog
from pgtask._observe.pages import PageWriter
from pgtask._status import ExitCode
from pgtask._supervisor.child import ChildProcess
from pgtask._supervisor.death import UNORDERED, Death, signal_name
from pgtask._supervisor.states import FAILURES, Action, Event, FleetState, Slot, State, refine_event, transition

__all__ = ["MAX_PROCS", "SupervisedWorker"]

log = EventLog("pgtask.supervisor")

MAX_PROCS = 1024
MAX_NAMED = 5  # tasks in a line about a silent worker


class SupervisedWorker:
    """A slot of the fleet, the process in it now, and the failure of the last one.

    `number` is unique, except that a replacement has the number of the worker that it replaces.
    """

    def __init__(self, number: int, *, trial: bool = False) -> None:
        self.number = number
        self.slot = Slot(trial=trial)
        self.process: ChildProcess | None = None
        self.page: PageWriter | None = None
        """The counters of the process in it, if there are metrics."""
        self.failure = (ExitCode.BOOT, "")
        self.recycle_jitter = random.random()
        """Keeps workers of one age from reaching a limit at the same time."""
        self.silence = 0.0
        """Seconds since its loop sent a message, as far as the supervisor was able to read one."""
        self.dump_requested = False
        """The supervisor has asked for its stacks in this silence."""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def leaves(self) -> bool:
        """It was told to leave, or has left."""
        return self.slot.state is State.GONE or (self.slot.state is State.STOPPING and not self.slot.again)

    @property
    def stays(self) -> bool:
        """It counts as one of the wanted workers: not told to leave, and not on trial."""
        return not (self.leaves or self.slot.trial)

    def end_silence(self) -> None:
        """Note that the process sent a message."""
        self.silence, self.dump_requested = 0.0, False

    def executing_tasks(self) -> dict[str, Any]:
        """Return the task that has the loop, as a field for the log; without one, those that are executing.

        The latter are the candidates if a step blocks the loop after it was suspended.
        """
        if self.process is None:
            return {}
        marks = self.process.marks
        if (task := marks.holding_loop()) is not None:
            return {"task": UUID(bytes=task)}
        tasks = [str(UUID(bytes=task)) for task in marks.executing()]
        return {"executing": len(tasks), "tasks": ",".join(tasks[:MAX_NAMED])} if tasks else {}

    def send_signal(self, number: signal.Signals) -> None:
        if self.process:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process:
            self.process.kill()

    def collect(self, status: int, *, grace: float, stopping: bool, fleet: FleetState) -> tuple[Death, Action]:
        """Empty the slot after the death of its process: return the death, and what to do next.

        `stopping`: the whole supervisor stops.
        """
        assert self.process is not None
        now = time.monotonic()
        death = self.process.collect(status, self.slot)
        self.failure = death.failure
        if refine_event(self.slot, death.event, now, fleet) is Event.DIED:
            death = msgspec.structs.replace(death, event=Event.DIED)
        self.slot, action = transition(self.slot, death.event, now, grace=grace, fleet=fleet)
        self._log_death(death, wanted=stopping or death.slot.state is State.STOPPING or death.slot.trial)
        self.process = None
        return death, action

    def log(self, level: int, event: str, **fields: Any) -> None:
        log.log(level, event, worker=self.number, pid=self.pid, **fields)

    def _log_death(self, death: Death, *, wanted: bool) -> None:
        """Log the end of the process and the time of the next start; `wanted` if it was to leave, or only on trial."""
        fields: dict[str, Any] = {"signal": signal_name(death.code)} if death.code < 0 else {"exit": death.code}
        stack = death.stacks or None
        again = {}
        if self.slot.timer is not None:
            again["restart_in"] = round(self.slot.timer - time.monotonic(), 3)
        if death.event is Event.LEFT and death.message:
            self.log(logging.ERROR, "worker.exited", reason=death.reason, error=death.message, **again)
        elif death.event is Event.LEFT:
            self.log(logging.INFO, "worker.exited", reason=death.reason, **again)
        elif death.event is Event.REFUSED and self.slot.timer is not None:
            self.log(logging.ERROR, "worker.refused", error=death.message, **again)
        elif death.event in FAILURES:  # the program prints the failure, once
            self.log(logging.DEBUG, "worker.exited", reason=death.reason, **fields)
        elif death.message == UNORDERED and not wanted:
            self.log(logging.WARNING, "worker.died", reason=death.message, **fields, **again)
        elif wanted:
            self.log(logging.ERROR if stack else logging.INFO, "worker.exited", **fields, **again, stack=stack)
        else:
            if death.code == -signal.SIGKILL:
                fields["hint"] = "out of memory?"
            if death.message:
                fields["error"] = death.message
            self.log(logging.ERROR, "worker.died", **fields, **again, stack=stack)
