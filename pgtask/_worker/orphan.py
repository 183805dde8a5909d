"""orphan: a worker whose supervisor is gone leaves within two seconds: whoever starts a new one expects no old worker.

Invariant: that does not depend on user code: a thread sees to it, so a step or an import that blocks is ended as well.
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
