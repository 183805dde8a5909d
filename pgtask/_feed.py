"""The steps of a sync caller, for a call that runs on a loop in another thread.

Invariant: the caller's iterable and key function run in the caller's thread alone, and a bounded number of steps ahead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from itertools import islice
from queue import SimpleQueue
from typing import Any, TypeVar

from pgtask._loop_thread import LoopThread
from pgtask.outcome import Enqueue
from pgtask.task import Task

__all__ = ["Feed"]

T = TypeVar("T")
PORTION = 1000


class Feed:
    """Hands portions of an iterable over to the loop, when the loop asks for one."""

    def __init__(self, steps: Iterable[Task | Enqueue], key: Callable[[Any], str] | None) -> None:
        self._steps = steps
        self._key = key
        self._keys: deque[str] = deque()
        self._requests: SimpleQueue[asyncio.Future[Any] | None] = SimpleQueue()

    # --- on the loop

    async def steps(self) -> AsyncIterator[Task | Enqueue]:
        while True:
            portion: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._requests.put(portion)
            steps, keys = await portion
            if not steps:
                return
            self._keys.extend(keys)
            for step in steps:
                yield step

    def next_key(self, _step: object) -> str:
        """Return the key of the step that was yielded last."""
        return self._keys.popleft()

    # --- in the caller's thread

    def serve(self, thread: LoopThread, call: Coroutine[Any, Any, T]) -> T:
        """Start the call, hand it portions until it has ended, and return its result."""
        done = thread.begin(call)
        done.add_done_callback(lambda _: self._requests.put(None))
        steps = iter(self._steps)
        try:
            while (portion := self._requests.get()) is not None:
                thread.resolve(portion, *self._read(steps))
            return done.result()
        except BaseException:
            thread.cancel(done)
            raise

    def _read(self, steps: Any) -> tuple[Any, BaseException | None]:
        """Return a portion with its keys, or the exception that the caller's code has raised."""
        try:
            portion = list(islice(steps, PORTION))
            return (portion, [] if self._key is None else [self._key(step) for step in portion]), None
        except StopIteration as error:  # of the key function; a future takes none
            wrong = RuntimeError("the key function raised StopIteration")
            wrong.__cause__ = error
            return None, wrong
        except Exception as error:
            return None, error
