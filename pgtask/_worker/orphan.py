"""orphan: a worker whose supervisor is gone leaves within two seconds: whoever starts a new one expects no old worker.

Invariant: that does not depend on the loop: a thread sees to it, so a step or an import that blocks is ended as well.
But a thread needs the interpreter: a call into C that does not let go of it, as of a regular expression that backtracks
for ever, keeps its process until it returns.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time

from pgtask._events import log_event

__all__ = ["GRACE", "end_with_parent"]

log = logging.getLogger("pgtask.worker")

GRACE = 0.5  # seconds for the steps that run; then they are cancelled, and their tasks given back
LIMIT = 1.5  # seconds until the process ends


def end_with_parent(parent_fd: int) -> None:
    """From now on this process does not outlive its parent for long; `parent_fd` reads EOF when that is gone."""
    threading.Thread(target=_end_after, args=(parent_fd,), name="pgtask-orphan", daemon=True).start()


def _end_after(parent_fd: int) -> None:
    parent = select.poll()
    parent.register(parent_fd, select.POLLIN)
    parent.poll()
    time.sleep(LIMIT)
    log_event(log, logging.WARNING, "worker.overdue", pid=os.getpid())
    os._exit(1)
