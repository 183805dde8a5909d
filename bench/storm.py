"""Bursts of three-step tasks, and what is done to their workers meanwhile: nothing, kills, reloads.

Invariants: each task that finishes writes a row in the same transaction, so a task that is lost, or has taken effect
twice, shows; the commit times of these rows are the times of the work.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import asyncpg
import msgspec

from bench.contender import RunFailed
from bench.ours import environment
from bench.process import kill_tree
from bench.server import Server
from pgtask import App, Client, Context, Done, Next, Task

__all__ = ["Burst", "Killing", "Reloading", "Span", "Watching", "burst"]

Span = tuple[float, float]

_BYTES_OF_ROW = 44.3  # in `finished`: its size says how far the work has come, without counting
_POLL = 0.01
_TIMEOUT = 900.0

_FINISHED = """
CREATE TABLE finished (task uuid);
CREATE FUNCTION finish() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO finished SELECT id FROM gone; RETURN NULL; END';
CREATE TRIGGER finish AFTER DELETE ON pg_task REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION finish();
"""
_COMMITS = """
SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 AS at, count(*) AS tasks
FROM finished GROUP BY xmin ORDER BY at
"""


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


class Poison(Task):
    """The end of its process."""


class Segfault(Poison):
    async def run(self, ctx: Context) -> Done:
        ctypes.string_at(0)
        return Done()


app = App(Chain, Poison)


# --- what is done to the workers


class Watching:
    """Does nothing; keeps what the supervisor has said, and when."""

    def __init__(self) -> None:
        self.said: list[tuple[float, str, dict[str, Any]]] = []
        self.pid = 0

    def count(self, event: str) -> int:
        return sum(1 for _, said, _ in self.said if said == event)

    def times(self, event: str) -> list[float]:
        return [at for at, said, _ in self.said if said == event]

    def read(self, lines: IO[bytes]) -> None:
        for line in lines:
            if line.startswith(b"{"):
                said = json.loads(line)
                self.hear(time.time(), said["event"], said.get("fields") or {})

    def hear(self, at: float, event: str, fields: dict[str, Any]) -> None:
        self.said.append((at, event, fields))

    def act(self, finished: float) -> None:
        """About that many tasks are finished."""


class Killing(Watching):
    """SIGKILL for a ready worker, whenever another random share of the work is done."""

    def __init__(self, tasks: int, kills: int, *, seed: int) -> None:
        super().__init__()
        self._chance = random.Random(seed)
        self._due = sorted(self._chance.uniform(0.02, 0.95) * tasks for _ in range(kills))
        self._ready: dict[int, int] = {}  # by process: the number of the worker
        self._killed: dict[int, tuple[float, int]] = {}

    def hear(self, at: float, event: str, fields: dict[str, Any]) -> None:
        super().hear(at, event, fields)
        if event == "worker.ready":
            self._ready[fields["pid"]] = fields["worker"]
        elif event in ("worker.died", "worker.gone"):
            self._ready.pop(fields["pid"], None)

    def act(self, finished: float) -> None:
        ready = sorted(self._ready.keys() - self._killed.keys())
        if ready and self._due and finished >= self._due[0]:
            pid = self._chance.choice(ready)
            self._killed[pid] = time.time(), self._ready[pid]
            os.kill(pid, signal.SIGKILL)
            del self._due[0]

    def spans(self) -> tuple[list[Span], list[Span]]:
        """From each kill until the leases were given back, and until another worker was ready in its place."""
        handovers, restarts = [], []
        released = {fields["pid"]: at for at, event, fields in self.said if event == "leases.released"}
        ready = [(at, fields["worker"]) for at, event, fields in self.said if event == "worker.ready"]
        for pid, (killed, number) in self._killed.items():
            if pid not in released:
                raise RunFailed(f"the leases of worker {pid} were not given back")
            handovers.append((killed, released[pid]))
            restarts.append((killed, min((at for at, who in ready if who == number and at > killed), default=1e12)))
        return handovers, restarts


class Reloading(Watching):
    """SIGHUP, and another one as soon as all workers are replaced, until the work comes to its end."""

    def __init__(self, tasks: int, procs: int) -> None:
        super().__init__()
        self._tasks, self._procs = tasks, procs
        self._asked = 0

    def act(self, finished: float) -> None:
        if 0.1 < finished / self._tasks < 0.8 and self.count("reload.done") == self._asked:
            self._asked += 1
            os.kill(self.pid, signal.SIGHUP)

    @property
    def spans(self) -> list[Span]:
        return list(zip(self.times("reload.started"), self.times("reload.done"), strict=False))

    @property
    def least_ready(self) -> int:
        ready, least = 0, self._procs
        for _, event, _ in self.said:
            if event == "worker.ready":
                ready += 1
            elif event in ("worker.replaced", "worker.died"):
                ready -= 1
                least = min(least, ready)
        return least


# --- a burst


class Burst(msgspec.Struct, frozen=True):
    commits: list[tuple[float, int]]
    lost: int
    doubled: int
    errors: list[str]


def burst(server: Server, tasks: int, procs: int, part: Watching, *, poisons: int = 0, code: int = 0) -> Burst:
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)
        asyncio.run(_fill(dsn, tasks - poisons, poisons))
        _supervise(server, dsn, procs, part, Path(directory), code)
        finished, distinct = server.query("SELECT count(*), count(DISTINCT task) FROM finished", dsn=dsn)[0]
        left = server.query("SELECT error, tried FROM pg_task", dsn=dsn)
        # The steps have no retries: whoever was charged with a try is parked, and so is still here.
        if tried := [row["tried"] for row in left if row["tried"]]:
            raise RunFailed(f"{len(tried)} tasks have been charged with a try")
        commits = [(row["at"], row["tasks"]) for row in server.query(_COMMITS, dsn=dsn)]
        errors = [row["error"] for row in left if row["error"] is not None]
        return Burst(commits, tasks - distinct - len(left), finished - distinct, errors)


async def _fill(dsn: str, tasks: int, poisons: int) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(_FINISHED)
    await connection.close()
    steps: list[Task] = [First(number) for number in range(tasks)]
    steps[tasks // 2 : tasks // 2] = [Segfault()] * poisons
    async with Client(dsn) as client:
        await client.enqueue_many(steps)


def _supervise(server: Server, dsn: str, procs: int, part: Watching, directory: Path, code: int) -> None:
    """Run a burst to its end, with `part` at work beside it."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pgtask._cli.supervisor", "bench.storm:app", "--burst", "--log", "json"),
            *("--procs", str(procs), "--dsn", dsn),
        ],
        cwd=directory,
        env=environment(directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    part.pid = process.pid
    reader = threading.Thread(target=part.read, args=(process.stderr,))
    reader.start()
    try:
        asyncio.run(_act(dsn, process, part))
        if (ended := process.wait(60)) != code:
            raise RunFailed(f"exit code {ended} of the supervisor")
    finally:
        kill_tree(process)
        reader.join()
        process.stderr.close()


async def _act(dsn: str, process: subprocess.Popen[bytes], part: Watching) -> None:
    connection = await asyncpg.connect(dsn)
    deadline = time.monotonic() + _TIMEOUT
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise RunFailed(f"the burst did not end within {_TIMEOUT:g} s")
            part.act(await connection.fetchval("SELECT pg_relation_size('finished')") / _BYTES_OF_ROW)
            await asyncio.sleep(_POLL)
    finally:
        await connection.close()
