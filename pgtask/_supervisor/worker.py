"""A worker as the parent knows it: its slot in the table of states, and the process that is in it now.

Invariant: one owner, the supervisor; the others that get to see it only read it, but for `silence` and `asked`, which
are of `watch`.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from typing import Any

from pgtask._events import log_event
from pgtask._supervisor.child import Process
from pgtask._supervisor.states import BOOT_TRIES, Event, ExitCode, Slot, State

__all__ = ["MOST_PROCS", "Worker", "death", "failure_of", "signal_name"]

log = logging.getLogger("pgtask.supervisor")

MOST_PROCS = 1024


class Worker:
    """A slot of the fleet, the process in it now, and how the one before ended. `number` is unique among those that
    are to stay; a replacement has that of its predecessor."""

    def __init__(self, number: int, *, trial: bool = False) -> None:
        self.number = number
        self.slot = Slot(trial=trial)
        self.process: Process | None = None
        self.reason: str | None = None
        self.was_killed = False
        """By us, since it did not stop in time."""
        self.failure = (ExitCode.BOOT, "")
        self.luck = random.random()
        """So that workers of one age do not reach a limit at the same time."""
        self.silence = 0.0
        """Seconds since its loop was heard of, as far as we listened."""
        self.asked = False
        """Whether it was asked for its stacks in this silence."""

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def leaves(self) -> bool:
        """It has been told to, or has left."""
        return self.slot.state is State.GONE or (self.slot.state is State.STOPPING and not self.slot.again)

    @property
    def stays(self) -> bool:
        """Counts among those that are wanted: not told to leave, and not on trial."""
        return not (self.leaves or self.slot.trial)

    def heard(self) -> None:
        self.silence, self.asked = 0.0, False

    def log(self, level: int, event: str, **fields: Any) -> None:
        log_event(log, level, event, worker=self.number, pid=self.pid, **fields)

    def log_end(self, event: Event, code: int, words: str | None, *, stack: str | None, wanted: bool) -> None:
        """How its process ended, with the `stack` that a crash has left, and when the next one starts; `wanted` if it
        was to leave, or was only on trial."""
        fields: dict[str, Any] = {"signal": signal_name(code)} if code < 0 else {"exit": code}
        again = {}
        if self.slot.timer is not None:
            again["restart_in"] = round(self.slot.timer - time.monotonic(), 3)
        if event is Event.LEFT and words:
            self.log(logging.ERROR, "worker.gone", reason=self.reason, error=words, **again)
        elif event is Event.LEFT:
            self.log(logging.INFO, "worker.gone", reason=self.reason, **again)
        elif event is Event.FAILED:  # said once, by whoever prints the result
            self.log(logging.DEBUG, "worker.gone", reason=self.reason, **fields)
        elif wanted:
            self.log(logging.ERROR if stack else logging.INFO, "worker.gone", **fields, **again, stack=stack)
        else:
            if code == -signal.SIGKILL:
                fields["hint"] = "out of memory?"
            if words:
                fields["error"] = words
            self.log(logging.ERROR, "worker.died", **fields, **again, stack=stack)


def signal_name(code: int) -> str:
    """The name of the signal that an exit code below zero stands for."""
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


def death(code: int) -> str:
    """Of what a process died, as it is written into a task."""
    if code >= 0:
        return f"exit code {code}"
    return signal_name(code) + (" (out of memory?)" if code == -signal.SIGKILL else "")


def failure_of(code: int, slot: Slot, words: str | None) -> str:
    """What to say of a worker that did not come into service; `slot` is as it was before the end, `words` its own."""
    was_ready = slot.ready_since is not None
    if slot.state is State.STOPPING:
        how = "was silent for too long (see --stall)"
    else:
        how = f"was killed by {signal_name(code)}" if code < 0 else f"ended with exit code {code}"
    when = "right after" if was_ready else "before"
    times = "" if slot.trial else f", {BOOT_TRIES} times in a row"
    what = "a worker did not last" if was_ready else "a worker could not start"
    return f"{what}: {words or f'it {how} {when} it was ready{times}'}"
