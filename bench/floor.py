"""The C floor: what Postgres itself gives, asked by `pgbench`, a client that does next to nothing.

Invariants: the statements are those of pgtask, word for word, read from its SQL files and prepared under the same
session settings; one claim and then one flush for each step of a batch, each in a transaction and a round trip of its
own, as a worker does it; as many connections as there are worker processes, on the same table with the same triggers.
"""

from __future__ import annotations

import os
import re
import subprocess

from bench.contender import Arena, Effort, OnOurTable, Skipped
from bench.process import run_measured
from bench.workloads import Workload
from pgtask import Task
from pgtask._fastpath import Codec, Outcomes
from pgtask._postgres.embedded import binary
from pgtask._postgres.store import HOT_SETTINGS, statement
from pgtask._worker.claim import FLOOR_SLACK
from pgtask.config import Config
from pgtask.task import family_of

__all__ = ["Floor", "Minimum", "envelope"]

# pgbench knows no arrays and keeps one row of a result: the ids come back as the text of an array, and so does the
# payload, since a worker is sent it as well. The token of the next claim comes along, to save a round trip.
_CLAIM = """
WITH claimed (id, step, tried, claims, size, due) AS ({claim})
SELECT count(*) AS n,
       coalesce(array_agg(id), '{{}}') AS ids,
       array_fill($4::uuid, ARRAY[count(*)::integer]) AS tokens,
       coalesce(array_agg(step), '{{}}') AS steps,
       gen_random_uuid() AS token,
       coalesce(max(due) - {slack}, 0) AS floor
FROM claimed
"""

_MINIMUM = """
WITH gone AS (
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
FROM gone
"""


class Floor(OnOurTable):
    name = "floor"
    about = "the claim and the flush of pgtask, word for word, by pgbench"

    def prepare(self, workload: Workload) -> str:
        if not workload.is_idle:
            raise Skipped(f"it runs no steps, and those of {workload.name} do something")
        return _version()

    def drain(self, arena: Arena) -> Effort:
        return _drain(arena, _floor_script(arena))


class Minimum(OnOurTable):
    name = "minimum"
    about = "lock and delete a batch in one statement, by pgbench: no lease, nothing to recover"

    def prepare(self, workload: Workload) -> str:
        if workload.later or not workload.is_idle:
            raise Skipped(f"it knows no steps, as {workload.name} has them")
        return _version()

    def drain(self, arena: Arena) -> Effort:
        return _drain(arena, _script(_prepare("gone", _MINIMUM), f"EXECUTE gone({arena.batch}) \\gset", ""))


def _version() -> str:
    return subprocess.run([binary("pgbench"), "--version"], capture_output=True, text=True, check=True).stdout.strip()


def _floor_script(arena: Arena) -> str:
    config = Config()
    held = f"{config.lease_timeout:g}, {config.max_step_bytes}"
    take = f"EXECUTE claim('default', 0, {arena.batch}, ':token', {held}, :floor) \\gset"
    prepare = [
        _prepare("claim", _CLAIM.format(claim=_plain(statement("claim")), slack=FLOOR_SLACK)),
        _prepare("flush", statement("flush")),
        "SELECT gen_random_uuid() AS token, 0 AS floor \\gset",
    ]
    flushes = []
    for number, step in enumerate(arena.workload.later):
        prepare.append(f"SELECT array_fill('{envelope(step)}'::text, ARRAY[{arena.batch}]) AS later{number} \\gset")
        flushes.append(_flush(next_steps=f"later{number}"))
    return _script("\n".join(prepare), take, "\n".join([*flushes, _flush()]))


def _flush(*, next_steps: str | None = None) -> str:
    """Write the batch as done, or as going on with the steps in that variable."""
    outcomes = Outcomes()
    filled = (
        ((outcomes.done_ids, "ids"), (outcomes.done_tokens, "tokens"))
        if next_steps is None
        else ((outcomes.kept_ids, "ids"), (outcomes.kept_tokens, "tokens"), (outcomes.kept_steps, next_steps))
    )
    variables = {id(column): f"':{name}'" for column, name in filled}
    arguments = [
        variables.get(id(column), "'{}'") if isinstance(column, list) else "false" for column in outcomes.parameters()
    ]
    return f"EXECUTE flush({', '.join(arguments)});"


def _script(prepare: str, take: str, write: str) -> str:
    """One turn of a client. Its variables outlive the turn: it prepares once, and is idle once the table is empty."""
    return f"""\\if :over
\\else
\\if :first
\\set first 0
{prepare}
\\endif
{take}
\\if :n > 0
{write}
\\else
\\set over 1
\\endif
\\endif
"""


def _prepare(name: str, sql: str) -> str:
    return f"PREPARE {name} AS {_plain(sql)};"


def _plain(sql: str) -> str:
    return " ".join(re.sub(r"--.*", "", sql).split())


def envelope(step: Task) -> str:
    """The text of a row that waits at this step."""
    family = family_of(type(step))
    assert family is not None
    return Codec(type(step), family.__name__, type(step).__name__, False).encode(step)


def _drain(arena: Arena, script: str) -> Effort:
    path = arena.directory / "script.sql"
    path.write_text(script)
    turns = -(-arena.tasks // arena.batch) + 2  # enough for one client to do it all
    command = [
        *(str(binary("pgbench")), "--no-vacuum", "--protocol=simple", f"--file={path}", f"--transactions={turns}"),
        *(f"--client={arena.procs}", f"--jobs={arena.procs}", "--define=over=0", "--define=first=1", arena.dsn),
    ]
    options = " ".join(f"-c {name}={value}" for name, value in HOT_SETTINGS.items())
    ended = run_measured(
        command, directory=arena.directory, env=os.environ | {"PGOPTIONS": options}, timeout=arena.timeout
    )
    return Effort(
        began_at=ended.began_at,
        seconds=ended.seconds,
        cpu_seconds=ended.cpu_seconds,
        tree_cpu_seconds=ended.cpu_seconds,
    )
