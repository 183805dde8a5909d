"""The C floor of workflows: the statements of the journal, word for word, by `pgbench`.

Invariants: for each batch of runs a claim, a read of the histories, a statement for each checkpoint but the last, and
the end of the runs, which records that one; each in a transaction and a round trip of its own, as the journal does it
for runs in step; as many connections as worker processes; the rows are those that the workflow records.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from bench.harness.pgbench import PREPARE_CLAIM, prepare, run_script, turn_script
from pgtask._fastpath import Leases, TaskLease
from pgtask._postgres.store import statement
from pgtask._workflow.entries import EndRun, JournalEntry, RecordCheckpoint
from pgtask._workflow.values import Checkpoint
from pgtask.config import Config

__all__ = ["drain_by_pgbench"]

_TIMEOUT = 300.0


def drain_by_pgbench(dsn: str, *, runs: int, steps: Sequence[str], procs: int, batch: int) -> None:
    """End all runs, each with a checkpoint for each of `steps`."""
    with tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
        turns = -(-runs // batch) + 2  # enough for one client to drain the table alone
        script = _script(steps, batch)
        run_script(script, dsn=dsn, directory=Path(directory), clients=procs, turns=turns, timeout=_TIMEOUT)


def _script(steps: Sequence[str], batch: int) -> str:
    config = Config()
    held = f"{config.lease_timeout:g}, {config.max_step_bytes}"
    lines = [
        PREPARE_CLAIM,
        prepare("load", f"SELECT count(*) FROM ({statement('journal/load')}) AS history"),
        prepare("record", statement("journal/record")),
        prepare("end_runs", statement("journal/end")),
    ]
    take = f"EXECUTE claim('default', 0, {batch}, ':token', {held}, :floor) \\gset"
    return turn_script("\n".join(lines), take, "\n".join(["EXECUTE load(':ids', '{}');", *_writes(steps)]))


def _writes(steps: Sequence[str]) -> Iterator[str]:
    """Yield a call for each entry of a run, for all runs of a batch at once."""
    ((lease,), _) = Leases().add_claimed([(uuid4(), "", 0, 1, None)], uuid4(), 0.0)
    *first, last = [
        Checkpoint(number, str(number), "step", name, result="0", seconds=0.001) for number, name in enumerate(steps, 1)
    ]
    for checkpoint in first:
        yield _call("record", RecordCheckpoint(lease, checkpoint, 1 if checkpoint.number == 1 else None))
    yield _call("end_runs", EndRun(lease, version=1, output="0", checkpoints=[last]))


def _call(name: str, entry: JournalEntry[Any]) -> str:
    lease: TaskLease = entry.lease  # type: ignore[attr-defined]
    columns = type(entry).parameters([entry])
    return f"EXECUTE {name}({', '.join(_argument(column, lease) for column in columns)});"


def _argument(column: list[Any], lease: TaskLease) -> str:
    """Return a column for `:n` runs, out of that for one."""
    if not column:
        return "'{}'"
    if column[0] in (lease.id, lease.token):
        return "':ids'" if column[0] == lease.id else "':tokens'"
    if isinstance(column[0], str):
        return f"array_fill('{column[0]}'::text, ARRAY[:n])"
    return f"array_fill({str(column[0]).lower()}{'::float8' if isinstance(column[0], float) else ''}, ARRAY[:n])"
