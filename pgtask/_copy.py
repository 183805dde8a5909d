"""The steps and items that `enqueue_many` reads."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any

from pgtask.errors import EnqueueError
from pgtask.outcome import Enqueue
from pgtask.task import Task

__all__ = ["Source"]


class Source:
    """The caller's iterable, plain or async, with the key of each step.

    `error` keeps the exception of the caller's code: on its way through a COPY it would look like one of the database.
    """

    def __init__(
        self, steps: Iterable[Task | Enqueue] | AsyncIterable[Task | Enqueue], key: Callable[[Any], str] | None
    ) -> None:
        if not isinstance(steps, (Iterable, AsyncIterable)):
            raise EnqueueError(f"enqueue_many() takes an iterable of steps, not {steps!r:.80}")
        self._steps = steps
        self._key = key
        self.error: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[tuple[Task | Enqueue, str | None]]:
        try:
            if isinstance(self._steps, AsyncIterable):
                async for step in self._steps:
                    yield step, self._key and self._key(step)
            else:
                for step in self._steps:
                    yield step, None if self._key is None else self._key(step)
        except Exception as error:
            self.error = error
            raise
