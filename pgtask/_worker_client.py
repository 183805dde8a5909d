"""The client that a worker gives to its steps: a `Client` on the pool of `ctx.db`, with no connection of its own.

Invariant: the pool belongs to the worker. A step that closes the client closes nothing.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from pgtask.app import App
from pgtask.client import Client
from pgtask.config import Config

__all__ = ["WorkerClient"]


class WorkerClient(Client):
    """A client that is open for as long as its worker works. `async with` changes nothing."""

    def __init__(self, pool: Any, config: Config, app: App) -> None:
        super().__init__(config.dsn, app=app, max_step_bytes=config.max_step_bytes)
        self._postgres.use_pool(pool, self.dsn, listens=config.listen)

    async def __aenter__(self) -> WorkerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    async def close(self) -> None:
        """Close the connection that waits for results, if there is one. For the worker, at its end."""
        await self._postgres.close()
