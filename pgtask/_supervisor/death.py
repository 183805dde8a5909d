"""The end of a worker's process as a value, and the words for it.

Invariant: a `Death` needs neither the process nor its pipe: all that is known of the process is in it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

import msgspec

from pgtask._status import ExitCode, ExitNotice, Totals
from pgtask._supervisor.states import BOOT_TRIES, FAILURES, Event, Slot, State

__all__ = ["UNORDERED", "Death", "signal_name"]

UNORDERED = "it left without an order of its supervisor: a SIGTERM or SIGQUIT from elsewhere"


class Death(msgspec.Struct, frozen=True):
    """The end of one process, as its parent collected it.

    `slot` is the slot before the end, `event` the meaning of the end for that slot. `code` is negative for a signal.
    `notice` is the last message of the process, if it sent one. `stacks` are those of a crash, `dump` the last ones
    that it wrote on demand. `executing` are the tasks that it may have been executing, `held` those of them that a
    transaction may have held.
    """

    pid: int
    worker: bytes
    slot: Slot
    event: Event
    code: int
    notice: ExitNotice | None
    stacks: str
    dump: str
    was_ready: bool
    was_killed: bool
    totals: Totals
    executing: Sequence[bytes]
    held: Sequence[bytes] = ()

    @property
    def holds_leases(self) -> bool:
        """A worker that was ready may hold leases, unless it left in order and released them all."""
        return self.was_ready and not (self._is_orderly and self.notice is not None and not self.notice.held)

    @property
    def implicates(self) -> bool:
        """The tasks that it was executing may be the cause.

        Not so if the process left in order with a thread still running, nor if we killed it for another reason than
        the silence of its loop.
        """
        return self.event is Event.DIED and not self._is_orderly and (self.slot.silent or not self.was_killed)

    @property
    def _is_orderly(self) -> bool:
        return self.notice is not None and self.code == ExitCode.OK

    @property
    def reason(self) -> str | None:
        """The reason that the process gave."""
        return self.notice.reason if self.notice else None

    @property
    def message(self) -> str | None:
        """The message that the process sent; or that it drained without an order."""
        if self.notice is None:
            return None
        if self.event is Event.DIED and self.notice.reason == "drained" and not self.notice.message:
            return UNORDERED
        return self.notice.message

    @property
    def cause(self) -> str:
        """The cause of death, as the reaper writes it into a task."""
        if self.code >= 0:
            how = f"exit code {self.code}"
        else:
            how = signal_name(self.code) + (" (out of memory?)" if self.code == -signal.SIGKILL else "")
        return how if self.message is None else f"{how}: {self.message}"

    @property
    def failure(self) -> tuple[ExitCode, str]:
        """The exit code and the line of the supervisor, if this death ends it."""
        if self.event in FAILURES and (self.code != ExitCode.BOOT or self.slot.state is State.READY):
            return ExitCode(self.code), self.message or ""
        return ExitCode.BOOT, self._describe_failed_start()

    def _describe_failed_start(self) -> str:
        was_ready = self.slot.ready_since is not None
        if self.slot.state is State.STOPPING:
            how = "was silent for too long (see --stall)"
        else:
            how = f"was killed by {signal_name(self.code)}" if self.code < 0 else f"ended with exit code {self.code}"
        when = "right after" if was_ready else "before"
        times = "" if self.slot.trial else f", {BOOT_TRIES} times in a row"
        what = "a worker did not last" if was_ready else "a worker could not start"
        return f"{what}: {self.message or f'it {how} {when} it was ready{times}'}"


def signal_name(code: int) -> str:
    """Return the name of the signal that a negative exit code stands for."""
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"
