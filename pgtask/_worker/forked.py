"""forked: the processes that user code forks from a worker inherit nothing of the worker.

Theory of operation. `os.fork`, `multiprocessing` and executors of processes copy the whole worker. The hooks here run
in the copy before user code does. They

- restore the signals: the handlers of a plain Python program, and no descriptor that wakes up the worker's loop. All
  signals are blocked from before the fork until then. Otherwise an early `terminate()` runs the worker's handler in the
  copy, and the worker drains;
- replace the worker's descriptors (pipes, sockets of its database connections, epoll) by a dead socket. They are not
  closed: an inherited object that closes "its" number later must not hit a file that the copy has opened meanwhile.
  Writes of the copy to a dead socket reach neither the server nor the worker;
- put the copy on a leash: the kernel sends it SIGTERM when the worker is gone. The leash is a pipe whose writing end
  only the worker holds. Each copy opens the reading end anew (a file of its own) and asks for a signal. This is not
  PR_SET_PDEATHSIG, which fires when the forking *thread* ends, and executors fork from any thread;
- end the copy when it comes back to the worker's code, by the end of the step or at an `await`.

Invariants: the copy never writes to the worker's database sessions or pipes, and never runs the exit handlers of the
worker. A program that the copy, or a step, starts by exec keeps none of this: all descriptors here are close-on-exec.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from pgtask import _fastpath
from pgtask._log import EventLog
from pgtask._postgres.dial import open_descriptors
from pgtask._worker.turn_slots import slot_descriptors

__all__ = ["called_in_thread", "end_if_copy", "guard_forks", "protect_loop"]

log = EventLog("pgtask.worker")

_guard: _ForkGuard | None = None
_copy = False  # user code has forked this process from a worker


def guard_forks(plain: Mapping[signal.Signals, Any], descriptors: Iterable[int], *, dump: signal.Signals) -> None:
    """Set the hooks. Call it once in a worker, right after its own fork.

    `plain` maps the signals that the worker handles to the handlers of a plain Python program; `descriptors` are those
    that the worker starts with. At the signal `dump` faulthandler writes the stacks.
    """
    global _guard
    _guard = _ForkGuard(plain, descriptors, dump)


def protect_loop(loop: Any, *others: Any) -> None:
    """Protect the worker's running loop, once its signal handlers are set, and the loops of its threads."""
    if _guard is not None:
        _guard.protect_loop(loop, others)


class _ForkGuard:
    """The hooks of one worker, and the state that they need in a copy of it."""

    def __init__(self, plain: Mapping[signal.Signals, Any], descriptors: Iterable[int], dump: signal.Signals) -> None:
        self._plain = plain
        self._ours = {number: signal.getsignal(number) for number in plain}
        self._dump = dump
        self._leash, holder = os.pipe()
        self._leash_is = _file_identity(self._leash)
        self._descriptors = [holder, *descriptors]
        self._masks: dict[int, set[Any]] = {}  # by thread: two may be about to fork
        self._loop: Any = None
        self._others: Iterable[Any] = ()
        self._thread = 0
        self._task: Any = None  # the asyncio Task that forks, if the loop's thread forks
        os.register_at_fork(
            before=self._prepare_fork, after_in_parent=self._resume_parent, after_in_child=self._isolate_copy
        )

    def protect_loop(self, loop: Any, others: Iterable[Any]) -> None:
        """Note the loop, whose thread this is, and the handlers that it has set."""
        self._loop, self._others, self._thread = loop, others, threading.get_ident()
        self._ours |= {number: signal.getsignal(number) for number in self._plain}

    def _prepare_fork(self) -> None:
        if threading.get_ident() == self._thread:
            self._task = asyncio.current_task(self._loop)
        self._masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def _resume_parent(self) -> None:
        if threading.get_ident() == self._thread:
            self._task = None
        self._unblock()

    def _unblock(self) -> None:
        if (mask := self._masks.pop(threading.get_ident(), None)) is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _isolate_copy(self) -> None:
        global _copy
        try:
            if not _copy:
                _copy = True
                _fastpath.end_copies(_end_copy)
                self._restore_signals()
                self._replace_descriptors()
                self._expect_return()
                _forget_threads()
            self._put_on_leash()
        finally:
            self._unblock()

    def _restore_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        faulthandler.disable()
        faulthandler.unregister(self._dump)
        for number, handler in self._plain.items():
            if signal.getsignal(number) == self._ours[number]:  # else user code has set one
                signal.signal(number, handler)

    def _replace_descriptors(self) -> None:
        """Replace the worker's descriptors by a dead socket, under the same numbers."""
        epoll = -1 if self._loop is None else self._loop._get_backend_id()
        loops = () if self._loop is None else (self._loop, *self._others)
        sockets = [part.fileno() for loop in loops for part in _loop_parts(loop) if isinstance(part, socket.socket)]
        ours = [fd for fd in (*self._descriptors, *open_descriptors(), *slot_descriptors(), *sockets) if fd >= 0]
        with contextlib.suppress(OSError):
            os.close(ours.pop(0))  # no object uses it; frees a number, also in a worker that had reached its limit
        with contextlib.suppress(OSError):
            with socket.socket(socket.AF_UNIX) as dead:
                for fd in ours:
                    os.dup2(dead.fileno(), fd, inheritable=False)
            if epoll >= 0:  # it is shared: a change in the copy would change the worker's
                with select.epoll() as fresh:
                    os.dup2(fresh.fileno(), epoll, inheritable=False)

    def _put_on_leash(self) -> None:
        """Ask the kernel for SIGTERM when the worker is gone. Linux only, and only where /proc is mounted."""
        with contextlib.suppress(OSError, AttributeError):
            if _file_identity(self._leash) != self._leash_is:
                return  # the copy has closed all descriptors, and forks again
            leash = os.open(f"/proc/self/fd/{self._leash}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGTERM)
            fcntl.fcntl(leash, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            if not os.read(leash, 1):  # the worker is gone already
                os.kill(os.getpid(), signal.SIGTERM)

    def _expect_return(self) -> None:
        """End the copy when its code yields to the loop, before the loop runs anything else."""
        if self._loop is None or threading.get_ident() != self._thread:
            return  # the loop's thread is not in the copy
        self._loop.call_soon(_end_task, self._task)
        for part in _loop_parts(self._loop):
            if type(part) is deque:
                part.rotate(1)


def _forget_threads() -> None:
    """Forget the threads of executors, which `multiprocessing` would wait for at the end of the copy.

    None of them exists there, except the one that has forked, and that cannot wait for itself.
    """
    getattr(sys.modules["concurrent.futures.thread"], "_threads_queues", {}).clear()


def end_if_copy(error: BaseException | None) -> None:
    """End this process with `error`, if a step has forked it and it comes back to the worker's code."""
    if _copy:
        _end_copy(error)


def called_in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call the function of a step in a thread. A process that it forks ends with the call, since it has no executor."""
    try:
        result = function(*args)
    except BaseException as error:
        end_if_copy(error)
        raise
    end_if_copy(None)
    return result


def _end_task(task: Any) -> NoReturn:
    """End a copy that has yielded to the loop: with the error of its task, unless the task is suspended."""
    _end_copy(task.exception() if task is not None and task.done() and not task.cancelled() else None)


def _end_copy(error: BaseException | None) -> NoReturn:
    """Exit as Python does: with the code of `sys.exit`, or 1 and a traceback. No atexit handler of the worker runs."""
    code: Any = 0
    try:
        if isinstance(error, SystemExit):
            code = error.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        elif error is not None:
            code = 1
            sys.excepthook(type(error), error, error.__traceback__)
        else:
            hint = "its outcome is discarded; end a process that os.fork() makes by os._exit()"
            log.warning("fork.returned", pid=os.getpid(), hint=hint)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
    finally:
        os._exit(code & 0xFF)


def _loop_parts(loop: Any) -> list[Any]:
    """Return the objects inside an event loop, including the sockets that wake it and the queue of ready handles."""
    return [*gc.get_referents(loop), *getattr(loop, "__dict__", {}).values()]


def _file_identity(fd: int) -> tuple[int, int]:
    """Return the device and inode of a descriptor."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
