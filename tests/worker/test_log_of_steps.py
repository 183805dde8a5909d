"""The log of a supervisor about steps: failures, ends, and the step that a line of user code comes from."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, Rows, burst, put
from speakers import Speak, SpeakLate

APP = """
from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager

from pgtask import App, Context, Done, Next, Policy, Task, Transient, WorkflowContext, workflow

log = logging.getLogger("shop")


class Shop(Task):
    policy = Policy(retry_limit=1)


class Sell(Shop):
    name: str

    async def run(self, ctx: Context) -> Next[Send]:
        log.info("selling", extra={"name_of_it": self.name, "task": 7})
        await asyncio.gather(speaks("gathered"))
        log.info("sold")
        await asyncio.to_thread(log.info, "in a thread")
        return Next(Send(self.name))


class Send(Shop):
    name: str

    def run(self, ctx: Context) -> Done:
        log.info("sending")
        return Done()


class Break(Shop):
    async def run(self, ctx: Context) -> Done:
        try:
            inner("{")
        except ValueError as error:
            raise RuntimeError("outer\\nsecond line") from error
        return Done()


class BreakInThread(Shop):
    def run(self, ctx: Context) -> Done:
        inner("{")
        return Done()


class Wait(Shop):
    policy = Policy(timeout=__import__("datetime").timedelta(seconds=0.2))

    async def run(self, ctx: Context) -> Done:
        await waits()
        return Done()


async def waits() -> None:
    await asyncio.sleep(600)


async def speaks(what: str) -> str:
    log.info(what)
    return what


def inner(text: str) -> object:
    CONFIGURE_IN_STEP
    return json.loads(text)


@workflow("order", policy=Policy(retry_limit=0))
async def order(ctx: WorkflowContext, bad: bool) -> str:
    await ctx.step("speak", speaks, "in a step")
    log.info("between steps")
    return await ctx.step("count", count, bad)


def count(bad: bool) -> str:
    log.info("counting")
    return str(inner("{" if bad else "1"))


@asynccontextmanager
async def lifespan():
    CONFIGURE_LATE
    yield None


app = App(Shop, order, lifespan=lifespan)
CONFIGURE
"""


def write_app(configure: str = "", *, late: bool = False, in_step: bool = False) -> None:
    text = APP.replace("CONFIGURE_LATE", (late and configure) or "pass")
    text = text.replace("CONFIGURE_IN_STEP", (in_step and configure) or "pass")
    Path("shop.py").write_text(text.replace("CONFIGURE", "" if late or in_step else configure))


def entries_of_burst(dsn: str, *flags: str, app: str = "shop:app", code: int = 0) -> list[dict[str, Any]]:
    """Return the objects that a burst logs."""
    fleet = burst(dsn, "--log=json", *flags, app=app, code=code)
    return [json.loads(line) for line in fleet.lines if line.startswith('{"ts"')]


def insert(dsn: str, *steps: str) -> list[str]:
    rows = Rows(dsn)
    return [str(rows.value("INSERT INTO pg_task (step) VALUES ($1) RETURNING id", step)) for step in steps]


def of(entries: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["event"] == event]


def functions(trace: str) -> list[str]:
    """Return the frames of a traceback by file and function, without those of Python's library."""
    found = re.findall(r'File "(.*)", line \d+, in (\w+)', trace)
    return [f"{Path(file).name} {name}" for file, name in found if "/lib/python" not in file]


# --- failures


@pytest.mark.timeout(120)
def test_parked_task_logs_traceback_without_engine_frames(dsn: str) -> None:
    write_app()
    insert(dsn, '{"Shop":{"Break":null}}', '{"Shop":{"BreakInThread":null}}', '{"order":{"Run":true}}')
    entries = entries_of_burst(dsn, code=1)
    parked = {entry["fields"]["step"]: entry for entry in of(entries, "task.parked")}
    broken = parked["Shop.Break"]
    assert functions(broken["exception"]) == ["shop.py run", "shop.py inner", "shop.py run"]
    assert "The above exception was the direct cause" in broken["exception"]
    assert broken["exception"].endswith("\nRuntimeError: outer\nsecond line")
    said = r"RuntimeError: outer \(at .*/shop.py:\d+ in run\); caused by json.*JSONDecodeError: .* in inner\)"
    assert re.fullmatch(said, broken["fields"]["error"])
    assert functions(parked["Shop.BreakInThread"]["exception"]) == ["shop.py run", "shop.py inner"]
    assert "concurrent" not in parked["Shop.BreakInThread"]["exception"]
    assert functions(parked["order.Run"]["exception"]) == ["shop.py count", "shop.py inner", "shop.py order"]
    assert all("exception" not in entry for entry in of(entries, "step.failed")), "that is for those who debug"
    assert len(of(entries, "step.failed")) == 2
    error = Rows(dsn).value("SELECT error FROM pg_task WHERE step LIKE '%\"Break\"%'")
    assert re.match(r"RuntimeError: outer \(at .*\)\nsecond line\ncaused by json", error)


@pytest.mark.timeout(120)
def test_each_failed_try_logs_traceback_at_debug(dsn: str) -> None:
    write_app()
    insert(dsn, '{"Shop":{"BreakInThread":null}}', '{"order":{"Run":true}}')
    entries = entries_of_burst(dsn, "--log-level=debug", code=1)
    failed = {entry["fields"]["step"]: entry for entry in of(entries, "step.failed")}
    assert functions(failed["Shop.BreakInThread"]["exception"]) == ["shop.py run", "shop.py inner"]
    assert functions(failed["order.Run"]["exception"]) == ["shop.py count", "shop.py inner"]
    fields = failed["order.Run"]["fields"]
    assert (fields["checkpoint"], fields["tried"], fields["retry"]) == ("count", 1, "none")


@pytest.mark.timeout(120)
def test_timeout_shows_the_awaited_line(dsn: str) -> None:
    write_app()
    insert(dsn, '{"Shop":{"Wait":null}}')
    (parked,) = of(entries_of_burst(dsn, code=1), "task.parked")
    assert functions(parked["exception"]) == ["shop.py run", "shop.py waits"]
    assert parked["fields"]["error"] == "Shop.Wait ran longer than its timeout of 0.2 s"


@pytest.mark.timeout(120)
def test_reason_given_as_text_has_no_traceback(dsn: str) -> None:
    write_app()
    insert(dsn, '{"Shop":{"Sell":{"name":7}}}', '{"Shop":[]}')
    parked = of(entries_of_burst(dsn, code=1), "task.parked")
    assert [("exception" in entry) for entry in parked] == [False, False]


# --- ends of steps


@pytest.mark.timeout(120)
def test_finished_step_is_logged_at_debug(dsn: str) -> None:
    write_app()
    task, run = insert(dsn, '{"Shop":{"Sell":{"name":"a"}}}', '{"order":{"Run":false}}')
    assert of(entries_of_burst(dsn), "step.done") == []
    task, run = insert(dsn, '{"Shop":{"Sell":{"name":"a"}}}', '{"order":{"Run":false}}')
    done = [entry["fields"] for entry in of(entries_of_burst(dsn, "--log-level=debug"), "step.done")]
    assert all(0 <= fields.pop("seconds") < 30 for fields in done)
    assert [fields for fields in done if fields["task"] == task] == [
        {"task": task, "step": "Shop.Sell", "outcome": "Next(Send)"},
        {"task": task, "step": "Shop.Send", "outcome": "Done"},
    ]
    assert [fields for fields in done if fields["task"] == run] == [
        {"task": run, "step": "order.Run", "checkpoint": "speak", "outcome": "recorded"},
        {"task": run, "step": "order.Run", "checkpoint": "count", "outcome": "recorded"},
        {"task": run, "step": "order.Run", "outcome": "Done"},
    ]


# --- lines of user code


@pytest.mark.timeout(120)
def test_lines_of_user_code_name_task_and_step(dsn: str) -> None:
    write_app()
    task, run = insert(dsn, '{"Shop":{"Sell":{"name":"a b"}}}', '{"order":{"Run":false}}')
    entries = entries_of_burst(dsn)
    said = {entry["event"]: entry["fields"] for entry in entries if entry["logger"] == "shop"}
    sell = {"task": task, "step": "Shop.Sell"}
    assert said == {
        "selling": {"name_of_it": "a b", "extra.task": 7, **sell},
        "gathered": sell,
        "sold": sell,
        "in a thread": sell,
        "sending": {"task": task, "step": "Shop.Send"},
        "in a step": {"task": run, "step": "order.Run", "checkpoint": "speak"},
        "between steps": {"task": run, "step": "order.Run"},
        "counting": {"task": run, "step": "order.Run", "checkpoint": "count"},
    }
    assert all("task" not in entry["fields"] for entry in entries if entry["logger"] == "pgtask.supervisor")


@pytest.mark.timeout(120)
def test_lines_of_a_thousand_steps_name_the_right_ones(dsn: str) -> None:
    """Some steps suspend, in turns, and others do not, in the same worker."""
    put(dsn, *(Speak(number, suspends=number % 2 == 0) for number in range(1000)))
    entries = entries_of_burst(dsn, app="speakers:app")
    spoken = [entry for entry in entries if entry["logger"] == "speakers"]
    assert len(spoken) == 2000
    by_number: dict[str, set[str]] = {}
    for entry in spoken:
        by_number.setdefault(entry["event"], set()).add(entry["fields"]["task"])
    assert len(by_number) == 1000
    assert all(len(tasks) == 1 for tasks in by_number.values())
    assert len({next(iter(tasks)) for tasks in by_number.values()}) == 1000


@pytest.mark.timeout(120)
def test_step_that_suspends_late_is_named(dsn: str) -> None:
    """Many runs that did not suspend come before, so that the worker has nothing prepared for one that does."""
    put(dsn, *(SpeakLate(number) for number in range(400)))
    entries = entries_of_burst(dsn, app="speakers:app")
    spoken = [entry for entry in entries if entry["logger"] == "speakers"]
    assert len(spoken) == 300 + 100 * 2
    assert all(entry["fields"]["step"] == "Speakers.SpeakLate" for entry in spoken)
    assert len({(entry["event"], entry["fields"]["task"]) for entry in spoken}) == 400


# --- configurations of the app


STDERR = "{'class': 'logging.StreamHandler', 'stream': 'ext://sys.stderr'}"
CONFIGURATIONS = {
    "dictConfig of the root": (
        "import logging.config; logging.config.dictConfig({'version': 1, 'handlers': {'h': " + STDERR + "}, "
        "'root': {'handlers': ['h'], 'level': 'WARNING'}})"
    ),
    "dictConfig of a logger": (
        "import logging.config; logging.config.dictConfig({'version': 1, 'handlers': {'h': " + STDERR + "}, "
        "'loggers': {'other': {'handlers': ['h'], 'propagate': False}}})"
    ),
    "dictConfig that leaves the root nothing": (
        "import logging.config; logging.config.dictConfig({'version': 1, 'root': {'handlers': [], 'level': 'ERROR'}})"
    ),
    "basicConfig": "logging.basicConfig(force=True, level='ERROR')",
    "root level": "logging.getLogger().setLevel('ERROR')",
    "another handler": "logging.getLogger().addHandler(logging.StreamHandler())",
    "no handler": "logging.getLogger().handlers.clear()",
}
FEW = ("dictConfig of the root", "dictConfig that leaves the root nothing", "no handler")
"""Configurations with which the place of the call may matter."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "late"),
    [
        *((name, False) for name in FEW),
        *(pytest.param(name, False, marks=pytest.mark.faults) for name in CONFIGURATIONS if name not in FEW),
        *(pytest.param(name, True, marks=pytest.mark.faults) for name in FEW),
    ],
)
def test_logging_set_up_by_app_keeps_our_lines_once(dsn: str, name: str, late: bool) -> None:
    write_app(CONFIGURATIONS[name], late=late)
    insert(dsn, '{"Shop":{"BreakInThread":null}}')
    with Fleet(dsn, "--burst", "--log=json", app="shop:app") as fleet:
        assert fleet.ends() == 1, fleet.output
    for event in ("step.failed", "task.parked", "worker.ready"):
        assert fleet.output.count(event) == 1, fleet.output
        assert f'"event": "{event}"' in fleet.output


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "step"),
    [
        *((name, "Break") for name in FEW),
        *(pytest.param(name, "Break", marks=pytest.mark.faults) for name in CONFIGURATIONS if name not in FEW),
        *(pytest.param(name, "BreakInThread", marks=pytest.mark.faults) for name in FEW),
    ],
)
def test_logging_set_up_in_step_keeps_our_lines_once(dsn: str, name: str, step: str) -> None:
    write_app(CONFIGURATIONS[name], in_step=True)
    insert(dsn, f'{{"Shop":{{"{step}":null}}}}')
    entries = entries_of_burst(dsn, code=1)
    (parked,) = of(entries, "task.parked")
    assert "JSONDecodeError" in parked["exception"]
    assert len(of(entries, "step.failed")) == len(of(entries, "worker.exited")) == 1


@pytest.mark.timeout(120)
def test_handler_of_app_on_our_logger_takes_our_lines(dsn: str) -> None:
    """A handler that writes elsewhere gets them too."""
    write_app("logging.basicConfig(force=True, filename='all.log', level='DEBUG')")
    insert(dsn, '{"Shop":{"Break":null}}')
    entries = entries_of_burst(dsn, code=1)
    assert len(of(entries, "task.parked")) == 1
    assert Path("all.log").read_text().count("task.parked") == 1


@pytest.mark.timeout(120)
def test_suppressed_lines_are_counted_after_app_closed_handler(dsn: str) -> None:
    write_app(CONFIGURATIONS["dictConfig of the root"])
    insert(dsn, *['{"Shop":{"Nothing":null}}'] * 20)
    (left_out,) = of(entries_of_burst(dsn, "--unknown=park", code=1), "log.suppressed")
    assert left_out["fields"]["suppressed"] == 15


# --- the start, and the terminal


@pytest.mark.timeout(120)
def test_start_event_names_app_queues_and_tasks(dsn: str) -> None:
    write_app()
    with Fleet(dsn, "--queue=mail,default", "--concurrency=7", "--burst", app="shop:app") as fleet:
        assert fleet.ends() == 0
    started = 'supervisor.started procs=1 app=shop:app queues="mail, default" concurrency=7 tasks="Shop, order"'
    assert fleet.output.count(started) == 1
    assert fleet.output.index("supervisor.started") < fleet.output.index("worker.ready")


@pytest.mark.timeout(120)
def test_start_event_is_logged_if_app_does_not_load(dsn: str) -> None:
    Path("shop.py").write_text("1 / 0\n")
    with Fleet(dsn, app="shop:app") as fleet:
        assert fleet.ends() == 4
    assert "supervisor.started procs=1 app=shop:app queues=all concurrency=100\n" in fleet.output
    Path("shop.py").write_text("import time; time.sleep(600)\n")
    with Fleet(dsn, app="shop:app") as fleet:
        fleet.until("supervisor.started procs=1 app=shop:app queues=all concurrency=100\n")


def on_a_terminal(dsn: str, **environment: str) -> str:
    """Return the output of a burst on a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "pgtask._cli.supervisor", "shop:app", "--procs=1", "--burst"]
    with subprocess.Popen(
        command,
        env={**os.environ, "TERM": "xterm", "TZ": "UTC-5", "PGTASK_DSN": dsn, **environment},
        stdout=subprocess.DEVNULL,
        stderr=follower,
        start_new_session=True,
    ) as process:
        os.close(follower)
        shown = b""
        deadline = time.monotonic() + 50
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    shown += os.read(leader, 65536)
                except OSError:  # all processes have closed it
                    break
        process.wait(30)
    os.close(leader)
    return shown.decode()


@pytest.mark.timeout(120)
def test_log_on_terminal_has_form_for_people(dsn: str, tmp_path: Path) -> None:
    write_app()
    (task,) = insert(dsn, '{"Shop":{"Break":null}}')
    coloured = on_a_terminal(dsn)
    (line,) = [line for line in coloured.split("\r\n") if "task.parked" in line]
    short = task.replace("-", "")[-8:]
    assert re.search(r"\x1b\[2m\d\d:\d\d:\d\d\.\d{3}\x1b\[0m \x1b\[33mWARN \x1b\[0m task.parked ", line)
    assert f"task={short} step=Shop.Break " in line
    assert re.search(r'error="RuntimeError: outer \(at shop.py:\d+ in run\); caused by ', line)
    assert 'File "shop.py", line' in coloured
    assert str(tmp_path) not in coloured
    plain = on_a_terminal(dsn, NO_COLOR="1")
    assert not re.search(r"\x1b\[\d*m", plain)
    assert re.search(r"\d\d:\d\d:\d\d\.\d{3} INFO  supervisor.started procs=1", plain)
    insert(dsn, '{"Shop":{"Sell":{"name":"a"}}}')
    assert re.search(r" shop sending task=\w{8} step=Shop.Send", on_a_terminal(dsn, NO_COLOR="1"))
