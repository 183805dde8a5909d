"""A program measured from outside: its whole process tree, from its start to its end.

Invariants: the program runs in a session of its own, and the bench kills what is left of that session; the bench
never talks to the program.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec
import psutil

from bench.harness.contender import RunFailed

__all__ = ["ProcessResult", "kill_tree", "last_line", "run_measured"]

_POLL = 0.005
_SAMPLE_INTERVAL = 0.5  # seconds between two samples of the memory, each of which costs some milliseconds of CPU


class ProcessResult(msgspec.Struct, frozen=True):
    """Result of a program that has exited with code 0.

    `cpu_seconds`: of the program and of all descendants that it waited for, their boot included. `peak_rss_bytes`: of
    its largest process, sampled every half second; None if it was not sampled.
    """

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
    sample_memory: bool = False,
) -> ProcessResult:
    """Run a program to its end, with its output in files of `directory`. Raises `RunFailed` if it cannot start, exits
    with another code than 0, or runs longer than `timeout` seconds."""
    out, err = directory / "stdout.txt", directory / "stderr.txt"
    began_at = time.time()
    began = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = _start(command, env=env, cwd=cwd or directory, stdout=stdout, stderr=stderr)
        try:
            usage, peak = _wait(process, began=began, timeout=timeout, sample_memory=sample_memory)
            seconds = time.monotonic() - began
        except TimeoutError:
            raise RunFailed(f"not finished after {timeout:g} s: {_tail(err)}".rstrip(": ")) from None
        finally:
            kill_tree(process)
    if process.returncode != 0:
        output = _tail(err) or _tail(out)
        raise RunFailed(f"exit code {process.returncode}: {output}")
    return ProcessResult(
        stdout=out.read_text(errors="replace"),
        stderr=err.read_text(errors="replace"),
        began_at=began_at,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=peak or None,
    )


def _start(
    command: Sequence[str], *, env: Mapping[str, str] | None, cwd: Path, stdout: IO[bytes], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    except OSError as error:
        raise RunFailed(f"{command[0]}: {error.strerror}") from None


def _wait(
    process: subprocess.Popen[bytes], *, began: float, timeout: float, sample_memory: bool
) -> tuple[resource.struct_rusage, int]:
    """Wait for its end; return its usage and its peak of memory in bytes, 0 if not sampled. Raises `TimeoutError`."""
    peak = 0
    next_sample = began + _SAMPLE_INTERVAL / 4
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage, peak
        now = time.monotonic()
        if now - began > timeout:
            raise TimeoutError
        if sample_memory and now > next_sample:
            peak = max(peak, _largest_peak(process.pid))
            next_sample = now + min(_SAMPLE_INTERVAL, now - began)  # the first ones early, for a short run
        time.sleep(_POLL)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the session that this process leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
        process.wait()


def last_line(text: str) -> str:
    """Return the last line that is not blank, cut to 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _tail(path: Path) -> str:
    return path.read_text(errors="replace").strip()[-500:]


def _largest_peak(pid: int) -> int:
    """Return the largest peak of memory of any process of the tree, in bytes."""
    peak = 0
    with contextlib.suppress(psutil.Error):
        main = psutil.Process(pid)
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                peak = max(peak, _high_water(process))
    return peak


def _high_water(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return int(process.memory_info().rss)
    found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0].split()[1]) if found else 0
