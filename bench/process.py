"""A program that is measured from outside: its whole process tree, from its start to its end.

Invariants: it runs in a session of its own, and none of it is left when it is given up; nothing is asked of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

from bench.contender import RunFailed

__all__ = ["Ended", "kill_tree", "last_line", "run_measured"]

_POLL = 0.005
_LOOK = 0.5  # seconds between two looks at the memory: a look costs a few milliseconds of CPU


class Ended(msgspec.Struct, frozen=True):
    """A program that has ended well. `cpu_seconds`: of it and of all descendants that were waited for, their boot
    included. `peak_rss_bytes`: of the largest process, as seen by a look every half second; None if nobody looked."""

    stdout: str
    stderr: str
    began_at: float
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int | None


def run_measured(
    command: Sequence[str],
    *,
    directory: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    look: bool = False,
) -> Ended:
    """Run it to its end; what it says is kept in `directory` meanwhile. Raises `RunFailed` if it does not end well."""
    out, err = directory / "stdout.txt", directory / "stderr.txt"
    peak = 0
    began_at = time.time()
    began = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd or directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            raise RunFailed(f"{command[0]}: {error.strerror}") from None
        try:
            next_look = began + _LOOK / 4
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                now = time.monotonic()
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if now - began > timeout:
                    raise RunFailed(f"not finished after {timeout:g} s: {_tail(err)}".rstrip(": "))
                if look and now > next_look:
                    peak = max(peak, _largest(process.pid))
                    next_look = now + min(_LOOK, now - began)  # the first ones soon: a short run should be seen too
                time.sleep(_POLL)
            seconds = now - began
        finally:
            kill_tree(process)
    if process.returncode != 0:
        said = _tail(err) or _tail(out)
        raise RunFailed(f"exit code {process.returncode}: {said}")
    return Ended(
        stdout=out.read_text(errors="replace"),
        stderr=err.read_text(errors="replace"),
        began_at=began_at,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=peak or None,
    )


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the session that this process has led."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
        process.wait()


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _tail(path: Path) -> str:
    return path.read_text(errors="replace").strip()[-500:]


def _largest(pid: int) -> int:
    """The most memory that any process of the tree has ever had, in bytes."""
    most = 0
    with contextlib.suppress(psutil.Error):
        main = psutil.Process(pid)
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                most = max(most, _high_water(process))
    return most


def _high_water(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return int(process.memory_info().rss)
    found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0].split()[1]) if found else 0
