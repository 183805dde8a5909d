"""The threads behind `asyncio.to_thread` in the steps of a worker.

Invariant: an `await` on one of their futures returns, also if the thread raised StopIteration. Without this module such
an `await` waits forever (before Python 3.11.8 and 3.12.2).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pgtask._workflow.steps import STOP_ITERATION

__all__ = ["ToThreadExecutor"]


class ToThreadExecutor(ThreadPoolExecutor):
    """The default executor of a worker's event loop."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        return super().submit(_replace_stop_iteration, function, *args, **options)


def _replace_stop_iteration(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except StopIteration as error:
        raise RuntimeError(STOP_ITERATION) from error
