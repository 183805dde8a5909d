"""The client of the steps of one worker, `ctx.client`: made when a step first asks for it.

Invariant: only code on the worker's loop gets it, since its pool belongs to that loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pgtask.errors import EnqueueError

__all__ = ["StepClient"]


class StepClient:
    """Makes the client by `make`, once. Make this one on the worker's loop."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._client: Any = None
        self._loop = asyncio.get_running_loop()

    def get(self) -> Any:
        """Return the client. Raises `EnqueueError` in a thread."""
        try:
            is_ours = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_ours = False
        if not is_ours:
            raise EnqueueError(
                "ctx.client belongs to the worker's event loop, and this code runs in a thread: define the step by "
                "async def run, and call what blocks by asyncio.to_thread"
            )
        if self._client is None:
            self._client = self._make()
        return self._client

    async def close(self) -> None:
        """Close the client, if it was made."""
        if self._client is not None:
            await self._client.end()
