"""The C floor: the rate of Postgres itself, driven by `pgbench`, a client that does next to nothing.

Invariants: the statements are those of pgtask, word for word, read from its SQL files and prepared under the same
session settings; one claim and then one flush for each step of a batch, each in a transaction and a round trip of its
own, as a worker does it; as many connections as worker processes, on the same table with the same triggers.
"""

from __future__ import annotations

from bench.contenders.table import TableContender
from bench.harness.contender import Arena, ContenderSkipped, Effort
from bench.harness.fill import encode_step
from bench.harness.pgbench import PREPARE_CLAIM, pgbench_version, prepare, run_script, turn_script
from bench.workloads.workload import Workload
from pgtask._fastpath import Outcomes
from pgtask._postgres.store import statement
from pgtask.config import Config

__all__ = ["Floor", "Minimum"]

_MINIMUM = """
WITH deleted AS (
    DELETE FROM pg_task
    WHERE id = ANY (ARRAY (
        SELECT id
        FROM pg_task
        WHERE queue = 'default'
          AND priority = 0
          AND wakeup_at <= now()
          AND locked_by IS NULL
          AND error IS NULL
        ORDER BY wakeup_at
        LIMIT $1
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING id, step
)
SELECT count(*) AS n, coalesce(array_agg(step), '{}') AS steps
FROM deleted
"""


class Floor(TableContender):
    """The statements of pgtask without its engine."""

    name = "floor"
    about = "the claim and the flush of pgtask, word for word, by pgbench"

    def prepare(self, workload: Workload) -> str:
        if not workload.is_idle:
            raise ContenderSkipped(f"it runs no steps, and those of {workload.name} do something")
        return pgbench_version()

    def drain(self, arena: Arena) -> Effort:
        return _drain(arena, _floor_script(arena))


class Minimum(TableContender):
    """The cheapest statement that could drain the table."""

    name = "minimum"
    about = "lock and delete a batch in one statement, by pgbench: no lease, nothing to recover"

    def prepare(self, workload: Workload) -> str:
        if workload.later or not workload.is_idle:
            raise ContenderSkipped(f"it knows no steps, as {workload.name} has them")
        return pgbench_version()

    def drain(self, arena: Arena) -> Effort:
        return _drain(arena, turn_script(prepare("take", _MINIMUM), f"EXECUTE take({arena.batch}) \\gset", ""))


def _floor_script(arena: Arena) -> str:
    config = Config()
    held = f"{config.lease_timeout:g}, {config.max_step_bytes}"
    take = f"EXECUTE claim('default', 0, {arena.batch}, ':token', {held}, :floor) \\gset"
    lines = [PREPARE_CLAIM, prepare("flush", statement("flush"))]
    flushes = []
    for number, step in enumerate(arena.workload.later):
        lines.append(f"SELECT array_fill('{encode_step(step)}'::text, ARRAY[{arena.batch}]) AS later{number} \\gset")
        flushes.append(_flush(next_steps=f"later{number}", position=number + 1))
    return turn_script("\n".join(lines), take, "\n".join([*flushes, _flush()]))


def _flush(*, next_steps: str | None = None, position: int = 0) -> str:
    """Return the flush of a batch that is done, or that continues with the steps in this variable."""
    empty = Outcomes().parameters(position)
    arguments = ["'{}'" if isinstance(value, list) else str(value).lower() for value in empty]
    filled = ("ids", "tokens") if next_steps is None else ("ids", "tokens", next_steps)
    begin = 0 if next_steps is None else 2  # the columns of `done`, or those of `continued` behind them
    arguments[begin : begin + len(filled)] = [f"':{name}'" for name in filled]
    return f"EXECUTE flush({', '.join(arguments)});"


def _drain(arena: Arena, script: str) -> Effort:
    turns = -(-arena.tasks // arena.batch) + 2  # enough for one client to drain the table alone
    result = run_script(
        script, dsn=arena.dsn, directory=arena.directory, clients=arena.procs, turns=turns, timeout=arena.timeout
    )
    return Effort(
        began_at=result.began_at,
        seconds=result.seconds,
        cpu_seconds=result.cpu_seconds,
        tree_cpu_seconds=result.cpu_seconds,
    )
