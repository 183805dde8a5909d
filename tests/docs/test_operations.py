"""The operations of docs/operations.md on a real fleet: no task is lost or runs twice, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import apps
import psutil
import pytest
from feeder import OPEN_BURST, feeding
from fleet import Fleet, Rows, assert_nothing_is_left, put, stop, working
from paths import PYTHONPATH

pytestmark = pytest.mark.timeout(120)

CODE = """\
from pgtask import App, Context, Done, Task
from apps import Chain, Odd, mark, resources

class Changing(Task): ...

class Tell(Changing):
    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "{says}")
        return Done()

app = App(Chain, Odd, Changing, lifespan=resources)
"""


def zombies(fleet: Fleet) -> list[psutil.Process]:
    return [process for process in fleet.family() if process.status() == psutil.STATUS_ZOMBIE]


def write_code(directory: Path, says: str) -> None:
    """Write code of a new size too: within one second Python tells versions of a file apart by size only."""
    (directory / "changing.py").write_text(CODE.format(says=says))


def min_ready(lines: list[str]) -> int:
    """Return the minimum of workers that were ready and not told to leave, since the reload."""
    ready: set[str] = set()
    least: int | None = None
    for line in lines:
        pid = (re.findall(r" pid=(\d+)", line) or [""])[0]
        if "worker.ready" in line:
            ready.add(pid)
        elif re.search(r"worker\.(replaced|gone|died|removed)", line):
            ready.discard(pid)
        if "reload.started" in line:
            least = len(ready)
        elif least is not None:
            least = min(least, len(ready))
        if "reload.done" in line:
            break
    assert least is not None
    return least


# --- HUP


@pytest.mark.faults
def test_hup_under_load_loses_nothing_and_leaves_no_gap(dsn: str, rows: Rows) -> None:
    rows(apps.ONCE)
    with feeding(dsn) as fed, Fleet(dsn, *OPEN_BURST, procs=3) as fleet:
        fleet.until("worker.ready", times=3)
        before = {process.pid for process in fleet.family()}
        rows.until("SELECT count(*) > 500 FROM mark")
        fleet.send(signal.SIGHUP)
        fleet.until("reload.done")
        fed.end()
        assert not before & {process.pid for process in fleet.family()}
        stop(fleet, dsn, signal.SIGCONT)
    tasks = fed.count
    assert min_ready(fleet.lines) == 3
    assert rows.value("SELECT count(*) FROM mark") == 3 * tasks
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    assert f"{tasks:,} tasks done, {3 * tasks:,} steps, 0 errors" in fleet.output, "the sums lack the replaced"
    assert not re.search("WARN|ERROR", fleet.output), fleet.output


def test_hup_waits_for_a_running_step(dsn: str, rows: Rows, tmp_path: Path) -> None:
    write_code(tmp_path, "old")
    go = tmp_path / "go"
    with working(dsn, app="changing:app") as fleet:
        put(dsn, apps.UntilFile(str(go)))
        rows.until("SELECT count(*) FROM mark")
        fleet.send(signal.SIGHUP)
        fleet.until("worker.replaced")
        put(dsn, apps.Mark("meanwhile"))
        rows.until("SELECT count(*) FROM mark WHERE step = 'meanwhile'")
        go.touch()
        fleet.until("reload.done")
    assert rows.value("SELECT array_agg(step ORDER BY at) FROM mark") == ["begin", "meanwhile", "end"]
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_hup_loads_fresh_code(dsn: str, rows: Rows, tmp_path: Path) -> None:
    write_code(tmp_path, "old")
    with working(dsn, app="changing:app", procs=2) as fleet:
        insert = 'INSERT INTO pg_task (step) VALUES (\'{"Changing":{"Tell":null}}\')'
        rows(insert)
        rows.until("SELECT count(*) FROM mark WHERE step = 'old'")
        write_code(tmp_path, "brand new")
        fleet.send(signal.SIGHUP)
        fleet.until("reload.done")
        for _ in range(10):
            rows(insert)
        rows.until("SELECT count(*) = 10 FROM mark WHERE step = 'brand new'")
    assert rows.value("SELECT count(*) FROM mark") == 11


def test_hup_with_broken_code_changes_nothing(dsn: str, rows: Rows, tmp_path: Path) -> None:
    write_code(tmp_path, "old")
    with working(dsn, app="changing:app", procs=2) as fleet:
        before = {process.pid for process in fleet.family()}
        (tmp_path / "changing.py").write_text("import nothing_of_this_name\n")
        fleet.send(signal.SIGHUP)
        line = fleet.until("reload.failed")
        assert "no module named 'nothing_of_this_name'" in line
        assert {process.pid for process in fleet.family()} == before
        put(dsn, apps.First(1))
        rows.until("SELECT count(*) = 3 FROM mark")


def test_hup_with_code_that_hangs_changes_nothing(dsn: str, rows: Rows, tmp_path: Path) -> None:
    write_code(tmp_path, "old")
    with working(dsn, "--stall", "4", app="changing:app", procs=2) as fleet:
        before = {process.pid for process in fleet.family()}
        (tmp_path / "changing.py").write_text("import time\ntime.sleep(3600)\n")
        fleet.send(signal.SIGHUP)
        assert re.search(r'File ".*changing\.py", line 2', fleet.until("changing.py"))
        assert "it was silent for too long (see --stall) before it was ready" in fleet.until("reload.failed")
        assert {process.pid for process in fleet.family()} == before
        put(dsn, apps.First(1))
        rows.until("SELECT count(*) = 3 FROM mark")


def test_hanging_import_is_failed_start(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "changing.py").write_text("import time\ntime.sleep(3600)\n")
    with Fleet(dsn, "--stall", "2", app="changing:app", procs=2) as fleet:
        assert fleet.ends() == 3
    assert "a worker could not start: it was silent for too long (see --stall) before it was ready" in fleet.output
    assert "3 times in a row" in fleet.output
    assert re.search(r'File ".*changing\.py", line 2', fleet.output)


# --- number and status of workers


@pytest.mark.faults
def test_workers_are_added_and_removed_under_load(dsn: str, rows: Rows) -> None:
    rows(apps.ONCE)
    with feeding(dsn) as fed, Fleet(dsn, *OPEN_BURST, procs=1) as fleet:
        fleet.until("worker.ready")
        for _ in range(2):
            fleet.send(signal.SIGTTIN)
            fleet.until("worker.ready")
        assert len(fleet.family()) == 3
        for _ in range(2):
            fleet.send(signal.SIGTTOU)
            fleet.until("worker.exited")
        assert len(fleet.family()) == 1
        assert not zombies(fleet)
        fed.end()
        stop(fleet, dsn, signal.SIGCONT)
    assert rows.value("SELECT count(*) FROM mark") == 3 * fed.count
    assert f"{fed.count:,} tasks done, {3 * fed.count:,} steps, 0 errors" in fleet.output


def test_usr1_lists_all_workers(dsn: str, rows: Rows) -> None:
    with working(dsn, procs=2) as fleet:
        put(dsn, *(apps.Noop() for _ in range(100)))
        rows.until("SELECT count(*) = 0 FROM pg_task")
        done = 0
        while done != 100:
            fleet.send(signal.SIGUSR1)
            assert "workers=2 backoff=0 starting=0 ready=2 stopping=0" in fleet.until("supervisor.status")
            lines = [fleet.until("worker.status") for _ in range(2)]
            done = sum(int(re.findall(r" done=(\d+)", line)[0]) for line in lines)
        for line in lines:
            rss, uptime = (float(re.findall(rf" {name}=(\S+)", line)[0]) for name in ("rss_mb", "uptime"))
            assert 10 < rss < 1000
            assert 0 < uptime < 120


# --- limits


def test_max_tasks_replaces_workers_and_loses_nothing(dsn: str, rows: Rows) -> None:
    rows(apps.ONCE)
    with working(dsn, "--max-tasks", "100", procs=2) as fleet:
        with feeding(dsn) as fed:
            for _ in range(2):
                assert re.search(r"worker.replaced .* cause=max-tasks tasks=\d+", fleet.until("worker.replaced"))
        rows.until("SELECT count(*) = 0 FROM pg_task")
        assert len(fleet.family()) <= 3
    assert rows.value("SELECT count(*) FROM mark") == 3 * fed.count
    assert rows.value("SELECT count(DISTINCT pid) FROM mark") >= 2


def test_max_rss_replaces_a_worker_that_leaks(dsn: str, rows: Rows) -> None:
    with working(dsn, "--max-rss", "250", procs=1) as fleet:
        put(dsn, apps.Leaks(250))
        line = fleet.until("worker.replaced")
        assert "cause=max-rss" in line
        assert float(re.findall(r"rss_mb=(\S+)", line)[0]) > 250
        fleet.until("worker.exited")
        assert not zombies(fleet)
        put(dsn, apps.Mark("after"))
        rows.until("SELECT count(*) FROM mark WHERE step = 'after'")
    assert fleet.output.count("worker.replaced") == 1


# --- CPUs and code


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has an affinity")
def test_pin_runs_each_worker_on_one_cpu(dsn: str) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    with working(dsn, "--pin", procs=2) as fleet:
        pinned = sorted(process.cpu_affinity() for process in fleet.family())
        assert pinned == sorted([[allowed[0]], [allowed[1 % len(allowed)]]])


def test_preload_imports_the_app_once(dsn: str, rows: Rows, tmp_path: Path) -> None:
    code = "import os, gc; open('imported', 'a').write(f'{os.getpid()}\\n')\n" + CODE.format(says="preloaded")
    (tmp_path / "changing.py").write_text(code)
    with working(dsn, "--preload", procs=2, app="changing:app") as fleet:
        assert (tmp_path / "imported").read_text().split() == [str(fleet.process.pid)]
        rows('INSERT INTO pg_task (step) VALUES (\'{"Changing":{"Tell":null}}\')')
        rows.until("SELECT count(*) FROM mark WHERE step = 'preloaded'")
        fleet.send(signal.SIGHUP)
        fleet.until("reload.preloaded")
        fleet.until("reload.done")


def test_preload_exempts_shared_objects_from_collector(tmp_path: Path) -> None:
    write_code(tmp_path, "preloaded")
    program = "preload_app('changing:app'); import gc; print(gc.get_freeze_count() > 10_000, gc.isenabled())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"from pgtask._app_import import preload_app; {program}"],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "True True\n", done.stderr


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import nowhere\n", "no module named 'nowhere'"),
        (
            "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n" + CODE,
            "importing it started 1 thread, and a fork does not take threads along",
        ),
    ],
)
def test_app_that_cannot_be_preloaded_is_refused(dsn: str, tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "changing.py").write_text(code)
    with Fleet(dsn, "--preload", app="changing:app") as fleet:
        assert fleet.ends() == 4
    assert says in fleet.output
    assert "Traceback" not in fleet.output


def test_reload_follows_the_source(dsn: str, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    write_code(tmp_path, "one")
    with working(dsn, "--reload", procs=2, app="changing:app") as fleet:
        second = time.time_ns() // 10**9 * 10**9
        for number, says in enumerate(["two", "six"]):  # of the same size, within the same second
            write_code(tmp_path, says)
            os.utime(tmp_path / "changing.py", ns=(second, second + number))
            assert f"changed {tmp_path}/changing.py" in fleet.until("reload.started")
            fleet.until("reload.done")
            rows('INSERT INTO pg_task (step) VALUES (\'{"Changing":{"Tell":null}}\')')
            rows.until("SELECT count(*) FROM mark WHERE step = $1", says)
        (tmp_path / "changing.py").write_text("import part\n" + CODE.format(says="parts"))
        (tmp_path / "part.py").write_text("this is no Python\n")
        fleet.until("reload.failed")
        (tmp_path / "part.py").write_text("")  # no running worker has ever imported it
        fleet.until("reload.done")
        rows('INSERT INTO pg_task (step) VALUES (\'{"Changing":{"Tell":null}}\')')
        rows.until("SELECT count(*) FROM mark WHERE step = 'parts'")


# --- silence


def test_blocking_step_is_named_and_its_worker_replaced(dsn: str, rows: Rows) -> None:
    with working(dsn, "--stall", "4", procs=1) as fleet:
        (task,) = put(dsn, apps.Blocks(600.0))
        assert f" executing=1 tasks={task}" in fleet.until("worker.silent")
        fleet.until("worker.stack")
        assert re.search(r'File ".*apps\.py", line \d+ in run', fleet.until("apps.py"))
        rows("UPDATE pg_task SET error = 'parked by hand'")  # otherwise it would stall the next worker as well
        assert f" executing=1 tasks={task}" in fleet.until("worker.stalled")
        fleet.until("worker.ready")
        put(dsn, apps.Mark("after"))
        rows.until("SELECT count(*) FROM mark WHERE step = 'after'")
        assert not zombies(fleet)
        rows("DELETE FROM pg_task")
    assert rows.value("SELECT count(*) FROM mark WHERE step = 'begin'") == 1
    assert fleet.output.count("worker.silent") == 1


# --- stops


@pytest.mark.parametrize(
    "delay", [0.0, 0.1, 0.3, *(pytest.param(delay, marks=pytest.mark.faults) for delay in (0.2, 0.5, 0.8))]
)
def test_stop_during_boot_leaves_nothing(dsn: str, delay: float) -> None:
    """At each moment from the fork over imports and connections to the first claim, all processes end."""
    put(dsn, *(apps.Noop() for _ in range(100)))
    with Fleet(dsn, "--grace", "600", procs=3) as fleet:
        fleet.until("supervisor.started")
        family = fleet.family()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a moment of the boot to stop at
            fleet.process.wait(delay)
        stop(fleet, dsn)
        assert not [process for process in family if process.is_running()]


@pytest.mark.parametrize("orders", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM], [signal.SIGQUIT]])
@pytest.mark.parametrize("portion", [1500, *(pytest.param(portion, marks=pytest.mark.faults) for portion in (1, 4000))])
def test_stop_during_claims_and_flushes_repeats_nothing(
    dsn: str, rows: Rows, orders: list[signal.Signals], portion: int
) -> None:
    """The unique index makes a step fail that runs twice. QUIT may cancel a step behind its mark: one at most for
    each that was suspended then, and no duplicate either."""
    gentle = orders == [signal.SIGTERM]
    if gentle:
        rows(apps.ONCE)
    with feeding(dsn) as fed, Fleet(dsn, "--concurrency", "20", "--grace", "600", procs=3) as fleet:
        fleet.until("worker.ready", times=3)
        rows.until(f"SELECT count(*) >= {portion} FROM mark")
        for order in orders:
            fleet.send(order)
        assert fleet.ends() == 0, fleet.output
        fed.end()
        assert_nothing_is_left(fleet, dsn)
    assert "worker.died" not in fleet.output
    assert rows.value("SELECT count(*) FROM pg_task WHERE tried > 0 OR claims > 0") == 0
    with Fleet(dsn, "--burst", procs=2) as fleet:
        stop(fleet, dsn, signal.SIGCONT)
    assert rows.value("SELECT count(*) FROM pg_task") == 0
    twice = rows.value("SELECT count(*) - count(DISTINCT (task, step)) FROM mark")
    assert rows.value("SELECT count(DISTINCT (task, step)) FROM mark") == 3 * fed.count
    assert twice <= (0 if gentle else 3 * 20)


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGQUIT])
def test_stop_during_reload_leaves_nothing(dsn: str, rows: Rows, tmp_path: Path, order: signal.Signals) -> None:
    """The reload is not done before each worker has left, and one of them has a step that waits."""
    put(dsn, apps.UntilFile(str(tmp_path / "go")))
    with feeding(dsn) as fed, Fleet(dsn, procs=2) as fleet:
        fleet.until("worker.ready", times=2)
        rows.until("SELECT count(*) > 1 AND bool_or(step = 'begin') FROM mark")
        fleet.send(signal.SIGHUP)
        fleet.until("reload.started")
        fleet.send(order)
        fleet.until("supervisor.stopping")
        (tmp_path / "go").touch()
        assert fleet.ends() == 0, fleet.output
        fed.end()
        assert_nothing_is_left(fleet, dsn)
    assert "reload.done" not in fleet.output


def test_step_that_ignores_stop_ends_soon_after_grace(dsn: str, rows: Rows) -> None:
    with Fleet(dsn, "--grace", "0.5", procs=1) as fleet:
        fleet.until("worker.ready")
        put(dsn, apps.Blocks(600.0))
        rows.until("SELECT count(*) FROM mark")
        fleet.send(signal.SIGTERM)
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
        assert not fleet.family()


# --- the database


def test_refused_connection_names_source_of_dsn(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = dsn.replace("postgres@", "nobody:secret@", 1)
    monkeypatch.setenv("DATABASE_URL", nowhere)
    with Fleet(None) as fleet:
        assert fleet.ends() == 5
    shown = nowhere.replace("secret", "***")
    assert fleet.lines[-1].startswith("pgtask-supervisor: ")
    assert fleet.lines[-1].endswith(f" [DATABASE_URL: {shown}]\n")
    assert "secret" not in fleet.output
    with Fleet(dsn, procs=1) as fleet:
        assert "by=--dsn dsn=" in fleet.until("database.named")


def test_remedy_of_missing_schema_is_complete_command(empty_dsn: str) -> None:
    with Fleet(empty_dsn) as fleet:
        assert fleet.ends() == 5
    assert fleet.lines[-1].endswith(f": pgtask migrate --dsn {shlex.quote(empty_dsn)}\n")
