"""Base of the contenders that drain our own table."""

from __future__ import annotations

import asyncio
import time

import asyncpg

from bench.harness.contender import Arena, Latency, RunFailed
from bench.harness.server import Server
from bench.workloads.workload import Workload
from pgtask import Client

__all__ = ["TableContender"]


class TableContender:
    """A contender that drains `pg_task`, which `enqueue_many` fills."""

    on_our_schema = True
    left = "SELECT count(*) FROM pg_task"
    settle: tuple[str, ...] = ("VACUUM (ANALYZE) pg_task",)
    max_tasks: int | None = None
    max_procs: int | None = None
    can_measure_latency = False

    def fill(self, arena: Arena) -> float | None:
        """Return tasks per second, from the call of `enqueue_many` to its return, the commit included."""
        return asyncio.run(_fill(arena.dsn, arena.workload, arena.tasks))

    def measure_latency(self, server: Server, *, procs: int, per_second: float, seconds: float) -> Latency:
        raise NotImplementedError


async def _fill(dsn: str, workload: Workload, tasks: int) -> float:
    if workload.setup:
        connection = await asyncpg.connect(dsn)
        await connection.execute(workload.setup)
        await connection.close()
    async with Client(dsn) as client:
        began = time.monotonic()
        ids = await client.enqueue_many(workload.make(number) for number in range(tasks))
        seconds = time.monotonic() - began
    if len(ids) != tasks:
        raise RunFailed(f"enqueue_many returned {len(ids)} ids for {tasks} tasks")
    return tasks / seconds
