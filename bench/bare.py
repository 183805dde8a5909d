"""What the query of a step costs by itself: as many coroutines and connections as the steps of a worker have, and no
task. Run as a program it is N such processes.

Invariant: the pool is the one that steps get as `ctx.db`, of the same size.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time

import msgspec
import uvloop

from bench.contender import Arena, Effort, OnOurTable, Skipped
from bench.ours import environment
from bench.process import run_measured
from bench.workloads import WORKLOADS, WRITE, Workload
from pgtask._postgres.pools import user_pool
from pgtask.config import Config

__all__ = ["Bare"]


class Bare(OnOurTable):
    name = "bare"
    about = "the query of each step alone: asyncpg, as many at once as a worker has steps under way, no task"
    left = "SELECT 0"
    settle: tuple[str, ...] = ()

    def prepare(self, workload: Workload) -> str:
        if workload.query is None:
            raise Skipped(f"the steps of {workload.name} have no query")
        return "asyncpg"

    def fill(self, arena: Arena) -> float | None:
        if arena.workload.setup:
            asyncio.run(_execute(arena.dsn, arena.workload.setup))
        return None

    def drain(self, arena: Arena) -> Effort:
        ended = run_measured(
            [sys.executable, "-m", "bench.bare", arena.dsn, str(arena.tasks), str(arena.procs), arena.workload.name],
            directory=arena.directory,
            env=environment(arena.directory),
            timeout=arena.timeout,
        )
        spans = msgspec.json.decode(ended.stdout, type=list[tuple[float, float, float]])
        return Effort(
            began_at=ended.began_at,
            seconds=ended.seconds,
            cpu_seconds=sum(cpu for _, _, cpu in spans),
            tree_cpu_seconds=ended.cpu_seconds,
            window=max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans),
        )


async def _execute(dsn: str, sql: str) -> None:
    async with user_pool(dsn, size=1) as pool:
        await pool.execute(sql)


def _process(dsn: str, tasks: int, query: str) -> tuple[float, float, float]:
    """When the first query began and the last one ended, and the CPU seconds between."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_queries(dsn, tasks, query))


async def _queries(dsn: str, tasks: int, query: str) -> tuple[float, float, float]:
    config = Config()
    numbers = iter(range(tasks))

    async def one_after_the_other(pool: object) -> None:
        execute, fetchval = pool.execute, pool.fetchval  # type: ignore[attr-defined]
        for number in numbers:
            await (execute(query, number) if query == WRITE else fetchval(query))

    async with user_pool(dsn, size=config.pool_size) as pool:
        await asyncio.gather(*(pool.fetchval("SELECT 0") for _ in range(config.pool_size)))  # they are connected now
        began, cpu = time.time(), time.process_time()
        await asyncio.gather(*(one_after_the_other(pool) for _ in range(config.concurrency)))
        return began, time.time(), time.process_time() - cpu


def _main() -> None:
    dsn, tasks, procs, workload = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), WORKLOADS[sys.argv[4]]
    assert workload.query is not None
    shares = [tasks // procs + (place < tasks % procs) for place in range(procs)]
    with multiprocessing.get_context("fork").Pool(procs) as pool:
        spans = pool.starmap(_process, [(dsn, share, workload.query) for share in shares], chunksize=1)
    print(msgspec.json.encode(spans).decode())


if __name__ == "__main__":
    _main()
