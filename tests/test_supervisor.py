"""The supervisor with real forks, and its command line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
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

from pgtask._cli.supervisor import main
from pgtask._settings import SETTINGS
from pgtask._supervisor.parent import PORTION
from pgtask._supervisor.progress import ERASE_LINE, burst_notes, burst_summary, progress_line
from pgtask._supervisor.states import STOP_MARGIN
from pgtask._worker.status import Totals

PROGRAM = Path(__file__).with_name("supervisor_program.py")
PATIENCE = 20.0

GREETINGS = """\
from pgtask import App, Context, Done, Task

class Greeter(Task): ...

class SayHello(Greeter):
    name: str

    async def run(self, ctx: Context) -> Done:
        return Done()

app = App(Greeter)
"""

pytestmark = pytest.mark.timeout(60)


class Fleet:
    """A supervisor in a process of its own, and the journal that it and its workers write."""

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
            # Unbuffered, Python writes a line in parts, and those of two processes mix.
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[1]), "PYTHONUNBUFFERED": ""},
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

    def end(self, within: float = PATIENCE) -> int:
        """Wait until supervisor and workers, every one of them, are gone; return the exit code."""
        deadline = time.monotonic() + within
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
        """Leave nothing behind, whatever the test did."""
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self.pid)
            for process in [*supervisor.children(recursive=True), supervisor]:
                process.kill()
        self.process.wait(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()
        os.close(self._journal)


Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "greetings.py").write_text(GREETINGS)
    fleets: list[Fleet] = []

    def begin(behaviour: str, **settings: Any) -> Fleet:
        fleets.append(Fleet(tmp_path, behaviour, **settings))
        return fleets[-1]

    yield begin
    for fleet in fleets:
        fleet.close()


# --- stopping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_term_and_int_drain(start: Start, number: signal.Signals) -> None:
    fleet = start("obedient", procs=3)
    fleet.ready(3)
    fleet.signal(number)
    assert fleet.end() == 0
    assert fleet.count("SIGTERM") == 3
    assert fleet.count("log worker.gone .*reason=drained") == 3
    again = {"SIGTERM": "a second signal", "SIGINT": "Ctrl-C again"}[number.name]
    hint = f'hint="waiting up to 5 s for the steps that run; {again} stops now"'
    assert fleet.count(f"log supervisor.stopping cause={number.name} now=false {hint}") == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_second_order_stops_now(start: Start, second: signal.Signals) -> None:
    fleet = start("stubborn", procs=2)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    fleet.wait_for("SIGTERM", 2)
    fleet.signal(second)
    assert fleet.end() == 0
    assert fleet.count("SIGQUIT") == 2
    assert fleet.count(f"log supervisor.stopping cause={second.name} now=true$") == 1
    assert not fleet.count("log workers.killed")


def test_quit_stops_now(start: Start) -> None:
    fleet = start("stubborn", procs=2)
    fleet.ready(2)
    fleet.signal(signal.SIGQUIT)
    assert fleet.end() == 0
    assert fleet.count("SIGQUIT") == 2
    assert not fleet.count("SIGTERM")


def test_workers_leave_an_interrupt_of_the_terminal_to_the_parent(start: Start) -> None:
    fleet = start("obedient", procs=2)
    fleet.ready(2)
    os.killpg(fleet.pid, signal.SIGINT)
    assert fleet.end() == 0
    assert fleet.count("SIGTERM") == 2


OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.parametrize("progress", [False, True])
def test_a_terminal_that_is_closed_drains(start: Start, progress: bool) -> None:
    terminal, stderr = pty.openpty()
    prefix = (sys.executable, "-c", OWN_TERMINAL)
    try:
        fleet = start("obedient", procs=2, stderr=stderr, prefix=prefix, burst=progress, progress=progress)
        fleet.ready(2)
    finally:
        os.close(stderr)
        os.close(terminal)
    fleet.end()
    assert fleet.count("log supervisor.stopping cause=SIGHUP now=false") == 1
    assert fleet.count("SIGTERM") == 2
    assert fleet.count("log supervisor.stopped") == 1


def test_a_signal_without_a_meaning_is_ignored_aloud(start: Start) -> None:
    fleet = start("obedient", procs=2)
    fleet.ready(2)
    fleet.signal(signal.SIGUSR2)
    fleet.wait_for("log signal.ignored signal=SIGUSR2")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("SIGTERM") == 2


def test_nohup_is_respected(start: Start) -> None:
    fleet = start("obedient", procs=1, prefix=("env", "--ignore-signal=HUP"))
    fleet.ready(1)
    fleet.signal(signal.SIGHUP)
    fleet.signal(signal.SIGUSR2)
    fleet.wait_for("log signal.ignored signal=SIGUSR2")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log signal.ignored") == 1


def test_usr1_tells_of_each_worker(start: Start) -> None:
    fleet = start("has_done_something", procs=2)
    first, second = sorted(fleet.ready(2))
    fleet.wait_for("ticked", 2)
    fleet.signal(signal.SIGUSR1)
    fleet.wait_for("log worker.status", 2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log supervisor.status uptime=.* workers=2 backoff=0 starting=0 ready=2 stopping=0$") == 1
    for number, pid in (1, first), (2, second):
        line = (
            rf"log worker.status worker={number} pid={pid} state=ready uptime=\d\S* cpu_percent=\d\S* rss_mb=[1-9]\S* "
            "done=3 steps=5 errors=2 parked=1 lost=0 put_back=0$"
        )
        assert fleet.count(line) == 1


def test_a_worker_that_does_not_leave_is_killed_soon_after_the_grace(start: Start) -> None:
    fleet = start("deaf", procs=2, grace=0.2)
    fleet.ready(2)
    told = time.monotonic()
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert 0.2 + STOP_MARGIN <= time.monotonic() - told < 0.2 + 5
    assert fleet.count("log worker.overdue") == 2
    assert fleet.count("log workers.killed workers=2 hint=.* their tasks were given back") == 1
    assert fleet.count("log worker.gone .*signal=SIGKILL") == 2


def test_a_worker_that_is_still_starting_is_stopped_too(start: Start) -> None:
    fleet = start("silent", procs=2)
    fleet.wait_for("booting", 2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


@pytest.mark.parametrize("attempt", range(30))
def test_an_order_to_stop_while_forking_is_not_lost(start: Start, attempt: int) -> None:
    fleet = start("obedient", procs=8)
    fleet.wait_for("log supervisor.started")
    until = time.perf_counter() + attempt * 0.0005
    while time.perf_counter() < until:
        pass
    fleet.signal(signal.SIGTERM)
    assert fleet.end(within=10) == 0
    assert not fleet.count("log worker.(died|overdue)")


def test_many_workers_are_started_in_portions_between_looks_at_the_signals(start: Start) -> None:
    fleet = start("obedient", procs=100, log_level="debug", stop_at="worker.started")
    assert fleet.end() == 0
    assert fleet.count("log worker.started") == PORTION


def test_stop_worker_drains_also_those_that_did_not_hear_it(start: Start) -> None:
    fleet = start("is_notified", procs=3)
    assert fleet.end() == 0
    assert fleet.count("log worker.gone .*reason=notified") == 1
    assert fleet.count("log supervisor.stopping cause=stop_worker") == 1


# --- the parent dies ----------------------------------------------------------------------------------------


def test_workers_drain_when_the_parent_is_killed(start: Start) -> None:
    fleet = start("obedient", procs=4)
    fleet.ready(4)
    fleet.signal(signal.SIGKILL)
    assert fleet.end(within=5) == -signal.SIGKILL
    assert fleet.count("orphaned") == 4


def test_replaced_workers_notice_the_end_of_the_parent_too(start: Start) -> None:
    fleet = start("obedient", procs=3)
    for killed in fleet.ready(3):
        os.kill(killed, signal.SIGKILL)
    fleet.ready(6)
    fleet.signal(signal.SIGKILL)
    fleet.end(within=5)
    assert fleet.count("orphaned") == 3


# --- workers die --------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced(start: Start) -> None:
    fleet = start("obedient", procs=2)
    first, second = fleet.ready(2)
    os.kill(first, signal.SIGKILL)
    third = fleet.ready(3)[-1]
    children = {child.pid: child.status() for child in psutil.Process(fleet.pid).children()}
    assert children.keys() == {second, third}, "no zombie is left"
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count('log worker.died .*signal=SIGKILL hint="out of memory\\?" restart_in=0') == 1


@pytest.mark.parametrize("spoilt", ["ignore", "block"])
def test_deaths_are_learnt_of_whatever_whoever_started_us_does_with_them(start: Start, spoilt: str) -> None:
    fleet = start("obedient", procs=1, prefix=("env", f"--{spoilt}-signal=CHLD"))
    (before,) = fleet.ready(1)
    os.kill(before, signal.SIGKILL)
    fleet.wait_for("log worker.died .* signal=SIGKILL")
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_a_worker_that_dies_again_and_again_is_replaced_later_and_later(start: Start) -> None:
    fleet = start("obedient", procs=1)
    for turn in range(1, 5):
        os.kill(fleet.ready(turn)[-1], signal.SIGKILL)
    fleet.ready(5)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    delays = [float(delay) for _, what in fleet.lines for delay in re.findall(r"restart_in=(\S+)", what)]
    for delay, full in zip(delays, [0.1, 0.2, 0.4, 0.8], strict=True):
        assert full / 2 - 0.02 <= delay <= full


def test_a_crash_while_booting_is_tried_again(start: Start) -> None:
    fleet = start("crashes_once", procs=1)
    fleet.ready(1)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log worker.died .*signal=SIGSEGV") == 1
    assert "Fatal Python error: Segmentation fault" in fleet.stderr()


def test_what_user_code_does_to_the_process_stops_nobody_else(start: Start) -> None:
    fleet = start("exits_on_its_own", procs=1)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log worker.died .*exit=5 restart_in") == 1


def test_an_unexpected_error_after_the_start_is_an_accident_with_a_traceback(start: Start) -> None:
    fleet = start("breaks_later", procs=1)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count('log worker.died .*exit=3 error="TypeError: a bug of ours"') == 1
    assert "Traceback" in fleet.stderr()


def test_a_process_that_a_dead_worker_left_behind_does_not_hide_its_death(start: Start) -> None:
    fleet = start("holds_its_pipe", procs=1)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_strangers_are_reaped_and_ignored(start: Start) -> None:
    fleet = start("obedient", procs=1, stranger=True)
    (worker,) = fleet.ready(1)
    os.kill(worker, signal.SIGKILL)
    replacement = fleet.ready(2)[-1]
    assert [child.pid for child in psutil.Process(fleet.pid).children()] == [replacement]
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


# --- workers that cannot work -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        ("fails_at_boot", 3, "a worker could not start: TypeError: two lines"),
        ("is_refused", 5, "run: pgtask migrate"),
        (
            "crashes_at_boot",
            3,
            "a worker could not start: it was killed by SIGABRT before it was ready, 3 times in a row",
        ),
    ],
)
def test_a_boot_failure_stops_the_supervisor(start: Start, behaviour: str, code: int, message: str) -> None:
    fleet = start(behaviour, procs=3)
    assert fleet.end() == code
    assert fleet.output()[0] == message
    assert "Traceback" not in fleet.stderr()


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("nowhere:app", "app 'nowhere:app': no module named 'nowhere' here or on the path"),
        (
            "greetings:Greeter",
            "app 'greetings:Greeter' is of type StructMeta, not a pgtask.App; did you mean greetings:app?",
        ),
    ],
)
def test_an_app_that_cannot_be_loaded(start: Start, app: str, message: str) -> None:
    fleet = start("obedient", procs=3, app=app)
    assert fleet.end() == 4
    assert fleet.output()[0] == message
    assert "Traceback" not in fleet.stderr()


def test_the_traceback_is_there_for_who_debugs(start: Start) -> None:
    fleet = start("fails_at_boot", procs=1, log_level="debug")
    assert fleet.end() == 3
    assert "Traceback" in fleet.stderr()


def test_a_permanent_error_later_drains_the_others(start: Start) -> None:
    fleet = start("is_refused_later", procs=3)
    assert fleet.end() == 5
    assert fleet.output()[0] == "permission denied"
    assert not fleet.count("log worker.died")


# --- the child after the fork -------------------------------------------------------------------------------


def test_a_worker_holds_no_descriptor_of_parent_or_sibling(start: Start) -> None:
    fleet = start("lists_descriptors", procs=3)
    first = fleet.ready(3)[0]
    os.kill(first, signal.SIGKILL)
    fleet.ready(4)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert {what for _, what in fleet.lines if what.startswith("descriptors")} == {"descriptors 7"}


def test_a_worker_is_clean_of_its_parent(start: Start, tmp_path: Path) -> None:
    fleet = start("shows_itself", procs=2)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    one, other = (json.loads(what.removeprefix("self ")) for _, what in fleet.lines if what.startswith("self "))
    assert one.pop("random") != other.pop("random")
    assert one == other
    assert one == {
        "path": str(tmp_path),
        "ignored": ["SIGINT", "SIGHUP", "SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2"],
        "blocked": 0,
        "wakeup": -1,
    }


# --- bursts -------------------------------------------------------------------------------------------------


def test_a_burst_replaces_the_killed_and_sums_up_all_of_them(start: Start) -> None:
    fleet = start("bursts", procs=2, burst=True)
    assert fleet.end() == 1, "some task is parked"
    assert json.loads(fleet.output()[-1]) == {"done": 27, "steps": 81, "finished": True}
    assert fleet.count("log worker.gone .*reason=burst") == 2


def test_a_burst_that_is_stopped_is_not_finished(start: Start) -> None:
    fleet = start("obedient", procs=2, burst=True)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert json.loads(fleet.output()[-1])["finished"] is False


def test_the_progress_line_is_erased_before_other_lines_and_at_the_end(start: Start) -> None:
    terminal, stderr = pty.openpty()
    try:
        fleet = start("bursts", procs=2, burst=True, progress=True, stderr=stderr)
        assert fleet.end() == 1
        written = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
        os.close(stderr)
    assert "tasks done" in written
    *lines, rest = written.split("\r\n")
    assert not rest
    for line in lines:
        assert line.startswith(ERASE_LINE), line
        assert "tasks done" not in line.rsplit(ERASE_LINE, 1)[-1], "nothing is written behind the progress"


def test_what_workers_print_comes_out_whole_beside_the_progress(start: Start) -> None:
    terminal, ours = pty.openpty()
    fleet = start("prints", procs=2, burst=True, progress=True, stdout=ours, stderr=ours)
    os.close(ours)
    written = b""
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # Linux: when all have closed it
        while chunk := stream.read(65536):
            written += chunk
    assert fleet.end() == 0
    *lines, rest = [line.rpartition(ERASE_LINE)[2] for line in written.decode().split("\r\n")]
    assert not rest
    for number in range(100):
        assert lines.count(f"line {number}") == 2
        assert lines.count(f"error {number}") == 2
    assert "tasks done" in written.decode()


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_line_that_a_worker_has_begun_is_neither_lost_nor_glued_to_the_progress(
    start: Start, monkeypatch: pytest.MonkeyPatch, unbuffered: bool
) -> None:
    if unbuffered:
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    terminal, ours = pty.openpty()
    fleet = start("prints_in_two", procs=1, burst=True, progress=True, stdout=ours, stderr=ours)
    os.close(ours)
    written = b""
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while chunk := stream.read(65536):
            written += chunk
            if b"the beginning" in written and b"8 steps" in written.partition(b"the beginning")[2]:
                (Path(fleet.errors.name).parent / "drawn").touch()
    assert fleet.end() == 0
    lines = [line.rpartition(ERASE_LINE)[2] for line in written.decode().split("\r\n")]
    assert "the beginning" in lines
    assert "the end" in lines


def test_progress_line() -> None:
    now, before = Totals(done=12_000, steps=36_000, errors=1), Totals(done=2_000, steps=6_000)
    assert progress_line(now, before, 5.0, 100_000) == (
        "12,000 of 100,000 tasks done  36,000 steps  6,000 steps/s  1 error  at most 0:44 left"
    )
    assert progress_line(now, before, 5.0, None) == "12,000 tasks done  36,000 steps  6,000 steps/s  1 error"
    assert progress_line(now, now, 5.0, 100_000).endswith("0 steps/s  1 error")
    slow = Totals(done=2_001, steps=6_001)
    assert progress_line(slow, before, 5.0, 100_000).endswith("0 steps/s  0 errors"), "nothing to go by"
    assert progress_line(now, before, 5.0, 11_999).startswith("12,000 tasks done"), "more came than was counted"


def test_what_is_parked_counts_for_what_is_left_but_is_not_done() -> None:
    now, before = Totals(done=6_000, parked=6_000), Totals(done=1_000, parked=1_000)
    assert progress_line(now, before, 5.0, 100_000) == (
        "6,000 of 100,000 tasks done  6,000 parked  0 steps  0 steps/s  0 errors  at most 0:44 left"
    )
    assert progress_line(now, now, 5.0, 11_999).startswith("6,000 tasks done  6,000 parked")


def test_burst_summary() -> None:
    totals = Totals(done=100_000, steps=300_000)
    assert burst_summary(totals, 12.3, finished=True, parked_left=0, style="text") == (
        "burst finished: 100,000 tasks done, 300,000 steps, 0 errors in 12.3 s (24,390 steps/s)"
    )
    totals = Totals(done=1, steps=2, errors=1, parked=3, put_back=2)
    assert burst_summary(totals, 2.0, finished=False, parked_left=4, style="text") == (
        "burst stopped: 1 task done, 3 parked, 2 steps, 1 error in 2.0 s (1 steps/s)"
    )
    assert json.loads(burst_summary(totals, 0.0, finished=True, parked_left=4, style="json")) == {
        "event": "burst.finished",
        "tasks": 1,
        "steps": 2,
        "errors": 1,
        "parked": 3,
        "parked_left": 4,
        "put_back": 2,
        "seconds": 0.0,
        "steps_per_second": 0,
    }


def test_what_a_burst_has_left_is_said_with_where_to_look() -> None:
    def notes(put_back: int, parked_left: int) -> list[str]:
        return list(burst_notes(Totals(put_back=put_back), parked_left=parked_left))

    assert notes(0, 0) == []
    assert notes(1, 1) == [
        "1 task is parked with an error: pgtask list --state parked",
        "1 time a task was put back, since this app lacks its step: pgtask list --state scheduled",
    ]
    assert notes(2, 1000) == [
        "1,000 or more tasks are parked with an error: pgtask list --state parked",
        "2 times a task was put back, since this app lacks its step: pgtask list --state scheduled",
    ]


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PGTASK_") or name == "DATABASE_URL"]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no app to run", "module:attribute", "PGTASK_APP", "[tool.pgtask]"]),
        (["greetings:app", "--procs", "none"], ["--procs", "none", "whole number"]),
        (["greetings:app", "--proc", "1"], ["--proc"]),
        (["greetings:app", "--procs"], ["--procs", "expected one argument"]),
        (["greetings:app", "--log", "xml"], ["--log", "text, json"]),
        (["greetings:app", "more"], ["more"]),
        (["greetings:app", "--procs", "1025"], ["procs 1025", "more than 1024", "--concurrency"]),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"pgtask-supervisor: .* \(see pgtask-supervisor --help\)\n", err)
    for word in words:
        assert word in err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for setting in SETTINGS:
        assert (setting.flag if setting.name != "app" else "APP") in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"pgtask-supervisor \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def command(directory: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgtask._cli.supervisor", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [path or directory, PROGRAM.parents[1]]))},
    )


@pytest.mark.parametrize("procs", ["1", "3"])
def test_the_command_says_once_why_it_failed(empty: Path, procs: str) -> None:
    done = command(empty, "nowhere:app", "--procs", procs, "--dsn", "postgresql:///x", "--log-level", "error")
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr == ("pgtask-supervisor: app 'nowhere:app': no module named 'nowhere' here or on the path\n")


def test_the_command_says_it_in_json(empty: Path) -> None:
    done = command(empty, "nowhere:app", "--dsn", "postgresql:///x", "--log", "json", "--log-level", "error")
    assert done.returncode == 4
    (entry,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert entry["event"] == "supervisor.failed"
    assert entry["fields"]["exit"] == 4


@pytest.mark.parametrize(
    ("app", "hint"),
    [
        ("ok.py:app", ": did you mean ok:app?"),
        ("./ok:app", ": did you mean ok:app?"),
        ("src/ok.py:make.app", ": did you mean src.ok:make.app?"),
        ("nocolon", ": did you mean nocolon:app?"),
        ("/srv/ok.py:app", ", as in greetings:app"),
        (":app", ", as in greetings:app"),
        ("a..b:app", ", as in greetings:app"),
    ],
)
@pytest.mark.usefixtures("empty")
def test_a_malformed_app_is_refused_before_a_database_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, app: str, hint: str
) -> None:
    def too_early() -> str:
        raise AssertionError

    monkeypatch.setattr("pgtask._cli.supervisor.configure", lambda *_: None)
    monkeypatch.setattr("pgtask._cli.supervisor._start_embedded", too_early)
    assert main([app]) == 4
    assert capsys.readouterr().err == f"pgtask-supervisor: app {app!r} is not of the form module:attribute{hint}\n"


def test_no_server_is_started_for_an_app_that_cannot_be_loaded(empty: Path) -> None:
    (empty / "broken.py").write_text("1 / 0\n")
    done = command(empty, "broken:app")
    assert (done.returncode, done.stdout) == (4, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("pgtask-supervisor: app 'broken:app': importing it failed: ZeroDivisionError")
    assert not (empty / ".pgtask").exists()


def test_an_interrupt_before_there_is_a_worker_is_quiet(empty: Path) -> None:
    """The driver of the event loop is what is imported last."""
    (empty / "uvloop.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = command(empty, "greetings:app", "--dsn", "postgresql:///x", path=empty)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
