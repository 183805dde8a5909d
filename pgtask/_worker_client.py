"""The client that a worker gives to its steps: a `Client` on the pool of `ctx.db`, with no connection of its own.

Invariant: the pool belongs to the worker. A step that closes the client closes nothing.
"""

from __future__ import annotations

from typing import Any, Self

from pgtask.app import App
from pgtask.client import Client
from pgtask.config import Config

__all__ = ["WorkerClient"]


class WorkerClient(Client):
    """A client that is open for as long as its worker works. `async with`, `open` and `close` change nothing."""

    def __init__(self, pool: Any, config: Config, app: App) -> None:
        super().__init__(config.dsn, app=app, max_step_bytes=config.max_step_bytes)
        self._postgres.use_pool(pool, self.dsn, listens=config.listen)

    async def open(self) -> Self:
        return self

    async def close(self) -> None:
        pass

    async def end(self) -> None:
        """Close the connection that waits for results, if there is one. For the worker, at its end."""
        await self._postgres.close()
