"""parent_watch: a worker without a supervisor exits within two seconds, so that a new supervisor meets no old workers.

Invariant: a thread ends the process, not the loop, so it also ends during a step or an import that blocks. But a thread
needs the interpreter lock: a call into C that never releases it, such as a regular expression that backtracks forever,
keeps its process until it returns.
"""

from __future__ import annotations

import os
import select
import threading
import time

from pgtask._log import EventLog
from pgtask._worker.at_exit import end_children

__all__ = ["GRACE", "exit_with_parent"]

log = EventLog("pgtask.worker")

GRACE = 0.5  # seconds for the steps that run; then they are cancelled, and their tasks released
EXIT_AFTER = 1.5  # seconds after the end of the parent


def exit_with_parent(parent_fd: int) -> None:
    """Start a thread that ends this process soon after its parent; `parent_fd` reads EOF when the parent is gone."""
    threading.Thread(target=_exit_after, args=(parent_fd,), name="pgtask-parent-watch", daemon=True).start()


def _exit_after(parent_fd: int) -> None:
    parent = select.poll()
    parent.register(parent_fd, select.POLLIN)
    parent.poll()
    time.sleep(EXIT_AFTER)
    log.warning("worker.overdue", pid=os.getpid())
    end_children()
    os._exit(1)
