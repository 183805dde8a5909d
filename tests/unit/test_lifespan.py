"""The lifespan of the app, with errors that name it; and the pool of the steps."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from apps import PoolSize
from fix_database import run
from fleet import Fleet, Rows, burst, put

from pgtask import App, Context, Done, Task
from pgtask._worker.lifespan import opened_resources
from pgtask.errors import LifespanError


class Family(Task):
    pass


class Step(Family):
    async def run(self, ctx: Context) -> Done:
        return Done()


def enter(lifespan: Any, error: BaseException | None = None) -> Any:
    """Enter a lifespan and return the resources of the steps; raise `error` while they run."""

    async def main() -> Any:
        async with opened_resources(App(Family, lifespan=lifespan)) as resources:
            if error is not None:
                raise error
        return resources

    return run(main())


def test_without_a_lifespan_there_are_no_resources() -> None:
    assert enter(None) is None


def test_lifespan_yields_the_resources() -> None:
    said = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[int]:
        said.append("start")
        try:
            yield 5
        finally:
            said.append("end")

    assert enter(lifespan) == 5
    assert said == ["start", "end"]
    with pytest.raises(ZeroDivisionError):
        enter(lifespan, ZeroDivisionError())  # the error of a step
    assert said == ["start", "end"] * 2


def test_error_at_start_names_lifespan_and_place() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[int]:
        raise LookupError("no such\nhost")
        yield

    with pytest.raises(LifespanError) as caught:
        enter(lifespan)
    line = lifespan.__wrapped__.__code__.co_firstlineno + 2  # type: ignore[attr-defined]
    assert str(caught.value) == f"the lifespan failed: LookupError: no such host (at {__file__}:{line} in lifespan)"
    assert isinstance(caught.value.__cause__, LookupError)


def test_error_at_end_names_lifespan() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[int]:
        yield 5
        raise KeyError

    with pytest.raises(LifespanError, match=r"^the lifespan failed at its end: KeyError \(at .* in lifespan\)$"):
        enter(lifespan)


@pytest.mark.parametrize(
    ("lifespan", "message"),
    [
        (lambda: 3, "the lifespan returned an object of type int, which is not an async context manager"),
        (lambda: 1 / 0, "the lifespan failed: ZeroDivisionError: division by zero (at "),
    ],
    ids=["3", "1/0"],
)
def test_lifespan_without_context_manager_is_named(lifespan: Any, message: str) -> None:
    with pytest.raises(LifespanError) as caught:
        enter(lifespan)
    assert str(caught.value).startswith(message)


APP = """
from contextlib import asynccontextmanager
from pgtask import App, Context, Done, Fail, Task
from pgtask.errors import LifespanError

class Family(Task): ...
class Step(Family):
    async def run(self, ctx: Context) -> Done:
        return Done()

@asynccontextmanager
async def lifespan():
    BEFORE
    yield
    AFTER

app = App(Family, lifespan=lifespan)
"""


def test_supervisor_reports_failed_lifespan(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "open('nowhere')").replace("AFTER", ""))
    with Fleet(dsn, app="some_app:app") as fleet:
        assert fleet.ends() == 3
    (line,) = fleet.lines[-1:]
    assert line.startswith("pgtask-supervisor: a worker could not start: the lifespan failed: FileNotFoundError: ")
    assert line.endswith(f" (at {tmp_path / 'some_app.py'}:13 in lifespan)\n")


@pytest.mark.parametrize("procs", [1, 2])
def test_burst_ends_when_lifespan_fails_at_end(dsn: str, tmp_path: Path, procs: int) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", "1 / 0"))
    put(dsn, Step())
    with Fleet(dsn, "--burst", app="some_app:app", procs=procs) as fleet:
        assert fleet.ends() == 3
    place = f"(at {tmp_path / 'some_app.py'}:15 in lifespan)"
    error = f"the lifespan failed at its end: ZeroDivisionError: division by zero {place}\n"
    assert fleet.lines[-1] == f"pgtask-supervisor: {error}"
    assert "Traceback" not in fleet.output
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


SWALLOWS = """
    import asyncio
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass
"""


@pytest.mark.parametrize(
    "after",
    ["import asyncio; await asyncio.sleep(1000)", "import time; time.sleep(1000)", SWALLOWS],
    ids=["awaits", "blocks", "swallows its cancellation"],
)
@pytest.mark.parametrize("told", [pytest.param(False, marks=pytest.mark.faults), True])
def test_lifespan_with_hanging_end_is_abandoned_after_grace(dsn: str, tmp_path: Path, after: str, told: bool) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", after))
    put(dsn, Step())
    with Fleet(dsn, *([] if told else ["--burst"]), "--grace=0.5", app="some_app:app") as fleet:
        fleet.until("worker.ready")
        if told:
            Rows(dsn).until("SELECT count(*) = 0 FROM pg_task")
            fleet.send(signal.SIGTERM)
        assert fleet.ends(timeout=20) == (0 if told else 3)
    said = "worker.exited" if told else "pgtask-supervisor: "
    (line,) = [line for line in fleet.lines if "the lifespan did not end within the grace" in line]
    assert said in line
    assert "Traceback" not in fleet.output
    assert "worker.died" not in fleet.output
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


@pytest.mark.parametrize("code", ["0", "4", "'bye'"])
def test_lifespan_that_exits_at_end_has_failed(dsn: str, tmp_path: Path, code: str) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", f"raise SystemExit({code})"))
    put(dsn, Step())
    with Fleet(dsn, "--burst", app="some_app:app") as fleet:
        assert fleet.ends() == 3
    assert fleet.lines[-1].startswith("pgtask-supervisor: the lifespan failed at its end: SystemExit")
    assert fleet.output.count("worker.ready") == 1


def test_cancellation_through_lifespan_is_no_failure_of_it() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[int]:
        yield 5

    with pytest.raises(asyncio.CancelledError):
        enter(lifespan, asyncio.CancelledError())


def test_failed_lifespan_logs_traceback_at_debug(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", "1 / 0"))
    with Fleet(dsn, "--burst", "--log-level=debug", app="some_app:app") as fleet:
        assert fleet.ends() == 3
    assert "pgtask.errors.LifespanError: the lifespan failed at its end: ZeroDivisionError" in fleet.output


@pytest.mark.parametrize("told", ["TERM", "stop_worker"])
def test_stopped_worker_with_failing_lifespan_is_not_replaced(dsn: str, tmp_path: Path, told: str) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", "1 / 0"))
    with Fleet(dsn, app="some_app:app") as fleet:
        fleet.until("worker.ready")
        if told == "TERM":
            fleet.send(signal.SIGTERM)
        else:
            Rows(dsn)("SELECT pg_notify('pg_task_changed', 'stop_worker')")
        assert fleet.ends() == 0
    (line,) = [line for line in fleet.lines if "the lifespan failed" in line]
    assert " ERROR pgtask.supervisor worker.exited " in line
    assert "worker.died" not in fleet.output


def test_failed_import_is_reported_with_its_place(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "some_app.py").write_text("import os\nos.environ['NOWHERE']\n")
    with Fleet(dsn, app="some_app:app") as fleet:
        assert fleet.ends() == 4
    place = f"(at {tmp_path / 'some_app.py'}:2 in <module>)"
    assert fleet.lines[-1].endswith(f"app 'some_app:app': importing it failed: KeyError: 'NOWHERE' {place}\n")


def test_step_pool_has_configured_size(dsn: str) -> None:
    put(dsn, PoolSize())
    burst(dsn, "--pool-size=3", code=1)
    assert Rows(dsn).value("SELECT error FROM pg_task") == "3 connections"
