"""dispatch: run the steps that are ready, and gather what comes of them.

Invariants: at most `concurrency` steps are suspended at once; an error of one step stays its own. What is done for each
task is `Dispatcher` in `_fastpath`; here is what is slow or rare: threads, texts of errors, logs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pgtask._events import log_event
from pgtask._fastpath import Dispatcher, Lease, Leases, Marks, Table
from pgtask._postgres.connection import is_connection_loss
from pgtask._worker.error_text import describe
from pgtask.task import Context, Task

__all__ = ["Dispatch"]

log = logging.getLogger("pgtask.dispatch")


class Dispatch(Dispatcher):
    """The dispatcher of one worker. `wake` is called when there is something to flush or room to claim; `broke` when
    the engine itself has failed."""

    def __init__(
        self,
        table: Table,
        leases: Leases,
        *,
        concurrency: int,
        max_step_bytes: int,
        marks: Marks | None = None,
        wake: Callable[[], None],
        unknown: Callable[[str], float | None],
        broke: Callable[[BaseException], None],
    ) -> None:
        super().__init__(
            asyncio.get_running_loop(),
            table,
            leases,
            concurrency=concurrency,
            max_step_bytes=max_step_bytes,
            marks=marks,
        )
        self.threads = ThreadPoolExecutor(concurrency, thread_name_prefix="pgtask-step")
        self._loop = asyncio.get_running_loop()
        self._wake = wake
        self._unknown = unknown
        self._broke = broke
        self._said: dict[str, float] = {}  # when the last failure of a step was logged

    def wake(self) -> None:
        self._wake()

    def unknown(self, name: str) -> float | None:
        return self._unknown(name)

    def broke(self, error: BaseException) -> None:
        self._broke(error)

    def describe(self, error: BaseException | str) -> str:
        return describe(error)

    def interrupted(self, error: BaseException) -> bool:
        return is_connection_loss(error)

    def failed(self, lease: Lease, error: BaseException, delay: float, tried: int) -> None:
        """A try has failed and will be repeated: said once a second for each step, however many there are."""
        now = time.monotonic()
        if loud := now - self._said.get(lease.label, 0.0) >= 1:
            self._said[lease.label] = now
        elif not log.isEnabledFor(logging.DEBUG):
            return
        words = describe(error).partition("\n")[0][:200]
        fields: dict[str, Any] = {
            "task": lease.id,
            "step": lease.label,
            "tried": tried,
            "retry": f"in {delay:.3g} s",
        }
        log_event(log, logging.WARNING if loud else logging.DEBUG, "step.failed", **fields, error=words)

    def parked(self, lease: Lease, text: str) -> None:
        log_event(
            log, logging.WARNING, "task.parked", task=lease.id, step=lease.label, error=text.partition("\n")[0][:200]
        )

    def start_thread(self, lease: Lease, run: Callable[[Task, Context], Any], context: Context) -> None:
        future = self.threads.submit(self.context.copy().run, run, lease.step, context)
        future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._end_thread, lease, done))

    def _end_thread(self, lease: Lease, future: Any) -> None:
        try:
            error = future.exception()
            self.end(lease, None if error is not None else future.result(), error)
        except BaseException as broken:  # nobody else would hear of it, and the slot would stay taken
            self._broke(broken)

    def close(self) -> None:
        """Take no more threads; those still running are left to themselves."""
        self.threads.shutdown(wait=False, cancel_futures=True)
