"""Processes that steps fork and programs that they start: they inherit nothing of the worker, and do not outlive it.
Also exit handlers in a worker that leaves, and a worker that leaves without a request of its supervisor."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import msgspec
import psutil
import pytest
from fix_database import run
from fleet import Fleet, Rows, burst, put, until_none, working

from pgtask import Client
from pgtask._supervisor.child import NO_EXEC, ChildProcess
from pgtask._supervisor.states import Slot

pytestmark = pytest.mark.timeout(120)


def run_steps(dsn: str, *steps: Any, procs: int = 1, grace: str = "30") -> Fleet:
    """Run these steps to their end, in order and without a failure."""
    put(dsn, *steps)
    return burst(dsn, "--burst-horizon", "1", "--grace", grace, app="forks:app", procs=procs)


def marks(rows: Rows) -> list[str]:
    return [row[0] for row in rows("SELECT step FROM mark ORDER BY at")]


def lines(path: Path, holds: Callable[[list[str]], bool] = bool) -> list[str]:
    """The lines of a file, once they satisfy `holds`."""
    deadline = time.monotonic() + 30
    while not holds(found := path.read_text().splitlines() if path.exists() else []):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def gone(pids: list[int]) -> None:
    """Wait until none of these is there, or only as a zombie."""

    def left() -> list[psutil.Process]:
        found = []
        for pid in pids:
            try:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    until_none(left)


def test_ctrl_c_that_interrupts_a_program_costs_no_try(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """A terminal sends it to the whole process group, the programs of steps included."""
    put(dsn, forks.RunsProgram())
    with Fleet(dsn, "--burst", app="forks:app") as fleet:
        lines(tmp_path / "started", lambda _: (tmp_path / "started").exists())
        os.killpg(fleet.process.pid, signal.SIGINT)
        assert fleet.ends() == 130, fleet.output
    assert "task.parked" not in fleet.output
    (row,) = rows("SELECT error, tried, claims FROM pg_task")
    assert (row["error"], row["tried"], row["claims"]) == (None, 0, 0)


# --- a worker that leaves without an order


@pytest.mark.parametrize("order", [signal.SIGTERM, pytest.param(signal.SIGQUIT, marks=pytest.mark.faults)])
def test_worker_stopped_by_another_process_is_replaced(dsn: str, rows: Rows, order: signal.Signals) -> None:
    """One of two, then the last one that is left of a supervisor of one."""
    with working(dsn, procs=2, app="forks:app") as fleet:
        before = {process.pid for process in fleet.family()}
        os.kill(first := min(before), order)
        line = fleet.until("worker.died")
        assert f"pid={first} " in line
        assert "WARN" in line
        assert "without an order of its supervisor" in line
        fleet.until("worker.ready")
        assert len(fleet.family()) == 2
    with working(dsn, "--grace", "1", app="forks:app", order=signal.SIGQUIT) as fleet:
        put(dsn, forks.Waits("first"))
        rows.until("SELECT count(*) = 1 FROM mark")
        os.kill(rows.value("SELECT pid FROM mark"), order)
        fleet.until("worker.died")
        rows.until("SELECT count(DISTINCT pid) = 2 FROM mark")
        assert rows("SELECT tried, claims FROM pg_task") == [(0, 1)], "nothing is charged with it"
    assert "task.suspect" not in fleet.output


def test_worker_stopped_before_ready_is_started_three_times(dsn: str) -> None:
    """It waits for a database that does not answer; what says three times that it cannot start is no success."""
    away = "postgresql://127.0.0.1:1/nowhere"
    with Fleet(away, app="forks:app") as fleet:
        for _ in range(3):
            fleet.until("database.unavailable")
            os.kill(fleet.family()[0].pid, signal.SIGTERM)
        assert fleet.ends() == 3, fleet.output
    assert fleet.output.count("without an order") >= 2


def test_notification_to_stop_ends_the_worker(dsn: str) -> None:
    async def notify() -> None:
        async with Client(dsn) as client:
            await client._postgres._pool.execute("NOTIFY pg_task_changed, 'stop_worker'")

    with Fleet(dsn, app="forks:app", procs=2) as fleet:
        fleet.until("worker.ready", times=2)
        run(notify())
        assert fleet.ends() == 0
    assert "worker.died" not in fleet.output


# --- what is forked


@pytest.mark.parametrize(
    "step",
    [
        forks.Terminates(),
        forks.Breaks(),
        pytest.param(forks.FirstAnswer(), marks=pytest.mark.faults),
        pytest.param(forks.UsesItsOwn(), marks=pytest.mark.faults),
    ],
)
def test_processes_that_a_step_ends_do_not_end_its_worker(dsn: str, rows: Rows, step: forks.Forks) -> None:
    fleet = run_steps(dsn, step, forks.Forked("reports", os.devnull))
    assert fleet.output.count("worker.exited") == 1
    found = {forks.Terminates: [f"{{{-signal.SIGTERM}}}"], forks.Breaks: ["BrokenProcessPool"] * 2}
    assert sorted(marks(rows)) == ["0", *found.get(type(step), [])]
    assert not re.search("ERROR|died|database.unavailable|step.failed", fleet.output)


@pytest.mark.parametrize(
    "step",
    [
        forks.Forked,
        pytest.param(forks.ForkedWhileOthersWait, marks=pytest.mark.faults),
        pytest.param(forks.ForkedInBranch, marks=pytest.mark.faults),
    ],
)
@pytest.mark.parametrize(
    ("what", "code"), [("returns", "0"), ("raises", "1"), ("exits", "7"), ("exits with words", "1"), ("awaits", "0")]
)
def test_forked_process_that_returns_to_worker_code_ends(
    dsn: str, rows: Rows, tmp_path: Path, step: type[forks.Forked], what: str, code: str
) -> None:
    """And runs nothing of what others wait for in the loop, nor what its worker does at its end."""
    others = [forks.ForkedWhileOthersWait("reports", str(tmp_path / "reports")) for _ in range(5)]
    fleet = run_steps(dsn, *others, step(what, str(tmp_path / "path")), *others)
    assert sorted(marks(rows)) == ["0"] * 10 + [code]
    assert not (tmp_path / "path").exists(), "it went on"
    assert not re.search("task.parked|step.failed|worker.failed|worker.bad_message|database.unavailable", fleet.output)
    assert fleet.output.count("worker.exited") == 1
    assert ("LookupError: in the copy" in fleet.output) is (what == "raises")
    assert ("words of the copy" in fleet.output) is (what == "exits with words")


@pytest.mark.parametrize(("what", "code"), [("returns", 0), ("raises", 1), ("exits", 7)])
def test_a_process_that_a_step_forks_in_its_thread_ends_with_it(dsn: str, tmp_path: Path, what: str, code: int) -> None:
    fleet = run_steps(dsn, forks.ForkedInThread(what, str(tmp_path / "path")))
    assert lines(tmp_path / "path") == [f"code {code}"]
    assert "task.parked" not in fleet.output


@pytest.mark.parametrize("flow", [forks.forking, forks.forking_in_thread])
@pytest.mark.parametrize(
    ("what", "code"),
    [("raises", "1"), *(pytest.param(*how, marks=pytest.mark.faults) for how in (("returns", "0"), ("exits", "7")))],
)
def test_process_forked_by_a_workflow_step_records_nothing(dsn: str, flow: Any, what: str, code: str) -> None:
    """From the loop as from a thread, it says why it ends: by its traceback, its exit code, or a line of the log."""

    async def question() -> Any:
        async with Client(dsn) as client:
            return await (await client.trigger(flow, what)).result(timeout=60)

    with working(dsn, app="forks:app") as fleet:
        assert run(question(), timeout=90) == code
    assert not re.search("task.parked|step.failed", fleet.output)
    assert ("LookupError: in the copy" in fleet.output) is (what == "raises")
    assert ("fork.returned" in fleet.output) is (what == "returns")


def test_forked_and_started_processes_inherit_nothing(dsn: str, rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "report"
    run_steps(dsn, forks.Reports(str(path)))
    found: dict[str, Any] = {}
    for line in lines(path):
        found |= msgspec.json.decode(line)
    worker, supervisor = (set(found.pop(name)["links"]) for name in ("worker", "supervisor"))
    assert sum(link.startswith("socket:") for link in worker) >= 4, "of the pump, of LISTEN, of ctx.db, and more"
    assert set(found) == {"forked", "multiprocessing", "popen", "preexec", "open", "asyncio", "asyncio preexec"}
    for name, report in found.items():
        assert report["ignored"] == [], name
        assert report["blocked"] == 0, name
        assert report["handlers"] == {"INT": "default_int_handler"}, name
        assert report["wakeup"] == -1, name
        assert not report["faulthandler"], name
        has = set(report["links"])
        shared = {link for link in worker if link.startswith(("socket:", "/memfd:"))}
        shared |= {link for link in supervisor if link.startswith(("socket:", "pipe:"))}  # the other ends of pipes
        assert not has & shared, name


def test_programs_of_a_step_hear_an_interrupt(dsn: str, rows: Rows) -> None:
    run_steps(dsn, forks.Interrupts())
    assert marks(rows) == [f"{[-signal.SIGINT] * 4}"]


def test_programs_inherit_the_signals_that_a_parent_ignores(dsn: str, tmp_path: Path) -> None:
    """By nohup, for example: in the worker, in what it forks, and in the programs that it starts."""
    put(dsn, forks.Reports(str(tmp_path / "report")))
    fleet = Fleet(dsn, "--burst", "--burst-horizon", "1", app="forks:app")
    ignore = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    fleet._command = [sys.executable, "-c", ignore, *fleet._command]
    with fleet:
        assert fleet.ends() == 0, fleet.output
    reports = [json.loads(line) for line in lines(tmp_path / "report")]
    ignored = {name: report["ignored"] for one in reports for name, report in one.items() if "ignored" in report}
    assert {name for name, names in ignored.items() if names != ["HUP"]} <= {"asyncio", "asyncio preexec"}  # libuv


# --- what does not outlive its worker


@pytest.mark.parametrize(
    "end", ["stop", "kill", *(pytest.param(end, marks=pytest.mark.faults) for end in ("stop now", "HUP", "max-tasks"))]
)
def test_processes_of_an_executor_do_not_outlive_their_worker(dsn: str, rows: Rows, tmp_path: Path, end: str) -> None:
    path = tmp_path / "pids"
    arguments = ("--max-tasks", "1") if end == "max-tasks" else ()
    order = signal.SIGQUIT if end == "stop now" else signal.SIGTERM
    with working(dsn, "--grace", "5", *arguments, app="forks:app", order=order) as fleet:
        put(dsn, forks.Crunch(str(path)))
        worker, *children = (int(pid) for pid in lines(path)[0].split())
        assert children
        if end == "HUP":
            fleet.send(signal.SIGHUP)
            fleet.until("reload.done")
        elif end == "max-tasks":
            fleet.until("worker.replaced")
        elif end == "kill":
            put(dsn, forks.Waits())
            rows.until("SELECT count(*) = 1 FROM mark")
            os.kill(worker, signal.SIGKILL)
            fleet.until("leases.released")
            gone(children)
            assert rows.until("SELECT count(*) = 2 FROM mark")
        if not end.startswith("stop"):
            gone([worker, *children])
            fleet.send(signal.SIGQUIT)
            assert fleet.ends() == 0
    gone(children)


def test_release_does_not_wait_for_forks_of_a_dead_worker(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """Not even for one that ignores the order to end: it holds no session of the worker."""
    path = tmp_path / "pids"
    with working(dsn, app="forks:app", order=signal.SIGQUIT) as fleet:
        put(dsn, forks.Hangs("process", str(path)), forks.Waits())
        rows.until("SELECT count(*) = 1 FROM mark")
        children = [int(pid) for pid in lines(path)[0].split()]
        os.kill(rows.value("SELECT pid FROM mark"), signal.SIGKILL)
        try:
            fleet.until("leases.released")
            rows.until("SELECT count(*) = 2 FROM mark")
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)


# --- a file system that cannot be written


@pytest.mark.parametrize("refused", ["directories", "flag", "memfd"])
def test_the_file_for_the_stacks_of_a_crash_needs_no_directory(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """On Linux; elsewhere, or where the kernel refuses, it is a temporary file."""
    create = os.memfd_create

    def memfd_create(name: str, flags: int) -> int:
        if refused == "memfd" or (refused == "flag" and flags & NO_EXEC):
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(name, flags)

    def temporary_file(**_: Any) -> Any:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    if refused != "memfd":
        monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)
    process = ChildProcess(1)
    process.crash.write(b"Current thread 0x1\n")
    assert not os.get_inheritable(process.crash.fileno())
    os.close(process.writer)
    assert process.collect(signal.SIGSEGV, Slot()).stacks == "Current thread 0x1\n"


# --- at exit


AT_EXIT = ["lifespan", "atexit of a step", "atexit of the module"]


def test_worker_runs_exit_handlers_like_python(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "done"
    monkeypatch.setenv("FORKS_LIFESPAN", str(path))
    run_steps(dsn, forks.LeavesToDo(str(path)))
    directory, daemon, *rest = lines(path)
    assert not Path(directory.removeprefix("directory ")).exists()
    gone([int(daemon.removeprefix("daemon "))])
    assert set(rest) == {"queued in a thread", "of a process", *AT_EXIT}
    assert [line for line in rest if line in AT_EXIT] == AT_EXIT


def test_exit_handlers_from_before_the_fork_run_in_supervisor(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "done"
    monkeypatch.setenv("FORKS_LIFESPAN", str(path))
    with working(dsn, "--preload", app="forks:app", procs=2):
        pass
    assert lines(path, lambda found: len(found) == 3) == ["lifespan", "lifespan", "atexit of the module"]


@pytest.mark.parametrize("what", ["atexit", "executor", "process", "thread", "plain thread", "to_thread"])
@pytest.mark.parametrize("end", [pytest.param("burst", marks=pytest.mark.faults), "stop"])
def test_exit_handlers_that_do_not_end_are_cut_short(dsn: str, tmp_path: Path, what: str, end: str) -> None:
    path = tmp_path / "path"
    put(dsn, forks.Hangs(what, str(path)))
    burst = ("--burst", "--burst-horizon", "1") if end == "burst" else ()
    with Fleet(dsn, "--grace", "1", "--stall", "4", *burst, app="forks:app") as fleet:
        children = [int(pid) for pid in lines(path)[0].split()]
        if end == "stop":
            Rows(dsn).until("SELECT count(*) = 0 FROM pg_task")
            fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0, fleet.output
        gone(children)
    assert ("before" in lines(path)) is (what != "atexit")
    assert ("exit.overdue" in fleet.output) is (what in ("atexit", "process"))
    assert not re.search("worker.died|worker.overdue|worker.silent|workers.killed", fleet.output)
