"""Kill workers at random while they work: `python -m bench.crashes --kills 200 --tasks 300000`.

Two bursts over the same tasks of three steps, the second with kills spread over its progress. Says what was lost (a
task that is neither finished nor in the table), what took effect twice, how long each handover took, from the kill to
the line that says that the leases are given back, and how the throughput compares. Exit code 1 if something was lost,
doubled or parked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import asyncpg
import msgspec

from pgtask import App, Client, Context, Done, Next, Task
from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate


class Chain(Task):
    """Three steps that do nothing."""


class First(Chain):
    number: int

    async def run(self, ctx: Context) -> Next[Second]:
        return Next(Second(self.number))


class Second(Chain):
    number: int

    async def run(self, ctx: Context) -> Next[Third]:
        await asyncio.sleep(0)  # so that there is always something suspended
        return Next(Third(self.number))


class Third(Chain):
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


app = App(Chain)

ROW = 44.3  # bytes of a row of `finished`: its size says without counting how far the work has come

_FINISHED = """
CREATE TABLE finished (task uuid);
CREATE FUNCTION finish() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO finished SELECT id FROM gone; RETURN NULL; END';
CREATE TRIGGER finish AFTER DELETE ON pg_task REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION finish();
"""


class Outcome(msgspec.Struct):
    """Of one burst; `handovers` in seconds."""

    seconds: float
    lost: int
    doubled: int
    parked: int
    handovers: list[float]


class Burst:
    """A supervisor and what it says."""

    def __init__(self, dsn: str, procs: int) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pgtask._cli.supervisor", "bench.crashes:app", "--burst"),
                *("--procs", str(procs), "--dsn", dsn),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._ready: set[int] = set()
        self._handed_over: dict[int, float] = {}
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,))
        self._reader.start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if found := re.search(r"(worker\.ready|worker\.died|leases\.released) .*?pid=(\d+)", line):
                event, pid = found[1], int(found[2])
                if event == "worker.ready":
                    self._ready.add(pid)
                elif event == "worker.died":
                    self._ready.discard(pid)
                else:
                    self._handed_over[pid] = time.monotonic()

    async def kill_at_random(self, dsn: str, chance: random.Random, tasks: int, kills: int) -> list[float]:
        """Kill a worker each time when another share of the tasks is finished; the times of the handovers."""
        took: dict[int, float] = {}
        connection = await asyncpg.connect(dsn)
        while len(took) < kills and self._process.poll() is None:
            size = await connection.fetchval("SELECT pg_relation_size('finished')")
            ready = sorted(self._ready - took.keys())
            if ready and size >= len(took) / kills * tasks * ROW:
                pid = chance.choice(ready)
                took[pid] = time.monotonic()
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
        await connection.close()
        self._process.wait()
        self._reader.join()
        return [self._handed_over[pid] - at for pid, at in took.items() if pid in self._handed_over]


async def _fill(dsn: str, tasks: int) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("DROP TABLE IF EXISTS finished; DROP FUNCTION IF EXISTS finish CASCADE; TRUNCATE pg_task")
    await connection.execute(_FINISHED)
    await connection.close()
    async with Client(dsn) as client:
        await client.enqueue_many(First(number) for number in range(tasks))


async def _count(dsn: str, tasks: int) -> tuple[int, int, int]:
    connection = await asyncpg.connect(dsn)
    finished, distinct = await connection.fetchrow("SELECT count(*), count(DISTINCT task) FROM finished")
    left, parked = await connection.fetchrow("SELECT count(*), count(error) FROM pg_task")
    await connection.close()
    return tasks - distinct - left, finished - distinct, parked


def burst(dsn: str, tasks: int, procs: int, kills: int) -> Outcome:
    asyncio.run(_fill(dsn, tasks))
    began = time.monotonic()
    handovers = asyncio.run(Burst(dsn, procs).kill_at_random(dsn, random.Random(1), tasks, kills))
    seconds = time.monotonic() - began
    return Outcome(seconds, *asyncio.run(_count(dsn, tasks)), handovers)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.crashes")
    parser.add_argument("--tasks", type=int, default=300_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--procs", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pgtask-crashes-") as directory:
        dsn = embedded.start(Path(directory))
        try:
            asyncio.run(migrate(dsn))
            quiet = burst(dsn, arguments.tasks, arguments.procs, 0)
            stormy = burst(dsn, arguments.tasks, arguments.procs, arguments.kills)
        finally:
            embedded.stop(Path(directory))
    return _report(sys.stdout, arguments.tasks, quiet, stormy)


def _report(out: IO[str], tasks: int, quiet: Outcome, stormy: Outcome) -> int:
    took = sorted(stormy.handovers) or [0.0]
    print(f"tasks      {tasks:,} of 3 steps; {len(stormy.handovers)} workers killed", file=out)
    print(f"lost       {stormy.lost}, doubled {stormy.doubled}, parked {stormy.parked}", file=out)
    print(f"handover   median {statistics.median(took) * 1000:.0f} ms, longest {took[-1] * 1000:.0f} ms", file=out)
    print(f"seconds    {quiet.seconds:.1f} undisturbed, {stormy.seconds:.1f} with the kills", file=out)
    print(f"throughput {quiet.seconds / stormy.seconds:.2f} of the undisturbed run", file=out)
    return 1 if stormy.lost or stormy.doubled or stormy.parked else 0


if __name__ == "__main__":
    sys.exit(main())
