"""A client in C that does next to nothing: scripts for `pgbench`, run under the session settings of a worker.

Invariants: a client of pgbench runs the script in turns; its variables outlive a turn, so it prepares its statements
once, and idles once a turn has found nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from bench.harness.process import ProcessResult, run_measured
from pgtask._postgres.embedded import binary
from pgtask._postgres.store import HOT_SETTINGS, statement
from pgtask._worker.lanes import FLOOR_SLACK

__all__ = ["PREPARE_CLAIM", "pgbench_version", "prepare", "run_script", "turn_script"]

# pgbench knows no arrays and keeps one row of a result. So the ids come back as the text of an array, and the steps
# too, since a worker receives them as well. The token of the next claim comes along, which saves a round trip.
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


def pgbench_version() -> str:
    return subprocess.run([binary("pgbench"), "--version"], capture_output=True, text=True, check=True).stdout.strip()


def turn_script(prepare: str, take: str, write: str) -> str:
    """Return the script of one turn of a client: it takes `:n` tasks and, if there are any, writes."""
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


def prepare(name: str, sql: str) -> str:
    """Return the line that prepares a statement."""
    return f"PREPARE {name} AS {_one_line(sql)};"


def _one_line(sql: str) -> str:
    return " ".join(re.sub(r"--.*", "", sql).split())


PREPARE_CLAIM = "\n".join(
    [
        prepare("claim", _CLAIM.format(claim=_one_line(statement("claim")), slack=FLOOR_SLACK)),
        "SELECT gen_random_uuid() AS token, 0 AS floor \\gset",
    ]
)
"""The lines that prepare the claim of pgtask, and its first token and floor."""


def run_script(script: str, *, dsn: str, directory: Path, clients: int, turns: int, timeout: float) -> ProcessResult:
    """Run a script to its end, with so many clients and at most so many turns of each."""
    path = directory / "script.sql"
    path.write_text(script)
    command = [
        *(str(binary("pgbench")), "--no-vacuum", "--protocol=simple", f"--file={path}", f"--transactions={turns}"),
        *(f"--client={clients}", f"--jobs={clients}", "--define=over=0", "--define=first=1", dsn),
    ]
    options = " ".join(f"-c {name}={value}" for name, value in HOT_SETTINGS.items())
    return run_measured(command, directory=directory, env=os.environ | {"PGOPTIONS": options}, timeout=timeout)
