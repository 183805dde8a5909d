"""The pool behind `ctx.db`, which detects that its users wait for each other.

A step that holds a connection and acquires one more waits until another step releases one. If such a waiting step holds
every connection, none is ever released, and the leases of those steps would be renewed without end.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from contextvars import ContextVar
from typing import Any

import asyncpg

from pgtask._postgres.connection import became_read_only
from pgtask.errors import PoolExhausted

__all__ = ["StepConnection", "StepPool"]

CHECK_INTERVAL = 1.0  # seconds in which another task may still release a connection that its owner has passed to it
MIN_IDLE_CHECKS = 5  # checks without a change, where an owner may do something else than wait for its children


class _Hold:
    """A connection in use by `task`, and so by the asyncio tasks that it starts meanwhile."""

    __slots__ = ("pool", "task", "waiting_children")

    def __init__(self, pool: StepPool, task: asyncio.Task[Any]) -> None:
        self.pool: StepPool | None = pool
        """None once it is released."""
        self.task = task
        self.waiting_children = 0


_holds: ContextVar[tuple[_Hold, ...]] = ContextVar("pgtask_holds", default=())
"""The holds of a task, and of the tasks that have started it; some may be released."""


class StepConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that can send more in the round trip of a BEGIN."""

    _added = ""

    def itself(self) -> StepConnection:
        """Return the connection behind a proxy of the pool, which forgets it once it is closed."""
        return self

    def add_to_begin(self, sql: str) -> None:
        """Append SQL to the next statement, which is the BEGIN of a transaction."""
        self._added = sql

    def execute(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        if self._added:
            query, self._added = query + self._added, ""
        return super().execute(query, *args, timeout=timeout)


class StepPool(asyncpg.Pool):  # type: ignore[misc]
    """An asyncpg pool whose `acquire` raises `PoolExhausted` when it could never succeed.

    It follows which asyncio task holds which connection, and the tasks that this task has started since. A task that
    holds none waits as for any pool.
    """

    def __init__(self, dsn: str, *, size: int, **options: Any) -> None:
        super().__init__(
            dsn,
            min_size=0,
            max_size=size,
            max_queries=50_000,
            max_inactive_connection_lifetime=300.0,
            loop=None,
            connection_class=StepConnection,
            record_class=asyncpg.Record,
            **options,
        )
        self._size = size
        self._in_use: dict[Any, _Hold] = {}
        self._waiting: Counter[asyncio.Task[Any]] = Counter()

    async def _acquire(self, timeout: float | None) -> Any:
        task = asyncio.current_task()
        assert task is not None
        holds = tuple(hold for hold in _holds.get() if hold.pool is self)
        self._waiting[task] += 1
        try:
            connection = await (self._acquire_another(timeout, holds) if holds else super()._acquire(timeout))
        finally:
            self._waiting[task] -= 1
            if not self._waiting[task]:
                del self._waiting[task]
        self._in_use[connection] = hold = _Hold(self, task)
        _holds.set((*(hold for hold in _holds.get() if hold.pool is not None), hold))
        return connection

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:
        """Release a connection, as `asyncpg.Pool.release` does; drop it if that is because it may not write."""
        if became_read_only(sys.exc_info()[1]):
            connection.terminate()
        if (hold := self._in_use.pop(connection, None)) is not None:
            hold.pool = None
        await super().release(connection, timeout=timeout)

    async def _acquire_another(self, timeout: float | None, holds: tuple[_Hold, ...]) -> Any:
        """Acquire for a task that holds a connection already, or that such a task has started. Raises
        `PoolExhausted`."""
        getting: asyncio.Task[Any] = asyncio.create_task(super()._acquire(timeout))
        for hold in holds:
            hold.waiting_children += 1
        try:
            before, times = list(self._in_use.values()), 0
            while not (await asyncio.wait([getting], timeout=CHECK_INTERVAL))[0]:
                now = list(self._in_use.values())
                before, times = now, times + 1 if now == before else 0
                if self._is_deadlocked(is_idle=times >= MIN_IDLE_CHECKS):
                    raise PoolExhausted(
                        f"all {self._size} connections of ctx.db are held by steps that each wait for one more; "
                        "use one connection in a step, or raise --pool-size above --concurrency"
                    )
        except BaseException:
            getting.cancel()
            getting.add_done_callback(self._return)
            raise
        finally:
            for hold in holds:
                hold.waiting_children -= 1
        return getting.result()

    def _is_deadlocked(self, *, is_idle: bool) -> bool:
        """Return whether the task of each connection waits for one more. A task whose children wait may itself be at
        work, so that counts only after a while in which no connection was acquired or released."""
        return len(self._in_use) >= self._size and all(
            hold.task in self._waiting or (is_idle and hold.waiting_children) for hold in self._in_use.values()
        )

    def _return(self, getting: asyncio.Task[Any]) -> None:
        """Release a connection that arrived after its task had given up."""
        if not getting.cancelled() and getting.exception() is None:
            self._returning = asyncio.ensure_future(super().release(getting.result()))
