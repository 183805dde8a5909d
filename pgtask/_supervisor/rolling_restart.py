"""The rolling restart: replaces all workers on HUP, and single workers over a limit.

Theory of operation. One at a time: the replacement starts, on trial; when it has been ready for half a second, the old
worker is told to drain; when that has ended, the next worker's turn comes. So never fewer workers are ready than
before, unless one dies, and never more than one process above their number runs. A replacement that does not start, or
does not last, is dropped: the old worker stays.

Invariant: after an order to reload, each old worker is replaced or gone, or `reload.failed` says why not; a second
order starts over, since the code may have changed in between.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pgtask._log import EventLog
from pgtask._supervisor.slot import SupervisedWorker
from pgtask._supervisor.states import State

__all__ = ["RollingRestart"]

log = EventLog("pgtask.supervisor")

RETRY_PAUSE = 30.0  # seconds without a further try after a replacement for a worker over a limit did not start
_RUNNING = (State.STARTING, State.READY)


class RollingRestart:
    """The queue of workers to replace. `start` adds a worker on trial with a number; `stop` tells one to drain."""

    def __init__(self, start: Callable[[int], SupervisedWorker], stop: Callable[[SupervisedWorker], None]) -> None:
        self._start, self._stop = start, stop
        self._queue: deque[tuple[SupervisedWorker, str, dict[str, Any]]] = deque()
        self._current: tuple[SupervisedWorker, SupervisedWorker, str, dict[str, Any]] | None = None
        self._old_stopped = False
        self._reload: tuple[str, float] | None = None
        self._replaced = 0
        self._paused_until = 0.0

    def reload(self, workers: Iterable[SupervisedWorker], cause: str) -> None:
        """Replace all of them. A worker between two processes starts with the fresh code anyway."""
        if self._current and self._current[1].slot.trial:
            self._stop(self._current[1])
        self._queue = deque((worker, cause, {}) for worker in workers if not worker.leaves)
        self._replaced = 0
        self._reload = (cause, time.monotonic())
        log.info("reload.started", cause=cause, workers=len(self._queue))

    def recycle(self, worker: SupervisedWorker, cause: str, **fields: Any) -> None:
        """Replace one worker, unless its replacement is under way or failed within `RETRY_PAUSE`."""
        known = [entry[0] for entry in self._queue] + ([self._current[0]] if self._current else [])
        if worker not in known and worker.stays and time.monotonic() >= self._paused_until:
            self._queue.append((worker, cause, fields))

    def cancel(self) -> None:
        """Replace none: the whole supervisor stops."""
        self._queue.clear()
        self._current = self._reload = None

    def concerns(self, worker: SupervisedWorker) -> bool:
        """Tell if it is the worker being replaced, or the replacement."""
        return self._current is not None and worker in self._current[:2]

    def abort_replacement(self, new: SupervisedWorker, message: str) -> None:
        """Give up on a replacement that did not get ready or did not last, and on the others of its reload."""
        if self._current is None or new is not self._current[1]:
            log.error("worker.not_added", worker=new.number, error=message)
            return
        cause = self._current[2]
        if self._reload and cause == self._reload[0]:
            kept = "the remaining workers keep running the old code"
            hint = kept if self._replaced else "the old workers keep running"
            log.error("reload.failed", cause=cause, error=message, replaced=self._replaced, hint=hint)
            self._reload = None
            self._queue.clear()
            return
        self._paused_until = time.monotonic() + RETRY_PAUSE
        log.error("worker.not_replaced", worker=new.number, cause=cause, error=message, again_in=RETRY_PAUSE)

    def advance(self) -> None:
        """Take the next step that is possible. Call it after every event."""
        if self._current and self._advance_current(*self._current):
            return
        self._current = None
        while self._queue:
            old, cause, fields = self._queue.popleft()
            if old.slot.state in _RUNNING:
                self._current = (old, self._start(old.number), cause, fields)
                self._old_stopped = False
                return
        if self._reload:
            cause, began = self._reload
            self._reload = None
            log.info("reload.done", cause=cause, seconds=round(time.monotonic() - began, 3))

    def _advance_current(
        self, old: SupervisedWorker, new: SupervisedWorker, cause: str, fields: dict[str, Any]
    ) -> bool:
        """Stop the old worker once the new one has settled; return True while the replacement is under way."""
        if not self._old_stopped and new.slot.state is State.READY and not new.slot.trial:
            self._old_stopped = True
            self._replaced += 1
            about: dict[str, Any] = {"worker": old.number, "pid": old.pid, "by": new.pid, "cause": cause, **fields}
            log.info("worker.replaced", **about)
            self._stop(old)
        leaving = old if self._old_stopped else new
        return leaving.slot.state is not State.GONE
