"""Whether the app can be loaded, found out before a server is started for it: in a process of its own, since the
supervisor runs no user code.

Invariants: that process is gone when the check is over, and soon after us if we are killed; the check waits for nothing
else that an import may leave behind.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time

from pgtask._events import log_event
from pgtask._place import one_line
from pgtask._supervisor.fork import fork
from pgtask._supervisor.source import import_app
from pgtask._supervisor.worker import signal_name
from pgtask.errors import AppLoadError

__all__ = ["check_app"]

log = logging.getLogger("pgtask.supervisor")

LOOK_EVERY = 50  # milliseconds between two looks whether it has ended without a word
LOADED = "loaded"


def check_app(reference: str, *, patience: float) -> None:
    """Load the app in a child, for `patience` seconds at most; 0 is for ever. The child ends with us, whatever ends us.

    Raises `AppLoadError`, also if the import takes longer, or ends the process; and OSError when there is no room for a
    process or a pipe.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody is told how a child has ended
    reader, writer = os.pipe()
    lifeline, ours = os.pipe()
    try:
        pid = fork("pgtask checks", lambda: _import(reference, writer, lifeline), close=[reader, ours])
        flaw = _flaw(reader, pid, patience)
    finally:
        for fd in (reader, writer, lifeline, ours):
            os.close(fd)
    if flaw:
        raise AppLoadError(flaw if flaw.startswith("app ") else f"app {reference!r}: {flaw}")


def _import(reference: str, writer: int, lifeline: int) -> int:
    """In the child. The verdict is one write, which fits the pipe whole: LOADED, or what is wrong."""
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    verdict = LOADED
    try:
        import_app(reference)
    except BaseException as error:
        log_event(log, logging.DEBUG, "app.failed", exc_info=error)
        verdict = str(error) if isinstance(error, AppLoadError) else f"importing it failed: {one_line(error)}"
    os.write(writer, verdict.encode("utf-8", "replace")[: select.PIPE_BUF])
    return 0


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


def _flaw(reader: int, pid: int, patience: float) -> str:
    """What is wrong with the app, empty if nothing is; the child is gone afterwards."""
    said = select.poll()
    said.register(reader, select.POLLIN)
    deadline = time.monotonic() + (patience or float("inf"))
    code: int | None = None
    try:
        # Its end is not seen in the pipe: that may be held by a process which the import has started.
        while (code := _exit_code(pid)) is None and not said.poll(LOOK_EVERY):
            if time.monotonic() >= deadline:
                return f"importing it took longer than {patience:g} s (see --stall)"
    finally:
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if said.poll(0):
        verdict = os.read(reader, select.PIPE_BUF).decode("utf-8", "replace")
        return "" if verdict == LOADED else verdict
    assert code is not None
    return f"importing it ended the process, by {signal_name(code) if code < 0 else f'exit code {code}'}"


def _exit_code(pid: int) -> int | None:
    """None while it lives. It is reaped, so this must not be asked again."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None
