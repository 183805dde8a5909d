"""The supervisor with real forks: starts, stops and deaths of workers; and its command line."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fix_supervisor import OWN_TERMINAL, PATIENCE, Start
from paths import PYTHONPATH

from pgtask._cli.supervisor import main
from pgtask._settings import SETTINGS
from pgtask._supervisor.parent import MAX_FORKS, Supervisor
from pgtask._supervisor.states import STOP_MARGIN, Event
from pgtask.config import Config

pytestmark = pytest.mark.timeout(120)


# --- stopping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_term_and_int_drain(start: Start, number: signal.Signals) -> None:
    fleet = start("obedient", procs=3)
    fleet.ready(3)
    fleet.signal(number)
    assert fleet.end() == 0
    assert fleet.count("SIGTERM") == 3
    assert fleet.count("log worker.exited .*reason=drained") == 3
    again = {"SIGTERM": "a second signal", "SIGINT": "Ctrl-C again"}[number.name]
    hint = f'hint="waiting up to 5 s for the steps that run; {again} stops now"'
    assert fleet.count(f"log supervisor.stopping cause={number.name} now=false {hint}") == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_second_signal_stops_now(start: Start, second: signal.Signals) -> None:
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


def test_workers_swallow_interrupt_of_terminal(start: Start) -> None:
    fleet = start("obedient", procs=2)
    fleet.ready(2)
    os.killpg(fleet.pid, signal.SIGINT)
    assert fleet.end() == 0
    assert fleet.count("SIGTERM") == 2


@pytest.mark.parametrize("progress", [False, True])
def test_hup_of_closed_terminal_drains(start: Start, progress: bool) -> None:
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


def test_signal_without_meaning_is_logged_and_ignored(start: Start) -> None:
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


def test_usr1_logs_status_of_each_worker(start: Start) -> None:
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


def test_worker_that_ignores_stop_is_killed_after_grace(start: Start) -> None:
    fleet = start("deaf", procs=2, grace=0.2)
    fleet.ready(2)
    told = time.monotonic()
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert time.monotonic() - told >= 0.2 + STOP_MARGIN
    assert fleet.count("log worker.overdue") == 2
    assert fleet.count("log workers.killed workers=2 hint=.* their tasks were released") == 1
    assert fleet.count("log worker.exited .*signal=SIGKILL") == 2


def test_starting_worker_is_stopped(start: Start) -> None:
    fleet = start("silent", procs=2)
    fleet.wait_for("booting", 2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


@pytest.mark.parametrize(
    "attempt", [pytest.param(attempt, marks=[pytest.mark.faults] if attempt % 5 else []) for attempt in range(30)]
)
def test_stop_during_fork_is_not_lost(start: Start, attempt: int) -> None:
    fleet = start("obedient", procs=8)
    fleet.wait_for("log supervisor.started")
    until = time.perf_counter() + attempt * 0.0005
    while time.perf_counter() < until:
        pass
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert not fleet.count("log worker.(died|overdue)")


@pytest.mark.parametrize(
    ("event", "took", "left"),
    [(Event.STOP, 0, 4.0), (Event.STOP, 13, 1.75), (Event.STOP, 60, 0.5), (Event.QUIT, 0, 4.0), (Event.QUIT, 4, 0.75)],
)
def test_reapers_have_what_a_stop_has_left(event: Event, took: float, left: float) -> None:
    supervisor = Supervisor(Config(grace=10.0), lambda *_, **__: 0)
    supervisor.workers = []
    before = time.monotonic()
    supervisor.stop(event, "SIGTERM")
    late = time.monotonic() - before
    supervisor.stop(Event.STOP, "SIGTERM")  # does not prolong it
    assert supervisor.reapers_end(before + took) - before - took == pytest.approx(left, abs=late + 1e-6)


def test_reapers_have_time_at_the_end_of_a_burst() -> None:
    assert Supervisor(Config(), lambda *_, **__: 0).reapers_end(100.0) == 104.0


def test_signals_are_read_between_forks_of_many_workers(start: Start) -> None:
    fleet = start("obedient", procs=100, log_level="debug", stop_at="worker.started")
    assert fleet.end() == 0
    assert fleet.count("log worker.started") == MAX_FORKS


def test_stop_notice_of_one_worker_drains_all(start: Start) -> None:
    fleet = start("is_notified", procs=3)
    assert fleet.end() == 0
    assert fleet.count("log worker.exited .*reason=notified") == 1
    assert fleet.count("log supervisor.stopping cause=stop_worker") == 1


# --- the parent dies ----------------------------------------------------------------------------------------


def test_workers_drain_when_parent_is_killed(start: Start) -> None:
    fleet = start("obedient", procs=4)
    fleet.ready(4)
    fleet.signal(signal.SIGKILL)
    assert fleet.end() == -signal.SIGKILL
    assert fleet.count("orphaned") == 4


def test_replacements_notice_end_of_parent(start: Start) -> None:
    fleet = start("obedient", procs=3)
    for killed in fleet.ready(3):
        os.kill(killed, signal.SIGKILL)
    fleet.ready(6)
    fleet.signal(signal.SIGKILL)
    fleet.end()
    assert fleet.count("orphaned") == 3


# --- workers die --------------------------------------------------------------------------------------------


def test_killed_worker_is_replaced(start: Start) -> None:
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
def test_sigchld_ignored_by_parent_does_not_hide_worker_death(start: Start, spoilt: str) -> None:
    fleet = start("obedient", procs=1, prefix=("env", f"--{spoilt}-signal=CHLD"))
    (before,) = fleet.ready(1)
    os.kill(before, signal.SIGKILL)
    fleet.wait_for("log worker.died .* signal=SIGKILL")
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_worker_that_keeps_dying_is_replaced_with_backoff(start: Start) -> None:
    fleet = start("obedient", procs=1)
    for turn in range(1, 5):
        os.kill(fleet.ready(turn)[-1], signal.SIGKILL)
    fleet.ready(5)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    delays = [float(delay) for _, what in fleet.lines for delay in re.findall(r"restart_in=(\S+)", what)]
    for delay, full in zip(delays, [0.1, 0.2, 0.4, 0.8], strict=True):
        assert full / 2 - 0.02 <= delay <= full


def test_worker_that_crashes_at_boot_is_started_again(start: Start) -> None:
    fleet = start("crashes_once", procs=1)
    fleet.ready(1)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log worker.died .*signal=SIGSEGV") == 1
    assert "Fatal Python error: Segmentation fault" in fleet.stderr()


def test_exit_of_user_code_stops_no_other_worker(start: Start) -> None:
    fleet = start("exits_on_its_own", procs=1)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log worker.died .*exit=5 restart_in") == 1


def test_unexpected_error_of_ready_worker_logs_traceback(start: Start) -> None:
    fleet = start("breaks_later", procs=1)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count('log worker.died .*exit=3 error="TypeError: a bug of ours"') == 1
    assert "Traceback" in fleet.stderr()


def test_process_that_holds_status_pipe_does_not_hide_death(start: Start) -> None:
    fleet = start("holds_its_pipe", procs=1)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_foreign_children_are_reaped_and_ignored(start: Start) -> None:
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
def test_boot_failure_stops_supervisor(start: Start, behaviour: str, code: int, message: str) -> None:
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
def test_app_that_cannot_be_loaded_stops_supervisor(start: Start, app: str, message: str) -> None:
    fleet = start("obedient", procs=3, app=app)
    assert fleet.end() == 4
    assert fleet.output()[0] == message
    assert "Traceback" not in fleet.stderr()


def test_boot_failure_logs_traceback_at_debug(start: Start) -> None:
    fleet = start("fails_at_boot", procs=1, log_level="debug")
    assert fleet.end() == 3
    assert "Traceback" in fleet.stderr()


def test_ready_worker_that_database_refuses_is_started_again(start: Start) -> None:
    fleet = start("is_refused_later", procs=3)
    fleet.ready(4)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log worker.refused .*error=.permission denied. restart_in") == 1
    assert not fleet.count("log worker.died")


@pytest.mark.parametrize("procs", [2, 3])
def test_worker_refused_beside_others_is_started_again(start: Start, tmp_path: Path, procs: int) -> None:
    """Also one that was never ready, since another was."""
    refused = "log worker.refused .*error=.no more sessions. restart_in"
    fleet = start("is_refused_for_a_while", procs=procs)
    fleet.ready(1)
    (tmp_path / "answer").write_text("refused")
    fleet.wait_for(refused, 2 * (procs - 1))
    (tmp_path / "answer").write_text("granted")
    last = fleet.ready(procs)[-1]
    (tmp_path / "answer").write_text("refused")
    os.kill(last, signal.SIGKILL)
    fleet.wait_for(refused, fleet.count(refused) + 4)
    (tmp_path / "answer").write_text("granted")
    fleet.ready(procs + 1)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("log worker.died") == 1


# --- the child after the fork -------------------------------------------------------------------------------


def test_worker_holds_no_descriptor_of_parent_or_sibling(start: Start) -> None:
    fleet = start("lists_descriptors", procs=3)
    first = fleet.ready(3)[0]
    os.kill(first, signal.SIGKILL)
    fleet.ready(4)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert {what for _, what in fleet.lines if what.startswith("descriptors")} == {"descriptors 9"}


def test_worker_inherits_no_signal_state_of_parent(start: Start, tmp_path: Path) -> None:
    fleet = start("shows_itself", procs=2)
    fleet.ready(2)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    one, other = (json.loads(what.removeprefix("self ")) for _, what in fleet.lines if what.startswith("self "))
    assert one.pop("random") != other.pop("random")
    assert one == other
    assert one == {
        "path": str(tmp_path),
        "ignored": [],
        "blocked": 0,
        "wakeup": -1,
    }


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
def test_usage_error_is_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
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


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
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
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [path or directory, PYTHONPATH]))},
    )


@pytest.mark.parametrize("procs", ["1", "3"])
def test_command_prints_failure_once(empty: Path, procs: str) -> None:
    done = command(empty, "nowhere:app", "--procs", procs, "--dsn", "postgresql:///x", "--log-level", "error")
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr == ("pgtask-supervisor: app 'nowhere:app': no module named 'nowhere' here or on the path\n")


def test_command_logs_failure_in_json(empty: Path) -> None:
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
def test_malformed_app_is_refused_before_database_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, app: str, hint: str
) -> None:
    def too_early() -> str:
        raise AssertionError

    monkeypatch.setattr("pgtask._cli.supervisor.configure", lambda *_: None)
    monkeypatch.setattr("pgtask._cli.supervisor._start_embedded", too_early)
    assert main([app]) == 4
    assert capsys.readouterr().err == f"pgtask-supervisor: app {app!r} is not of the form module:attribute{hint}\n"


def test_app_that_cannot_be_loaded_starts_no_server(empty: Path) -> None:
    (empty / "broken.py").write_text("1 / 0\n")
    done = command(empty, "broken:app")
    assert (done.returncode, done.stdout) == (4, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("pgtask-supervisor: app 'broken:app': importing it failed: ZeroDivisionError")
    assert not (empty / ".pgtask").exists()


def test_interrupt_before_first_worker_is_quiet(empty: Path) -> None:
    """The import of uvloop is the last one before the first worker."""
    (empty / "uvloop.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = command(empty, "greetings:app", "--dsn", "postgresql:///x", path=empty)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
