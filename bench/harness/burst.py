"""Bursts of short tasks, with an observer that may disturb their workers.

Invariants: each task that finishes writes a row in the same transaction, so the bench sees a task that is lost or has
taken effect twice; the commit times of these rows are the times of the work.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import asyncpg
import msgspec

from bench.harness.contender import RunFailed
from bench.harness.observers import Observer
from bench.harness.process import kill_tree
from bench.harness.server import Server
from bench.harness.supervisor import clean_environment, supervisor_command
from bench.workloads.bursts import Begin, Segfault
from pgtask import Client, Task

__all__ = ["BurstResult", "run_burst", "run_chains"]

_BYTES_OF_ROW = 44.3  # in `finished`: the size of the table gives the progress, without a count
_POLL_INTERVAL = 0.01
_TIMEOUT = 900.0

_FINISHED = """
CREATE TABLE finished (task uuid);
CREATE FUNCTION finish() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO finished SELECT id FROM deleted; RETURN NULL; END';
CREATE TRIGGER finish AFTER DELETE ON pg_task REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION finish();
"""
_COMMITS = """
SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 AS at, count(*) AS tasks
FROM finished GROUP BY xmin ORDER BY at
"""


class BurstResult(msgspec.Struct, frozen=True):
    """Result of a burst. `commits`: the time of each commit, and the number of tasks that it finished. `errors`: of the
    parked tasks."""

    commits: list[tuple[float, int]]
    lost: int
    doubled: int
    errors: list[str]


def run_chains(
    server: Server, tasks: int, procs: int, observer: Observer, *, poisons: int = 0, code: int = 0
) -> BurstResult:
    """Run a burst of tasks of three steps, with the poisons in the middle of them. Raises as `run_burst`."""
    steps: list[Task] = [Begin(number) for number in range(tasks - poisons)]
    steps[len(steps) // 2 : len(steps) // 2] = [Segfault()] * poisons
    return run_burst(server, steps, procs, observer, code=code)


def run_burst(
    server: Server, steps: list[Task], procs: int, observer: Observer, *, concurrency: int = 100, code: int = 0
) -> BurstResult:
    """Run a burst of one task for each of `steps`.

    Raises `RunFailed` if the supervisor exits with another code than `code`, or if a task has lost a try.
    """
    tasks = len(steps)
    with server.fresh_database() as database, tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        dsn = server.database(database)
        asyncio.run(_fill(dsn, steps))
        _supervise(dsn, procs, concurrency, observer, Path(directory), code)
        finished, distinct = server.query("SELECT count(*), count(DISTINCT task) FROM finished", dsn=dsn)[0]
        left = server.query("SELECT error, tried FROM pg_task", dsn=dsn)
        # The steps have no retries, so a task that has lost a try is parked and still in the table.
        if tried := [row["tried"] for row in left if row["tried"]]:
            raise RunFailed(f"{len(tried)} tasks have lost a try")
        commits = [(row["at"], row["tasks"]) for row in server.query(_COMMITS, dsn=dsn)]
        errors = [row["error"] for row in left if row["error"] is not None]
        return BurstResult(commits, tasks - distinct - len(left), finished - distinct, errors)


async def _fill(dsn: str, steps: list[Task]) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(_FINISHED)
    await connection.close()
    async with Client(dsn) as client:
        await client.enqueue_many(steps)


def _supervise(dsn: str, procs: int, concurrency: int, observer: Observer, directory: Path, code: int) -> None:
    """Run a supervisor to its end, and let the observer read its log and intervene meanwhile."""
    process = subprocess.Popen(
        supervisor_command(dsn, procs, "--burst", "--concurrency", str(concurrency), app="bench.workloads.bursts:app"),
        cwd=directory,
        env=clean_environment(directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    observer.pid = process.pid
    reader = threading.Thread(target=observer.read_log, args=(process.stderr,))
    reader.start()
    try:
        asyncio.run(_follow(dsn, process, observer))
        if (exit_code := process.wait(60)) != code:
            raise RunFailed(f"exit code {exit_code} of the supervisor")
    finally:
        kill_tree(process)
        reader.join()
        process.stderr.close()


async def _follow(dsn: str, process: subprocess.Popen[bytes], observer: Observer) -> None:
    """Tell the observer how many tasks are finished, until the supervisor has exited."""
    connection = await asyncpg.connect(dsn)
    deadline = time.monotonic() + _TIMEOUT
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise RunFailed(f"the burst did not end within {_TIMEOUT:g} s")
            observer.intervene(await connection.fetchval("SELECT pg_relation_size('finished')") / _BYTES_OF_ROW)
            await asyncio.sleep(_POLL_INTERVAL)
    finally:
        await connection.close()
