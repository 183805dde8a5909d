"""What a worker opens for its steps: the lifespan of the app, whose errors name it; and the pool."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from fleet import Fleet, Rows, put

from pgtask import App, Context, Done, Fail, LifespanError, Task
from pgtask._worker.lifespan import opened_resources


class Family(Task):
    pass


class Step(Family):
    async def run(self, ctx: Context) -> Done | Fail:
        return Fail(f"{ctx.db.get_max_size()} connections")


app = App(Family)


def enter(lifespan: Any, error: BaseException | None = None) -> Any:
    """What the steps are given; `error` is raised while they run."""

    async def main() -> Any:
        async with opened_resources(App(Family, lifespan=lifespan)) as resources:
            if error is not None:
                raise error
        return resources

    return run(main())


def test_without_a_lifespan_there_are_no_resources() -> None:
    assert enter(None) is None


def test_what_the_lifespan_yields_are_the_resources() -> None:
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
        enter(lifespan, ZeroDivisionError())  # is not its error
    assert said == ["start", "end"] * 2


def test_an_error_at_the_start_names_the_lifespan_and_the_place() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[int]:
        raise LookupError("no such\nhost")
        yield

    with pytest.raises(LifespanError) as caught:
        enter(lifespan)
    line = lifespan.__wrapped__.__code__.co_firstlineno + 2  # type: ignore[attr-defined]
    assert str(caught.value) == f"the lifespan failed: LookupError: no such host (at {__file__}:{line} in lifespan)"
    assert isinstance(caught.value.__cause__, LookupError)


def test_an_error_at_the_end_names_the_lifespan() -> None:
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
def test_what_is_no_context_manager_is_named(lifespan: Any, message: str) -> None:
    with pytest.raises(LifespanError) as caught:
        enter(lifespan)
    assert str(caught.value).startswith(message)


APP = """
from contextlib import asynccontextmanager
from pgtask import App, Context, Done, Fail, LifespanError, Task

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


def test_a_supervisor_says_that_the_lifespan_failed(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "open('nowhere')").replace("AFTER", ""))
    with Fleet(dsn, app="some_app:app") as fleet:
        assert fleet.ends() == 3
    (line,) = fleet.lines[-1:]
    assert line.startswith("pgtask-supervisor: a worker could not start: the lifespan failed: FileNotFoundError: ")
    assert line.endswith(f" (at {tmp_path / 'some_app.py'}:12 in lifespan)\n")


@pytest.mark.parametrize("procs", [1, 2])
def test_a_burst_whose_lifespan_fails_at_its_end_ends(dsn: str, tmp_path: Path, procs: int) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", "1 / 0"))
    put(dsn, Step())
    with Fleet(dsn, "--burst", app="some_app:app", procs=procs) as fleet:
        assert fleet.ends() == 3
    place = f"(at {tmp_path / 'some_app.py'}:14 in lifespan)"
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
@pytest.mark.parametrize("told", [False, True])
def test_a_lifespan_whose_end_hangs_is_left_when_the_grace_is_over(
    dsn: str, tmp_path: Path, after: str, told: bool
) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", after))
    put(dsn, Step())
    with Fleet(dsn, *([] if told else ["--burst"]), "--grace=0.5", app="some_app:app") as fleet:
        fleet.until("worker.ready")
        if told:
            Rows(dsn).until("SELECT count(*) = 0 FROM pg_task")
            fleet.send(signal.SIGTERM)
        assert fleet.ends(timeout=20) == (0 if told else 3)
    said = "worker.gone" if told else "pgtask-supervisor: "
    (line,) = [line for line in fleet.lines if "the lifespan did not end within the grace" in line]
    assert said in line
    assert "Traceback" not in fleet.output
    assert "worker.died" not in fleet.output
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


@pytest.mark.parametrize("code", ["0", "4", "'bye'"])
def test_a_lifespan_that_exits_at_its_end_has_failed(dsn: str, tmp_path: Path, code: str) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", f"raise SystemExit({code})"))
    put(dsn, Step())
    with Fleet(dsn, "--burst", app="some_app:app") as fleet:
        assert fleet.ends() == 3
    assert fleet.lines[-1].startswith("pgtask-supervisor: the lifespan failed at its end: SystemExit")
    assert fleet.output.count("worker.ready") == 1


def test_a_cancellation_that_passes_is_no_failure_of_the_lifespan() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[int]:
        yield 5

    with pytest.raises(asyncio.CancelledError):
        enter(lifespan, asyncio.CancelledError())


def test_the_traceback_of_a_lifespan_is_there_for_who_debugs(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", "1 / 0"))
    with Fleet(dsn, "--burst", "--log-level=debug", app="some_app:app") as fleet:
        assert fleet.ends() == 3
    assert "pgtask.errors.LifespanError: the lifespan failed at its end: ZeroDivisionError" in fleet.output


@pytest.mark.parametrize("told", ["TERM", "stop_worker"])
def test_a_worker_that_was_told_to_leave_and_fails_at_its_end_is_not_replaced(
    dsn: str, tmp_path: Path, told: str
) -> None:
    (tmp_path / "some_app.py").write_text(APP.replace("BEFORE", "").replace("AFTER", "1 / 0"))
    with Fleet(dsn, app="some_app:app") as fleet:
        fleet.until("worker.ready")
        if told == "TERM":
            fleet.send(signal.SIGTERM)
        else:
            Rows(dsn)("SELECT pg_notify('pg_task_changed', 'stop_worker')")
        assert fleet.ends() == 0
    (line,) = [line for line in fleet.lines if "the lifespan failed" in line]
    assert " ERROR pgtask.supervisor worker.gone " in line
    assert "worker.died" not in fleet.output


def test_a_module_that_cannot_be_imported_is_said_with_its_place(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "some_app.py").write_text("import os\nos.environ['NOWHERE']\n")
    with Fleet(dsn, app="some_app:app") as fleet:
        assert fleet.ends() == 4
    place = f"(at {tmp_path / 'some_app.py'}:2 in <module>)"
    assert fleet.lines[-1].endswith(f"app 'some_app:app': importing it failed: KeyError: 'NOWHERE' {place}\n")


def test_the_pool_of_the_steps_has_the_size_that_was_set(dsn: str) -> None:
    put(dsn, Step())
    with Fleet(dsn, "--burst", "--pool-size=3", app=f"{__name__}:app") as fleet:
        assert fleet.ends() == 1
    assert Rows(dsn).value("SELECT error FROM pg_task") == "3 connections"
