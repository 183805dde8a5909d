"""A fork, and what keeps the child apart from its parent.

Invariants: `fork` returns in the parent only; the child never goes back into its caller's stack, and it ends by
`os._exit` with its logs flushed. It has none of the parent's handlers, and no descriptor that it was not to have.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from pgtask._events import log_event
from pgtask._supervisor.states import ExitCode

__all__ = ["fork"]

log = logging.getLogger("pgtask.supervisor")

_RESET = (signal.SIGCHLD,)  # the parent's handler ends here
_TO_STOP = (signal.SIGTERM, signal.SIGQUIT)
# A terminal, or a person, sends these to the whole process group. What they mean is for the parent to decide. TTIN and
# TTOU a terminal sends when one of the group reads or writes in the background, but not for a process that ignores
# them: it may write. A worker makes its own of USR2.
_IGNORED = (
    *(signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


def fork(name: str, main: Callable[[], int], *, close: Iterable[int], stops: bool = True) -> int:
    """Fork a process that shows as `name`, closes the descriptors in `close` and ends with the exit code of `main`.

    Until `main` says otherwise an order to stop just ends it; one that does not stop ignores it, and is to be short.
    All signals are blocked across the fork: one that came between it and the child's own handlers would run
    the parent's in the child, or be lost.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        _flush()  # or the child would write it a second time
        pid = os.fork()
        if pid == 0:
            _be_the_child(name, main, mask, close, stops)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _be_the_child(name: str, main: Callable[[], int], mask: set[int], close: Iterable[int], stops: bool) -> NoReturn:
    code: int = ExitCode.BOOT
    try:
        _leave_the_parent(name, mask, close, stops)
        code = main()
    except BaseException as error:
        log_event(log, logging.ERROR, "worker.failed", exc_info=error)
    finally:
        _exit(code)


def _leave_the_parent(name: str, mask: set[int], close: Iterable[int], stops: bool) -> None:
    """Undo what the fork copied. `random` has reseeded itself, and `logging` has made its locks anew."""
    signal.set_wakeup_fd(-1)
    for number in (*_RESET, *_TO_STOP):
        signal.signal(number, signal.SIG_DFL)
    for number in (*_IGNORED, *(() if stops else _TO_STOP)):
        signal.signal(number, signal.SIG_IGN)
    for fd in close:
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask - {*_RESET, *_TO_STOP, *_IGNORED})
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:  # Linux: for ps and top
        comm.write(name)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _exit(code: int) -> NoReturn:
    """End the process, but not the interpreter: that would wait for threads and run the parent's atexit."""
    try:
        logging.shutdown()
        _flush()
    finally:
        os._exit(code)
