"""The supervisor's operations with real forks and workers that behave as the test wants: fresh ones, more and less,
silence, limits."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import sys
import termios
from pathlib import Path

import psutil
import pytest
from test_supervisor import OWN_TERMINAL, Fleet, Start, start

from pgtask._supervisor.orders import Orders
from pgtask._supervisor.parent import Supervisor
from pgtask._supervisor.states import STOP_MARGIN
from pgtask._supervisor.worker import MOST_PROCS
from pgtask.config import Config

__all__ = ["start"]  # the fixture

pytestmark = pytest.mark.timeout(60)


def live(fleet: Fleet) -> list[int]:
    """The workers' processes; a zombie would be one."""
    return sorted(child.pid for child in psutil.Process(fleet.pid).children())


def least_ready(fleet: Fleet, since: str) -> int:
    """The smallest number of workers that were ready and not told to leave, after the line `since`."""
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


# --- HUP ----------------------------------------------------------------------------------------------------


def test_hup_replaces_the_workers_one_at_a_time(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=3)
    before = set(fleet.ready(3))
    (tmp_path / "code").write_text("new")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    assert fleet.count("code new") == 3
    assert fleet.count("log worker.replaced worker=[123] pid=.* by=.* cause=SIGHUP") == 3
    assert least_ready(fleet, "log reload.started") == 3
    assert len(live(fleet)) == 3
    assert not before & set(live(fleet))
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert not fleet.count("log worker.(died|overdue)")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("broken", "app 'x': it is broken"),
        ("crashes", "a worker could not start: it was killed by SIGSEGV before it was ready"),
        ("dies", "a worker did not last: it was killed by SIGSEGV right after it was ready"),
        ("refused", "no such column"),
    ],
)
def test_code_that_does_not_start_or_does_not_last_leaves_the_old_workers_alone(
    start: Start, tmp_path: Path, code: str, reason: str
) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=2)
    before = sorted(fleet.ready(2))
    (tmp_path / "code").write_text(code)
    fleet.signal(signal.SIGHUP)
    fleet.wait_for(f'log reload.failed cause=SIGHUP error="{reason}" replaced=0 hint="the old workers go on"')
    assert live(fleet) == before
    (tmp_path / "code").write_text("new")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    assert fleet.count("code new") == 2
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_a_reload_that_fails_in_the_middle_says_who_goes_on_with_what(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=3)
    before = set(fleet.ready(3))
    (tmp_path / "code").write_text("new")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code new")
    (tmp_path / "code").write_text("dies")
    fleet.wait_for('log reload.failed .* replaced=1 hint="the other workers go on with the code of before"')
    assert len(before & set(live(fleet))) == 2
    assert len(live(fleet)) == 3


def test_a_worker_that_dies_while_its_code_is_broken_is_tried_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=2)
    first, _ = fleet.ready(2)
    (tmp_path / "code").write_text("broken")
    os.kill(first, signal.SIGKILL)
    fleet.wait_for("log worker.died .*exit=4 error=\"app 'x': it is broken\" restart_in")
    (tmp_path / "code").write_text("new")
    fleet.ready(3)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_a_second_hup_starts_over(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=2)
    fleet.ready(2)
    (tmp_path / "code").write_text("hangs")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code hangs")
    (tmp_path / "code").write_text("new")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    assert fleet.count("code new") == 2
    assert len(live(fleet)) == 2
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGQUIT])
def test_a_stop_in_the_middle_of_a_reload(start: Start, tmp_path: Path, order: signal.Signals) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=2)
    fleet.ready(2)
    (tmp_path / "code").write_text("hangs")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code hangs")
    fleet.signal(order)
    assert fleet.end(within=8) == 0
    assert fleet.count(order.name) == 2


def test_a_worker_that_dies_while_it_is_being_replaced(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1)
    (old,) = fleet.ready(1)
    (tmp_path / "code").write_text("hangs")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code hangs")
    (tmp_path / "code").write_text("new")
    os.kill(old, signal.SIGKILL)
    (crashed, restarted) = fleet.ready(2)
    assert crashed == old
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    assert len(live(fleet)) == 1
    assert restarted not in live(fleet)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


# --- TTIN and TTOU ------------------------------------------------------------------------------------------


def test_one_worker_more_and_one_less(start: Start) -> None:
    fleet = start("obedient", procs=1)
    fleet.ready(1)
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for("log worker.added worker=2 workers=2")
    one, two = fleet.ready(2)
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for(f"log worker.removed worker=2 pid={two} workers=1")
    fleet.wait_for("log worker.gone .*reason=drained")
    assert live(fleet) == [one]
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for('log signal.ignored signal=SIGTTOU why="1 is the least"')
    fleet.signal(signal.SIGTTIN)
    fleet.ready(3)
    assert fleet.count("log worker.ready worker=2") == 2, "numbers are used again"
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_a_replacement_is_not_one_more(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("hangs")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code hangs")
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for('log signal.ignored signal=SIGTTOU why="1 is the least"')
    assert before[0] in live(fleet)
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for("log worker.added worker=2 workers=2")
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for("log worker.removed worker=2 .* workers=1")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_a_worker_that_cannot_be_added_harms_nobody(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("broken")
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for("log worker.not_added worker=2 error=\"app 'x': it is broken\"")
    assert live(fleet) == before
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_a_worker_that_is_added_and_does_not_last_harms_nobody(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("refused")
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for('log worker.not_added worker=2 error="no such column"')
    assert live(fleet) == before


def test_a_hundred_orders_leave_a_fleet_in_order(start: Start) -> None:
    fleet = start("obedient", procs=2)
    fleet.ready(2)
    for _ in range(50):
        for number in signal.SIGTTIN, signal.SIGTTOU, signal.SIGHUP, signal.SIGUSR1:
            fleet.signal(number)
    fleet.wait_for("log reload.started")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert not fleet.count("log worker.(died|overdue)")


def test_there_is_a_most() -> None:
    supervisor = Supervisor(Config(procs=MOST_PROCS - 1), lambda *_, **__: 0)
    orders = Orders(supervisor)
    orders.handle_ttin()
    orders.handle_ttin()
    orders.handle_ttin()
    assert [worker.number for worker in supervisor.workers] == list(range(1, MOST_PROCS + 1))


IN_THE_BACKGROUND = (
    "import os, signal; signal.signal(signal.SIGTTOU, signal.SIG_DFL); "
    "terminal = os.open('/dev/tty', os.O_RDWR); child = os.fork()\n"
    "if child: os.waitpid(child, 0); raise SystemExit\n"
    "os.setpgid(0, 0); import sys; os.close(terminal); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_lines_for_a_terminal_that_stops_its_background_jobs_are_no_orders(start: Start) -> None:
    """`stty tostop`: the terminal sends TTOU to the group of each process that writes from the background."""
    terminal, ours = pty.openpty()
    attributes = termios.tcgetattr(ours)
    attributes[3] |= termios.TOSTOP
    termios.tcsetattr(ours, termios.TCSANOW, attributes)
    prefix = (sys.executable, "-c", OWN_TERMINAL, sys.executable, "-c", IN_THE_BACKGROUND)
    fleet = start("writes_to_the_terminal", procs=3, stdout=ours, stderr=ours, prefix=prefix)
    os.close(ours)
    fleet.wait_for("written", 3)
    (supervisor,) = {pid for pid, what in fleet.lines if what.startswith("log supervisor.started")}
    os.kill(supervisor, signal.SIGUSR1)
    fleet.wait_for("log worker.status", 3)
    assert not fleet.count("log worker.removed"), fleet.lines
    os.kill(supervisor, signal.SIGTTOU)
    fleet.wait_for("log worker.removed", 1)
    os.kill(supervisor, signal.SIGTERM)
    written = b""
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while chunk := stream.read(65536):
            written += chunk
    fleet.end()
    assert written.count(b"from a program") == 3
    assert fleet.count("log worker.gone .*reason=drained") == 3


# --- silence ------------------------------------------------------------------------------------------------


def test_a_worker_whose_loop_is_silent_shows_its_stack_and_is_replaced(start: Start) -> None:
    fleet = start("falls_silent", procs=1, stall=2.0)
    (silent,) = fleet.ready(1)
    fleet.ready(2)
    assert fleet.count(rf"log worker.silent worker=1 pid={silent} silent=\S+ limit=2$") == 1, "one warning"
    assert fleet.count(rf"log worker.stalled worker=1 pid={silent}") == 1
    assert fleet.count(f"log worker.stack worker=1 pid={silent}$") == 2
    assert fleet.count(f"log worker.gone worker=1 pid={silent} signal=SIGKILL restart_in") == 1
    stacks = fleet.stderr().split("worker.stack")[1:]
    assert len(stacks) == 2
    for stack in stacks:
        assert re.search(r'File ".*supervisor_program\.py", line \d+ in blocks_for_ever', stack)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert not fleet.count("log worker.died")


def test_a_stop_ends_also_with_a_stalled_worker(start: Start) -> None:
    fleet = start("falls_silent", procs=1, stall=1.0, grace=0.1)
    fleet.wait_for("log worker.stalled")
    fleet.signal(signal.SIGTERM)
    assert fleet.end(within=STOP_MARGIN + 1) == 0
    assert len(fleet.ready(1)) == 1


def test_time_in_which_the_supervisor_was_stopped_is_nobodys_silence(start: Start) -> None:
    fleet = start("falls_silent", procs=2, stall=2.0)
    fleet.ready(2)
    frozen = psutil.Process(fleet.pid)
    frozen.suspend()
    with contextlib.suppress(psutil.TimeoutExpired):
        frozen.wait(4)
    frozen.resume()
    fleet.wait_for("log worker.stalled")
    silent = [re.search(r"silent=(\S+)", what) for _, what in fleet.lines if what.startswith("log worker.stalled")]
    assert [float(found[1]) < 3.5 for found in silent if found] == [True]
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_zero_is_no_limit_and_a_worker_tells_its_stacks_to_who_asks(start: Start) -> None:
    fleet = start("falls_silent", procs=1, stall=0.0)
    (silent,) = fleet.wait_for("blocked")
    os.kill(silent, signal.SIGUSR2)
    fleet.wait_for("log worker.stack")
    fleet.signal(signal.SIGQUIT)
    assert fleet.end() == 0
    assert "in blocks_for_ever" in fleet.stderr()
    assert not fleet.count("log worker.(silent|stalled)")


# --- limits and the place to run ----------------------------------------------------------------------------


def test_a_burst_sums_up_the_replaced(start: Start) -> None:
    fleet = start("does_tasks", procs=1, burst=True, max_tasks=10)
    assert fleet.end() == 0
    assert json.loads(fleet.output()[-1]) == {"done": 32, "steps": 96, "finished": True}
    assert fleet.count("log worker.replaced worker=1 .* cause=max-tasks tasks=10") == 2


def test_a_worker_that_takes_too_much_memory_is_replaced(start: Start) -> None:
    fleet = start("obedient", procs=1, max_rss=1)
    fleet.ready(3)
    assert fleet.count(r"log worker.replaced worker=1 .* cause=max-rss rss_mb=\d+") >= 1
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_a_replacement_that_cannot_start_is_not_tried_all_the_time(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1, max_rss=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("broken")
    fleet.wait_for("log worker.not_replaced worker=1 cause=max-rss error=.* again_in=30")
    assert live(fleet) == before
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("code broken") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has an affinity")
def test_pin_gives_each_worker_a_cpu_and_its_replacement_the_same(start: Start) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    fleet = start("shows_its_cpus", procs=3, pin=True)
    fleet.ready(3)
    expected = sorted(f"cpus [{allowed[number % len(allowed)]}]" for number in range(3))
    assert sorted(what for _, what in fleet.lines if what.startswith("cpus")) == expected
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert sorted(what for _, what in fleet.lines if what.startswith("cpus")) == sorted(2 * expected)
