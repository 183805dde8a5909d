"""The signals HUP, TTIN and TTOU to a supervisor with real forks."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import sys
import termios
from pathlib import Path

import pytest
from fix_supervisor import OWN_TERMINAL, Start, live, min_ready

from pgtask._supervisor.parent import Supervisor
from pgtask._supervisor.slot import MAX_PROCS
from pgtask.config import Config

pytestmark = pytest.mark.timeout(120)


# --- HUP ----------------------------------------------------------------------------------------------------


def test_hup_replaces_workers_one_at_a_time(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=3)
    before = set(fleet.ready(3))
    (tmp_path / "code").write_text("new")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    assert fleet.count("code new") == 3
    assert fleet.count("log worker.replaced worker=[123] pid=.* by=.* cause=SIGHUP") == 3
    assert min_ready(fleet, "log reload.started") == 3
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
def test_hup_with_failing_code_keeps_old_workers(start: Start, tmp_path: Path, code: str, reason: str) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=2)
    before = sorted(fleet.ready(2))
    (tmp_path / "code").write_text(code)
    fleet.signal(signal.SIGHUP)
    fleet.wait_for(f'log reload.failed cause=SIGHUP error="{reason}" replaced=0 hint="the old workers keep running"')
    assert live(fleet) == before
    (tmp_path / "code").write_text("new")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    assert fleet.count("code new") == 2
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_reload_that_fails_halfway_logs_kept_workers(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=3)
    before = set(fleet.ready(3))
    (tmp_path / "code").write_text("new")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code new")
    (tmp_path / "code").write_text("dies")
    fleet.wait_for('log reload.failed .* replaced=1 hint="the remaining workers keep running the old code"')
    assert len(before & set(live(fleet))) == 2
    assert len(live(fleet)) == 3


def test_dead_worker_with_broken_code_is_started_again(start: Start, tmp_path: Path) -> None:
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


def test_second_hup_starts_over(start: Start, tmp_path: Path) -> None:
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
def test_stop_during_reload_stops_all(start: Start, tmp_path: Path, order: signal.Signals) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=2, grace=600.0)
    fleet.ready(2)
    (tmp_path / "code").write_text("hangs")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code hangs")
    fleet.signal(order)
    assert fleet.end() == 0
    assert fleet.count(order.name) == 2


def test_worker_that_dies_during_its_replacement_is_restarted(start: Start, tmp_path: Path) -> None:
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


def test_ttin_adds_worker_and_ttou_removes_it(start: Start) -> None:
    fleet = start("obedient", procs=1)
    fleet.ready(1)
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for("log worker.added worker=2 workers=2")
    one, two = fleet.ready(2)
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for(f"log worker.removed worker=2 pid={two} workers=1")
    fleet.wait_for("log worker.exited .*reason=drained")
    assert live(fleet) == [one]
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for('log signal.ignored signal=SIGTTOU why="1 is the minimum"')
    fleet.signal(signal.SIGTTIN)
    fleet.ready(3)
    assert fleet.count("log worker.ready worker=2") == 2, "numbers are used again"
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_ttin_and_ttou_do_not_count_replacement(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("hangs")
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("code hangs")
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for('log signal.ignored signal=SIGTTOU why="1 is the minimum"')
    assert before[0] in live(fleet)
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for("log worker.added worker=2 workers=2")
    fleet.signal(signal.SIGTTOU)
    fleet.wait_for("log worker.removed worker=2 .* workers=1")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_added_worker_that_fails_leaves_others_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("broken")
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for("log worker.not_added worker=2 error=\"app 'x': it is broken\"")
    assert live(fleet) == before
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_added_worker_that_does_not_last_leaves_others_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("refused")
    fleet.signal(signal.SIGTTIN)
    fleet.wait_for('log worker.not_added worker=2 error="no such column"')
    assert live(fleet) == before


def test_two_hundred_signals_leave_fleet_intact(start: Start) -> None:
    fleet = start("obedient", procs=2)
    fleet.ready(2)
    for _ in range(50):
        for number in signal.SIGTTIN, signal.SIGTTOU, signal.SIGHUP, signal.SIGUSR1:
            fleet.signal(number)
    fleet.wait_for("log reload.started")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert not fleet.count("log worker.(died|overdue)")


def test_ttin_stops_at_max_procs() -> None:
    supervisor = Supervisor(Config(procs=MAX_PROCS - 1), lambda *_, **__: 0)
    for _ in range(3):
        supervisor.handlers.handle(signal.SIGTTIN)
    assert [worker.number for worker in supervisor.workers] == list(range(1, MAX_PROCS + 1))


IN_THE_BACKGROUND = (
    "import os, signal; signal.signal(signal.SIGTTOU, signal.SIG_DFL); "
    "terminal = os.open('/dev/tty', os.O_RDWR); child = os.fork()\n"
    "if child: os.waitpid(child, 0); raise SystemExit\n"
    "os.setpgid(0, 0); import sys; os.close(terminal); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_tostop_sigttou_does_not_remove_worker(start: Start) -> None:
    """With `stty tostop` the terminal sends TTOU to the group of each process that writes from the background."""
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
    assert fleet.count("log worker.exited .*reason=drained") == 3
