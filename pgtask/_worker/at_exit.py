"""at_exit: the end of a Python program, in a process that ends by `os._exit`.

A worker cannot let the interpreter end: that waits without bound for threads, also for those of steps, and runs the
handlers that were registered before the fork. So a worker does the rest itself, after its lifespan and its last
message: it ends executors, and runs the handlers of atexit, including those of `multiprocessing` and
`weakref.finalize`.

Invariants: executors and child processes have the rest of the grace, then they are terminated; the process ends
`AFTER_GRACE` seconds after the grace, even if a handler blocks. It does not wait for threads of steps. Handlers that
were registered before the fork run in the process that registered them.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pgtask._log import EventLog

__all__ = ["AFTER_GRACE", "end_children", "end_program", "forget_inherited", "set_grace_end", "abandon_threads"]

log = EventLog("pgtask.worker")

AFTER_GRACE = 4.0  # seconds after the grace until the process ends
MIN_TIME = 0.5  # seconds for executors, also when the grace is over
LOG_TIME = 0.5  # seconds for the log line about an overdue end

_grace_end: float | None = None


def forget_inherited() -> None:
    """Drop the handlers that the parent has registered, also by the import of a preloaded app."""
    atexit._clear()
    finalize: Any = weakref.finalize
    for finalizer in list(finalize._registry):
        finalizer.atexit = False
    finalize._registered_with_atexit = False
    if (util := sys.modules.get("multiprocessing.util")) is not None:
        util._finalizer_registry.clear()
        sys.modules["multiprocessing.process"]._children.clear()
        atexit.register(util._exit_function)


def set_grace_end(at: float) -> None:
    """Set the end of this process's grace (monotonic seconds); the earliest of several counts."""
    global _grace_end
    _grace_end = at if _grace_end is None else min(_grace_end, at)


def abandon_threads(executors: Iterable[ThreadPoolExecutor]) -> None:
    """Let the program end without these executors' threads."""
    queues = getattr(sys.modules["concurrent.futures.thread"], "_threads_queues", {})
    for executor in executors:
        for thread in list(executor._threads):
            queues.pop(thread, None)


def end_program(code: int) -> None:
    """End executors and run atexit handlers. The process exits with `code` if that takes too long."""
    now = time.monotonic()
    grace_end = now if _grace_end is None else _grace_end
    patience, end = max(grace_end, now + MIN_TIME), grace_end + AFTER_GRACE
    over = threading.Event()
    threading.Thread(target=_enforce_end, args=(over, patience, end, code), daemon=True).start()
    _end_executors(patience)
    atexit._run_exitfuncs()
    over.set()


def _end_executors(until: float) -> None:
    """Let executors of threads and of processes finish their work, until `until`."""
    functions: list[Callable[[], Any]] = getattr(threading, "_threading_atexits", [])
    helpers = [threading.Thread(target=function, daemon=True) for function in reversed(functions)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join(max(0.0, until - time.monotonic()))


def end_children(*, kill: bool = False) -> None:
    """Terminate the remaining processes of `multiprocessing` and of executors; or `kill` them."""
    if (process := sys.modules.get("multiprocessing.process")) is not None:
        for child in process.active_children():
            (child.kill if kill else child.terminate)()


def _enforce_end(over: threading.Event, patience: float, end: float, code: int) -> None:
    """Terminate child processes after `patience`, and this process after `end`, unless it is `over` before."""
    if over.wait(max(0.0, patience - time.monotonic())):
        return
    end_children()
    if over.wait(max(0.0, end - time.monotonic())):
        return
    # In a thread of its own: the main thread may hold the lock of a log handler.
    helper = threading.Thread(target=_log_overdue, daemon=True)
    helper.start()
    helper.join(LOG_TIME)
    os._exit(code)


def _log_overdue() -> None:
    hint = "an atexit handler, an executor or a child process did not end within the grace"
    log.warning("exit.overdue", pid=os.getpid(), hint=hint)
    end_children(kill=True)
