"""Tasks written to `pg_task` by the bench itself: runnable ones, and dead weight that no worker may claim."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from bench.harness.process import run_measured
from bench.harness.server import Server
from bench.harness.supervisor import clean_environment, supervisor_command
from bench.workloads.workflows import sleeper
from bench.workloads.workload import WORKLOADS
from pgtask import Client, Task
from pgtask._fastpath import Codec
from pgtask.task import family_of

__all__ = ["DEAD_WEIGHT", "encode_step", "fill_by_sql", "fill_dead_weight"]

DEAD_WEIGHT = ("future", "parked", "leased", "sleeping")


def encode_step(step: Task) -> str:
    """Return the text of a row that waits at this step."""
    family = family_of(type(step))
    assert family is not None
    return Codec(type(step), family.__name__, type(step).__name__, False).encode(step)


def fill_by_sql(server: Server, dsn: str, tasks: int, columns: str = "", values: str = "") -> None:
    """Insert no-op tasks in one statement. `columns` and `values` (SQL, with `n` for the number of the task) set more
    columns."""
    if not tasks:
        return
    step = encode_step(WORKLOADS["noop"].make(100_000)).replace("'", "''")
    names, rest = ("step", f"'{step}'") if not columns else (f"step, {columns}", f"'{step}', {values}")
    server.query(f"INSERT INTO pg_task ({names}) SELECT {rest} FROM generate_series(1, {tasks}) AS n", dsn=dsn)


def fill_dead_weight(server: Server, dsn: str, weight: dict[str, int]) -> None:
    """Insert tasks that no worker may run now: due in the future, parked, leased by a worker elsewhere, or runs of a
    workflow that sleep."""
    # First: a burst puts them to sleep, and it would wait for the leases.
    if sleeping := weight.get("sleeping", 0):
        _fill_sleeping(dsn, sleeping)
    fill_by_sql(server, dsn, weight.get("future", 0), "wakeup_at", "now() + interval '1 day' + n * interval '1 ms'")
    fill_by_sql(server, dsn, weight.get("parked", 0), "error, tried", "'it went wrong', 5")
    fill_by_sql(
        server,
        dsn,
        weight.get("leased", 0),
        "locked_by, lock_expires_at, claims",
        "'00000000-0000-4000-8000-000000000001', now() + interval '1 day', 1",
    )
    server.query("VACUUM (ANALYZE) pg_task", dsn=dsn)
    server.query("CHECKPOINT", dsn=dsn)


def _fill_sleeping(dsn: str, runs: int) -> None:
    """Trigger runs that sleep for a day, and let workers put each of them to sleep."""

    async def trigger() -> None:
        async with Client(dsn) as client:
            await client.trigger_many(sleeper, [None] * runs)

    asyncio.run(trigger())
    with tempfile.TemporaryDirectory(prefix="pgtask-bench-") as name:
        directory = Path(name)
        command = supervisor_command(dsn, 2, "--burst", "--burst-horizon", "0")
        run_measured(command, directory=directory, env=clean_environment(directory), timeout=600)
