"""The check that an app can be loaded before its embedded server starts: it ends, also if the import hangs or exits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from paths import REPOSITORY

PATIENCE = 45.0

SLOW = "import os, pathlib, time; pathlib.Path('importing').write_text(str(os.getpid())); time.sleep(60)"
LEAVES_A_PROCESS = """
import os, pathlib, time
if (pid := os.fork()) == 0:
    os.closerange(0, 3)
    time.sleep(60)
pathlib.Path('left').write_text(str(pid))
"""


@contextlib.contextmanager
def starting(source: str, *arguments: str, ignored: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Start a supervisor with the app `source`, in a process group of its own; end the whole group afterwards."""
    Path("some_app.py").write_text(source)
    command = [sys.executable, "-m", "pgtask._cli.supervisor", "some_app:app", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(ignored, signal.SIG_IGN)) if ignored else None,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def complaint(source: str, *arguments: str, ignored: int = 0) -> str:
    """Return the one line about an app that cannot be loaded, and check that nothing was created for it."""
    with starting(source, *arguments, ignored=ignored) as process:
        out, said = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (4, ""), said
    (line,) = said.splitlines()
    assert not Path(".pgtask").exists()
    return line.removeprefix("pgtask-supervisor: app 'some_app:app': ")


def pid_in(path: str) -> int:
    """Wait for a file and return the number in it."""
    deadline = time.monotonic() + PATIENCE
    while not (Path(path).exists() and (text := Path(path).read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return int(text)


def has_ended(pid: int) -> bool:
    """Tell if a process has ended; a zombie has, since init may reap it late."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_check_ends_import_that_exceeds_its_timeout() -> None:
    assert complaint(SLOW, "--stall", "2") == "importing it took longer than 2 s (see --stall)"
    assert has_ended(pid_in("importing"))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("1 / 0", "importing it failed: ZeroDivisionError"),
        ("raise KeyboardInterrupt", "importing it failed: KeyboardInterrupt"),
        ("os._exit(7)", "importing it ended the process, by exit code 7"),
        ("os.abort()", "importing it ended the process, by SIGABRT"),
    ],
)
def test_check_does_not_wait_for_processes_of_import(end: str, said: str) -> None:
    try:
        assert complaint(LEAVES_A_PROCESS + end).startswith(said)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid_in("left"), signal.SIGKILL)


@pytest.mark.parametrize("end", ["1 / 0", "import os; os._exit(0)"])
def test_check_sees_death_when_parent_ignored_sigchld(end: str) -> None:
    assert complaint(end, ignored=signal.SIGCHLD).startswith("importing it ")


def test_import_ends_when_supervisor_is_killed() -> None:
    with starting(SLOW) as process:
        pid = pid_in("importing")
        process.kill()
        deadline = time.monotonic() + PATIENCE
        while not has_ended(pid):
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_interrupt_during_import_is_quiet() -> None:
    with starting(SLOW) as process:
        pid = pid_in("importing")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said) == (130, ("", ""))
    assert has_ended(pid)
