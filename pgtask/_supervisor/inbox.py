"""The signals sent to the supervisor, as bytes in a pipe that its loop waits for.

Invariant: a handler does nothing, so that a signal cannot do harm at a bad moment; what it means is decided
by whoever reads the pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

__all__ = ["Inbox"]

_HANDLED = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD),
    *(signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN),
)


class Inbox:
    """A context manager for the life of a supervisor, which is the life of its process: after it, an order to
    stop is ignored, so that it cannot spoil the exit code that has been decided."""

    def __enter__(self) -> Inbox:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)  # a full pipe wakes us as well as one byte more
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        for number in _HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        # With a handler, a line for a terminal that stops its background jobs would be tried again for ever.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL if number is signal.SIGCHLD else signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self.reader)
        os.close(self.writer)

    def read(self) -> Sequence[signal.Signals]:
        """The signals since the last call; a death last, so that it is judged in the light of the others."""
        numbers = b""
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(self.reader, 65536)
        signals = [signal.Signals(number) for number in numbers if number in _HANDLED]
        return sorted(signals, key=lambda number: number is signal.SIGCHLD)
