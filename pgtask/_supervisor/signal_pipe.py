"""The signals sent to the supervisor, as bytes in a pipe that its loop waits for.

Invariants: a handler does nothing, so a signal cannot interrupt the supervisor halfway; the reader of the pipe gives it
a meaning. TTIN and TTOU are blocked except within `waiting`: a terminal sends them to a process that reads or writes it
in the background, but not while they are blocked, so no line that we write can be taken for an order.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence

__all__ = ["SignalPipe"]

_HANDLED = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD),
    *(signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU),
)
_OF_TERMINALS = (signal.SIGTTIN, signal.SIGTTOU)


class SignalPipe:
    """A context manager for the life of a supervisor, which is the life of its process.

    After it, a signal to stop is ignored, so that it cannot replace the exit code that has been decided.
    """

    def __enter__(self) -> SignalPipe:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)  # a full pipe wakes us as well as one more byte
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINALS)
        for number in _HANDLED:
            if number is signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        # Our parent may have left it blocked, which would hide the deaths of workers.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        return self

    def __exit__(self, *_: object) -> None:
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL if number is signal.SIGCHLD else signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self.reader)
        os.close(self.writer)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Admit the signals of terminals, while the supervisor only waits and neither reads nor writes."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_TERMINALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINALS)

    def read_signals(self) -> Sequence[signal.Signals]:
        """Return the signals since the last call; SIGCHLD last, so that a death counts as wanted after a stop."""
        numbers = b""
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(self.reader, 65536)
        signals = [signal.Signals(number) for number in numbers if number in _HANDLED]
        return sorted(signals, key=lambda number: number is signal.SIGCHLD)
