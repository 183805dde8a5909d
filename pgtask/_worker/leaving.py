"""The end of a worker: cancel what still runs, write the last outcomes, and release the rest.

Invariants: it lasts no longer than 2 * `UNWIND`; a lease that it could not release expires, or is released by the
supervisor, and the log says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pgtask._fastpath import Leases, Outcomes
from pgtask._log import EventLog
from pgtask._postgres.writer import Aside
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.flush import Flush

__all__ = ["UNWIND", "cancel_steps", "release_leases"]

log = EventLog("pgtask.pipeline")

UNWIND = 1.5  # seconds for cancelled steps to clean up, and then for the last outcomes to be written


async def cancel_steps(leases: Leases, dispatch: Dispatch, work: asyncio.Event, *, lease_timeout: float) -> None:
    """Cancel the steps that still run, and wait until they have ended, for `UNWIND` seconds at most."""
    try:
        async with asyncio.timeout(UNWIND):
            for lease in leases.list_open():
                dispatch.cancel_step(lease)
            while dispatch.suspended:
                work.clear()
                await work.wait()
    except TimeoutError:
        ready = f"when the supervisor has released their leases, within {lease_timeout:g} s at the latest"
        log.warning("steps.abandoned", steps=dispatch.suspended, ready=ready)


async def release_leases(
    leases: Leases, dispatch: Dispatch, flush: Flush, aside: Aside, write: Callable[[Outcomes], Awaitable[None]]
) -> None:
    """Write the last outcomes with `write`, and release the leases, for `UNWIND` seconds at most."""
    try:
        async with asyncio.timeout(UNWIND):
            # No step can start now: release the unstarted leases and let the running ones expire.
            await write(dispatch.take_outcomes())
            await aside.settle()
            kept = flush.take_continuing() + flush.take_returned()
            unused = leases.list_unstarted()
            await flush.release(kept + unused + flush.take_releasable(before=float("inf")))
            abandoned = flush.locked + flush.blocked
    except TimeoutError:
        abandoned = len(leases)
    if abandoned:
        log.warning("leases.abandoned", leases=abandoned)
    flush.log_suppressed()
