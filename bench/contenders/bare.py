"""The query of a step by itself: as many coroutines and connections as the steps of a worker have, and no task. Where
the query is in a transaction with the outcome, that is BEGIN, the query, the DELETE of a row of pg_task, and COMMIT.

As a program, this module runs N such processes.

Invariant: the pool is the one that steps get as `ctx.db`, of the same size.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from itertools import pairwise
from typing import Any

import msgspec
import uvloop

from bench.contenders.table import TableContender
from bench.harness.contender import Arena, ContenderSkipped, Effort
from bench.harness.process import run_measured
from bench.harness.supervisor import clean_environment
from bench.workloads.steps import WRITE
from bench.workloads.workload import WORKLOADS, Workload
from pgtask._postgres.pools import user_pool
from pgtask.config import Config

__all__ = ["Bare"]

IDS = "SELECT id FROM pg_task ORDER BY id OFFSET $1 LIMIT $2"
DELETE = "DELETE FROM pg_task WHERE id = $1"


class Bare(TableContender):
    """The floor of the workloads whose steps send a query."""

    name = "bare"
    about = "the query of each step alone: asyncpg, as many at once as a worker has steps under way, no lease"
    left = "SELECT 0"
    settle: tuple[str, ...] = ()

    def prepare(self, workload: Workload) -> str:
        if workload.query is None:
            raise ContenderSkipped(f"the steps of {workload.name} have no query")
        return "asyncpg"

    def fill(self, arena: Arena) -> float | None:
        if arena.workload.is_transaction:
            return super().fill(arena)
        if arena.workload.setup:
            asyncio.run(_execute_once(arena.dsn, arena.workload.setup))
        return None

    def drain(self, arena: Arena) -> Effort:
        arguments = arena.dsn, str(arena.tasks), str(arena.procs), arena.workload.name
        result = run_measured(
            [sys.executable, "-m", "bench.contenders.bare", *arguments],
            directory=arena.directory,
            env=clean_environment(arena.directory),
            timeout=arena.timeout,
        )
        spans = msgspec.json.decode(result.stdout, type=list[tuple[float, float, float]])
        return Effort(
            began_at=result.began_at,
            seconds=result.seconds,
            cpu_seconds=sum(cpu for _, _, cpu in spans),
            tree_cpu_seconds=result.cpu_seconds,
            window=max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans),
        )


async def _execute_once(dsn: str, sql: str) -> None:
    async with user_pool(dsn, size=1) as pool:
        await pool.execute(sql)


def _run_process(dsn: str, first: int, tasks: int, workload: str) -> tuple[float, float, float]:
    """Return the time before the first query, the time after the last one, and the CPU seconds between."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run_queries(dsn, first, tasks, WORKLOADS[workload]))


async def _run_queries(dsn: str, first: int, tasks: int, workload: Workload) -> tuple[float, float, float]:
    config = Config()
    query = workload.query
    numbers = iter(range(tasks))

    async def run_in_turn(pool: Any) -> None:
        execute, fetchval = pool.execute, pool.fetchval
        for number in numbers:
            await (execute(query, number) if query == WRITE else fetchval(query))

    async def finish_in_turn(pool: Any) -> None:
        for number in numbers:
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(query, number)
                await connection.execute(DELETE, rows[number])

    async with user_pool(dsn, size=config.pool_size) as pool:
        await asyncio.gather(*(pool.fetchval("SELECT 0") for _ in range(config.pool_size)))  # connects all of them
        rows = [row[0] for row in await pool.fetch(IDS, first, tasks)] if workload.is_transaction else []
        run = finish_in_turn if workload.is_transaction else run_in_turn
        began, cpu = time.time(), time.process_time()
        await asyncio.gather(*(run(pool) for _ in range(config.concurrency)))
        return began, time.time(), time.process_time() - cpu


def _main() -> None:
    dsn, tasks, procs, workload = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    bounds = [tasks * place // procs for place in range(procs + 1)]
    shares = [(dsn, first, end - first, workload) for first, end in pairwise(bounds)]
    with multiprocessing.get_context("fork").Pool(procs) as pool:
        spans = pool.starmap(_run_process, shares, chunksize=1)
    print(msgspec.json.encode(spans).decode())


if __name__ == "__main__":
    _main()
