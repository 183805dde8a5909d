"""Closed and full output streams of both programs: one line, an exit code, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from uuid import UUID

import pytest
from apps import Noop
from fleet import Rows, put
from paths import PYTHONPATH

pytestmark = pytest.mark.timeout(60)

FULL = "cannot write to stdout: No space left on device"
CLOSED = "cannot write to stdout: Bad file descriptor"


def shell(line: str, dsn: str) -> subprocess.CompletedProcess[str]:
    """`line` in bash, where `pgtask` and `pgtask-supervisor` are what they would be."""
    words = {"PYTHONPATH": PYTHONPATH, "PGTASK_DSN": dsn, "PGTASK_APP": "apps:app"}
    functions = (
        f'pgtask() {{ {sys.executable} -m pgtask "$@"; }}; '
        f'pgtask-supervisor() {{ {sys.executable} -m pgtask._cli.supervisor --procs 1 "$@"; }}; '
    )
    return subprocess.run(
        ["bash", "-c", functions + line], env={**os.environ, **words}, capture_output=True, text=True, timeout=50
    )


@pytest.mark.parametrize("command", ["list", "list --json", "stats --json", "graph", "migrate --sql", "migrate"])
@pytest.mark.parametrize(("where", "words"), [(">&-", CLOSED), (">/dev/full", FULL)])
def test_unwritable_output_is_one_line(dsn: str, command: str, where: str, words: str) -> None:
    put(dsn, Noop())
    done = shell(f"pgtask {command} {where}", dsn)
    assert (done.returncode, done.stderr) == (74, f"pgtask: {words}\n")


@pytest.mark.parametrize(("where", "words"), [(">&-", CLOSED), (">/dev/full", FULL)])
def test_enqueue_with_unwritable_stdout_names_its_task(dsn: str, where: str, words: str) -> None:
    done = shell(f"pgtask enqueue Noop {where}", dsn)
    ((task,),) = Rows(dsn)("SELECT id FROM pg_task")
    assert (done.returncode, done.stderr) == (74, f"pgtask: task {task} is enqueued, but {words}\n")


def test_a_command_without_stderr_still_answers(dsn: str) -> None:
    done = shell("pgtask enqueue Noop 2>&-", dsn)
    assert done.returncode == 0
    assert Rows(dsn).value("SELECT count(*) FROM pg_task WHERE id = $1", UUID(done.stdout.strip())) == 1
    done = shell("pgtask list --state nonsense 2>&-", dsn)
    assert (done.returncode, done.stdout) == (2, ""), "what is said is not what was asked for"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("2>&-", ""),
        (">&-", ""),
        (">&- 2>&-", ""),
        ("<&- >&- 2>&-", ""),
        (">/dev/full", f"pgtask-supervisor: {FULL}\n"),
        ("2>/dev/full", ""),
        ("2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}", ""),
    ],
)
def test_burst_finishes_with_closed_or_full_streams(dsn: str, where: str, said: str) -> None:
    put(dsn, *(Noop() for _ in range(10)))
    done = shell(f"pgtask-supervisor --burst {where}", dsn)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert said in done.stderr
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0
    assert ("burst finished" in done.stdout) == (where in ("2>&-", "2>/dev/full"))


def test_closed_stream_is_never_replaced_by_a_socket(dsn: str) -> None:
    """The next descriptor that is opened would be a closed one's, and a step prints."""
    program = "from pgtask._cli.output import open_streams; import os, sys; open_streams(needs_stdout=False); "
    program += "print('said'); sys.stdout.flush(); sys.exit(os.open('/dev/null', os.O_RDONLY) < 3)"
    done = shell(f'{sys.executable} -c "{program}" <&- >&- 2>&-', dsn)
    assert done.returncode == 0
