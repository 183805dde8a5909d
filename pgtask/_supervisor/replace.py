"""Workers that are to make way for fresh ones: on HUP all of them, and whoever is over a limit.

Theory of operation. One at a time: the replacement is started, on trial; when it has been ready for a little while, the
old worker is told to drain; when that is gone, it is the next one's turn. So there are never fewer workers ready than
before, unless one dies, and never more processes than one above their number. What cannot replace, or does not last, is
dropped: the old worker just goes on.

Invariant: of an order to reload, each worker of before is replaced or gone, or `reload.failed` says why not; a second
order starts over, since the code may have changed in between.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pgtask._events import log_event
from pgtask._supervisor.states import State
from pgtask._supervisor.worker import Worker

__all__ = ["Replacements"]

log = logging.getLogger("pgtask.supervisor")

REST = 30.0  # seconds without a further try after a replacement for a worn worker did not start
_RUNS = (State.STARTING, State.READY)


class Replacements:
    """`start` makes a worker on trial with a number; `stop` tells one to leave."""

    def __init__(self, start: Callable[[int], Worker], stop: Callable[[Worker], None]) -> None:
        self._start, self._stop = start, stop
        self._queue: deque[tuple[Worker, str, dict[str, Any]]] = deque()
        self._now: tuple[Worker, Worker, str, dict[str, Any]] | None = None
        self._told = False
        self._reload: tuple[str, float] | None = None
        self._replaced = 0
        self._rests_until = 0.0

    def reload(self, workers: Iterable[Worker], cause: str) -> None:
        """Replace all of them. Those that are between two processes get the fresh code anyway."""
        if self._now and self._now[1].slot.trial:
            self._stop(self._now[1])
        self._queue = deque((worker, cause, {}) for worker in workers if not worker.leaves)
        self._replaced = 0
        self._reload = (cause, time.monotonic())
        log_event(log, logging.INFO, "reload.started", cause=cause, workers=len(self._queue))

    def recycle(self, worker: Worker, cause: str, **fields: Any) -> None:
        """Replace one, unless that is under way or was of no use just now."""
        known = [entry[0] for entry in self._queue] + ([self._now[0]] if self._now else [])
        if worker not in known and worker.stays and time.monotonic() >= self._rests_until:
            self._queue.append((worker, cause, fields))

    def cancel(self) -> None:
        """The whole supervisor stops."""
        self._queue.clear()
        self._now = self._reload = None

    def concerns(self, worker: Worker) -> bool:
        return self._now is not None and worker in self._now[:2]

    def failed(self, new: Worker, message: str) -> None:
        """It did not get ready, or did not last. What fails for one fails for the others."""
        if self._now is None or new is not self._now[1]:
            log_event(log, logging.ERROR, "worker.not_added", worker=new.number, error=message)
            return
        cause = self._now[2]
        if self._reload and cause == self._reload[0]:
            hint = "the other workers go on with the code of before" if self._replaced else "the old workers go on"
            log_event(
                log, logging.ERROR, "reload.failed", cause=cause, error=message, replaced=self._replaced, hint=hint
            )
            self._reload = None
            self._queue.clear()
            return
        self._rests_until = time.monotonic() + REST
        log_event(
            log, logging.ERROR, "worker.not_replaced", worker=new.number, cause=cause, error=message, again_in=REST
        )

    def advance(self) -> None:
        """Do what can be done now; to be called whenever something has happened."""
        if self._now and self._is_under_way(*self._now):
            return
        self._now = None
        while self._queue:
            old, cause, fields = self._queue.popleft()
            if old.slot.state in _RUNS:
                self._now = (old, self._start(old.number), cause, fields)
                self._told = False
                return
        if self._reload:
            cause, began = self._reload
            self._reload = None
            log_event(log, logging.INFO, "reload.done", cause=cause, seconds=round(time.monotonic() - began, 3))

    def _is_under_way(self, old: Worker, new: Worker, cause: str, fields: dict[str, Any]) -> bool:
        if not self._told and new.slot.state is State.READY and not new.slot.trial:
            self._told = True
            self._replaced += 1
            about: dict[str, Any] = {"worker": old.number, "pid": old.pid, "by": new.pid, "cause": cause, **fields}
            log_event(log, logging.INFO, "worker.replaced", **about)
            self._stop(old)
        leaving = old if self._told else new
        return leaving.slot.state is not State.GONE
