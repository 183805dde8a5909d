"""A fork, and what keeps the child apart from its parent.

Invariants: `fork` returns in the parent only; the child never returns into its caller's stack, and it ends by
`os._exit` with its logs flushed. It has none of the parent's handlers, and none of the descriptors to close. A program
that the child starts by exec ignores no signal because of us: exec keeps SIG_IGN, but resets a handler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from pgtask._log import EventLog
from pgtask._status import ExitCode

__all__ = ["fork", "has_terminal", "plain_handlers"]

log = EventLog("pgtask.supervisor")

_RESET = (signal.SIGCHLD,)  # handled in the parent only
_TO_STOP = (signal.SIGTERM, signal.SIGQUIT)
# A terminal, or a person, sends these to the whole process group. The parent decides about them. A worker handles USR2
# itself.
_SWALLOWED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# These too. But a terminal also sends them to the group when a process of it reads or writes in the background, unless
# that process ignores them: then it may write. With a handler, each such line would be an order to the parent.
_OF_TERMINALS = (signal.SIGTTIN, signal.SIGTTOU)

_plain: dict[signal.Signals, Any] = {}


def plain_handlers() -> Mapping[signal.Signals, Any]:
    """Return the handlers of a plain Python program, for the signals that this child handles in its own way.

    Signals that the parent was started to ignore (by nohup, or by a shell for a background process) stay ignored.
    """
    return _plain


def has_terminal() -> bool:
    """Tell if a controlling terminal exists; a closed one does not."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def fork(name: str, main: Callable[[], int], *, close: Iterable[int], stops: bool = True) -> int:
    """Fork a process that shows as `name`, closes the descriptors in `close` and ends with the exit code of `main`.

    A signal to stop ends the process, unless `main` sets a handler; without `stops` the process ignores it, and must be
    short-lived. All signals are blocked across the fork: a signal before the child's own handlers are set would run the
    parent's handler in the child, or be lost. Returns the pid. Raises OSError.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        _flush_streams()  # or the child would write their content a second time
        pid = os.fork()
        if pid == 0:
            _run_child(name, main, mask, close, stops)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _run_child(name: str, main: Callable[[], int], mask: set[int], close: Iterable[int], stops: bool) -> NoReturn:
    code: int = ExitCode.BOOT
    try:
        _detach_from_parent(name, mask, close, stops)
        code = main()
    except BaseException as error:
        log.error("worker.failed", exc_info=error)
    finally:
        _end_process(code)


def _detach_from_parent(name: str, mask: set[int], close: Iterable[int], stops: bool) -> None:
    """Undo the copy of the parent's state. `random` reseeds itself, and `logging` renews its locks."""
    signal.set_wakeup_fd(-1)
    _set_handlers(stops)
    for fd in close:
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask - {*_RESET, *_TO_STOP, *_SWALLOWED, *_OF_TERMINALS})
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:  # Linux: for ps and top
        comm.write(name)


def _set_handlers(stops: bool) -> None:
    terminal = has_terminal()
    for number in (*_TO_STOP, *_SWALLOWED, *(() if terminal else _OF_TERMINALS)):
        default = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        _plain[number] = signal.SIG_IGN if signal.getsignal(number) is signal.SIG_IGN else default
    for number in (*_SWALLOWED, *_OF_TERMINALS):
        if terminal and number in _OF_TERMINALS:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _swallow)
            signal.siginterrupt(number, False)
    for number in (*_RESET, *_TO_STOP):
        signal.signal(number, signal.SIG_DFL if stops or number in _RESET else signal.SIG_IGN)


def _swallow(*_: object) -> None:
    """Ignore a signal, but not in a program started by exec."""


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _end_process(code: int) -> NoReturn:
    """End the process without the interpreter's end, which would wait for threads and run the parent's atexit."""
    try:
        logging.shutdown()
        _flush_streams()
    finally:
        os._exit(code)
