"""gauges: note twice a second, in the page of a worker, what it holds, how it is, and how late its loop is.

The counters of the page are written where something is counted. This is the part that only a look from time to time can
give. It exists only if there are metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pgtask._fastpath import CounterPage
from pgtask._worker.pipeline import Pipeline

__all__ = ["Gauges"]

INTERVAL = 0.5  # seconds


class Gauges:
    """Writes `page` for the worker of `pipeline`, which takes tasks if it `is_ready`."""

    def __init__(self, page: CounterPage, pipeline: Pipeline, *, is_ready: Callable[[], bool]) -> None:
        self._page = page
        self._pipeline = pipeline
        self._is_ready = is_ready
        self._busy = 0.0

    async def run(self) -> None:
        """Note the state until cancelled."""
        while True:
            self.note()
            due = time.monotonic() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self._page.note_lag(time.monotonic() - due)

    def note(self) -> None:
        """Note the state now."""
        page, pipeline, dispatch = self._page, self._pipeline, self._pipeline.dispatch
        if (read := pipeline.database_clock) is not None:
            page.note_clock(*read)
        page.note_busy(dispatch.busy - self._busy)
        self._busy = dispatch.busy
        page.note_state(
            pipeline.held,
            dispatch.suspended,
            dispatch.waiting,
            pipeline.unwritten,
            is_ready=self._is_ready() and pipeline.leaving is None,
            is_connected=pipeline.link.is_open,
            is_listening=pipeline.wake is None or pipeline.wake.is_listening,
            is_renewing=not pipeline.renew.is_failing,
        )
