"""A supervisor with real forks and workers that follow a script, for `tests/supervisor`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from paths import PYTHONPATH, SUPPORT

PROGRAM = SUPPORT / "supervisor_program.py"
PATIENCE = 45.0

GREETINGS = """\
from pgtask import App, Context, Done, Task

class Greeter(Task): ...

class SayHello(Greeter):
    name: str

    async def run(self, ctx: Context) -> Done:
        return Done()

app = App(Greeter)
"""

# Makes stderr the controlling terminal of the program that it executes.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class ScriptedFleet:
    """A supervisor in a process of its own, with workers that follow a script, and the journal that they all write."""

    def __init__(
        self,
        directory: Path,
        behaviour: str,
        *,
        stdout: int | None = None,
        stderr: int | None = None,
        prefix: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.lines: list[tuple[int, str]] = []
        self._rest = b""
        self._journal, writer = os.pipe()
        self.errors = (directory / "stderr").open("w+")
        self.process = subprocess.Popen(
            [
                *prefix,
                *(sys.executable, "-W", "error", str(PROGRAM), str(writer), behaviour, json.dumps(settings)),
            ],
            cwd=directory,
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            stdout=stdout or subprocess.PIPE,
            stderr=stderr or self.errors,
            start_new_session=True,
            # Unbuffered, Python writes a line in parts, and the parts of two processes mix.
            env={**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": ""},
        )
        os.close(writer)

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read(self, deadline: float) -> bool:
        """Read more of the journal; False at its end, when every process is gone."""
        if not select.select([self._journal], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"journal so far: {self.lines}\n{self.stderr()}")
        chunk = os.read(self._journal, 65536)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            pid, _, what = line.decode().partition(" ")
            self.lines.append((int(pid), what))
        return bool(chunk)

    def wait_for(self, pattern: str, count: int = 1) -> list[int]:
        """Wait until the journal has `count` lines that begin so; return the pids that wrote them."""
        deadline = time.monotonic() + PATIENCE
        while len(found := [pid for pid, what in self.lines if re.match(pattern, what)]) < count:
            if not self._read(deadline):
                raise AssertionError(f"all gone without {pattern!r}: {self.lines}\n{self.stderr()}")
        return found

    def count(self, pattern: str) -> int:
        return sum(1 for _, what in self.lines if re.match(pattern, what))

    def ready(self, count: int) -> list[int]:
        """Wait for `count` workers to be ready; return the pids of all that ever were."""
        self.wait_for("log worker.ready", count)
        return [int(pid) for _, what in self.lines for pid in re.findall(r"^log worker\.ready .*pid=(\d+)", what)]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Wait until the supervisor and all workers are gone; return the exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE)

    def output(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.read().decode().splitlines()

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def close(self) -> None:
        """Kill the processes that are left, also after a failed test."""
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self.pid)
            for process in [*supervisor.children(recursive=True), supervisor]:
                process.kill()
        self.process.wait(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()
        os.close(self._journal)


Start = Callable[..., ScriptedFleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "greetings.py").write_text(GREETINGS)
    fleets: list[ScriptedFleet] = []

    def begin(behaviour: str, **settings: Any) -> ScriptedFleet:
        fleets.append(ScriptedFleet(tmp_path, behaviour, **settings))
        return fleets[-1]

    yield begin
    for fleet in fleets:
        fleet.close()


def live(fleet: ScriptedFleet) -> list[int]:
    """Return the pids of the workers; a zombie counts as one."""
    return sorted(child.pid for child in psutil.Process(fleet.pid).children())


def min_ready(fleet: ScriptedFleet, since: str) -> int:
    """Return the minimum of workers that were ready and not told to leave, after the line `since`."""
    ready: set[int] = set()
    least: int | None = None
    for pid, what in fleet.lines:
        if found := re.match(r"log worker\.ready .*pid=(\d+)", what):
            ready.add(int(found[1]))
        elif what in ("SIGTERM", "SIGQUIT") or what.startswith("orphaned"):
            ready.discard(pid)
        if re.match(since, what):
            least = len(ready)
        elif least is not None:
            least = min(least, len(ready))
        if what.startswith("log reload.done"):
            break
    assert least is not None
    return least
