"""A check that the app can be loaded, before an embedded server starts for it.

It runs in a process of its own, since the supervisor runs no user code.

Invariants: that process is gone when the check returns, and soon after us if we are killed; the check does not wait for
processes that the import leaves behind.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from pgtask._app_import import import_app
from pgtask._error_text import one_line
from pgtask._log import EventLog
from pgtask._supervisor.death import signal_name
from pgtask._supervisor.fork import fork
from pgtask.errors import AppLoadError

__all__ = ["check_app"]

log = EventLog("pgtask.supervisor")

POLL_INTERVAL = 50  # milliseconds between two checks for an end without a result
LOADED = "loaded"


def check_app(reference: str, *, timeout: float) -> None:
    """Load the app in a child, for `timeout` seconds at most; 0 is without limit. The child ends with us.

    Raises `AppLoadError`, also if the import takes longer, or ends the process; and OSError if the system has no
    process or pipe to spare.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # while it is ignored, the kernel discards the exit status of a child
    reader, writer = os.pipe()
    lifeline, ours = os.pipe()
    try:
        pid = fork("pgtask checks", lambda: _report_import(reference, writer, lifeline), close=[reader, ours])
        error = _await_result(reader, pid, timeout)
    finally:
        for fd in (reader, writer, lifeline, ours):
            os.close(fd)
    if error:
        raise AppLoadError(error if error.startswith("app ") else f"app {reference!r}: {error}")


def _report_import(reference: str, writer: int, lifeline: int) -> int:
    """Import the app in the child. The result is one write that fits the pipe: LOADED, or the error."""
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    result = LOADED
    try:
        import_app(reference)
    except BaseException as error:
        log.debug("app.failed", exc_info=error)
        result = str(error) if isinstance(error, AppLoadError) else f"importing it failed: {one_line(error)}"
    os.write(writer, result.encode("utf-8", "replace")[: select.PIPE_BUF])
    return 0


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


def _await_result(reader: int, pid: int, timeout: float) -> str:
    """Return the error of the import, empty if there is none, when the child is gone."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    deadline = time.monotonic() + (timeout or float("inf"))
    code: int | None = None
    try:
        # The pipe does not show the child's end: a process that the import has started may hold it open.
        while (code := _poll_exit_code(pid)) is None and not poll.poll(POLL_INTERVAL):
            if time.monotonic() >= deadline:
                return f"importing it took longer than {timeout:g} s (see --stall)"
    finally:
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if poll.poll(0):
        result = os.read(reader, select.PIPE_BUF).decode("utf-8", "replace")
        return "" if result == LOADED else result
    assert code is not None
    return f"importing it ended the process, by {signal_name(code) if code < 0 else f'exit code {code}'}"


def _poll_exit_code(pid: int) -> int | None:
    """Return None while the child lives. Otherwise the child is reaped, so do not ask again."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None
