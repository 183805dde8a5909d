"""A time limit for code that may wait, sleep or compute, in the main thread of a program.

Invariant: only code that runs in a task of the loop is interrupted, never the loop itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from types import FrameType

__all__ = ["OutOfTime", "time_limit"]


class OutOfTime(BaseException):
    """Raised in code that has taken longer than its limit; not an `Exception`, so that `except Exception` lets it
    pass."""


@contextlib.asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """Raise `OutOfTime` in code that takes longer: where it awaits, and in the main thread also where it does not."""
    try:
        async with asyncio.timeout(seconds) as limit:
            with _alarm(seconds):
                yield
    except (TimeoutError, asyncio.CancelledError):
        if not limit.expired():
            raise
        raise OutOfTime from None


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _interrupt)
    # Again and again: the code may catch it, or the loop may have been at work.
    signal.setitimer(signal.ITIMER_REAL, seconds * 1.1 + 0.05, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(RuntimeError):  # no loop runs
        if asyncio.current_task() is not None:
            raise OutOfTime
