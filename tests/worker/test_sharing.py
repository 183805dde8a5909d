"""Work is shared: what a worker cannot start now, another one may; and the pump does not sleep on a changed world."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest
import sharing
from fleet import Rows, put, working

pytestmark = pytest.mark.timeout(120)

LATER = pytest.param(sharing.ComputeLater, marks=pytest.mark.faults)
WITHOUT_LISTEN = [(), pytest.param(("--no-listen",), marks=pytest.mark.faults)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    found = tmp_path / "begun"
    found.mkdir()
    return found


def noops_left(rows: Rows, most: int = 0) -> None:
    rows.until("SELECT count(*) FROM pg_task WHERE step LIKE '%Noop%'", holds=lambda count: count <= most)


def until_begun(place: Path, count: int, patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while (found := sharing.begun(str(place))) < count:
        assert time.monotonic() < deadline, f"{found} of {count} have begun"
        time.sleep(0.01)


# --- steps that compute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [sharing.Compute, LATER, sharing.ComputeInThread])
@pytest.mark.parametrize("flags", WITHOUT_LISTEN)
def test_idle_workers_share_few_computing_steps(
    dsn: str, rows: Rows, place: Path, kind: type[sharing.Compute], flags: tuple[str, ...]
) -> None:
    with working(dsn, *flags, procs=4, app="sharing:app"):
        put(dsn, *(kind(str(place), f"task{number}", 4) for number in range(4)))
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert len(sharing.processes(place)) == 4


@pytest.mark.parametrize("kind", [sharing.Compute, sharing.ComputeInThread])
def test_busy_worker_takes_one_computing_step(dsn: str, rows: Rows, place: Path, kind: type[sharing.Compute]) -> None:
    with working(dsn, procs=3, app="sharing:app"):
        put(dsn, *(sharing.Noop(number) for number in range(3000)))
        put(dsn, *(kind(str(place), f"task{number}", 3) for number in range(3)))
        put(dsn, *(sharing.Noop(number) for number in range(3000)))
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert len(sharing.processes(place)) == 3


def test_steps_waiting_in_threads_fill_the_slots(dsn: str, rows: Rows, place: Path) -> None:
    with working(dsn, "--concurrency", "40", app="sharing:app"):
        put(dsn, *(sharing.WaitInThread(str(place), f"task{number}", 40) for number in range(40)))
        rows.until("SELECT count(*) = 0 FROM pg_task")


def test_waiting_threads_do_not_yield_to_a_computing_step(dsn: str, rows: Rows, place: Path) -> None:
    with working(dsn, "--concurrency", "40", app="sharing:app"):
        put(dsn, sharing.ComputeUntil(str(place), "computes"))
        put(dsn, *(sharing.WaitInThread(str(place), f"task{number}", 31) for number in range(30)))
        rows.until("SELECT count(*) = 1 FROM pg_task")
        put(dsn, *(sharing.Noop(number) for number in range(300)))
        noops_left(rows)
        (place / "go").touch()


def test_unwanted_task_starts_beside_a_computing_step(dsn: str, rows: Rows, place: Path) -> None:
    """They share an interpreter, but what lies behind them is not held up for as long as they compute."""
    with working(dsn, app="sharing:app"):
        put(dsn, *(sharing.ComputeUntil(str(place), f"computes{number}") for number in range(2)))
        put(dsn, *(sharing.Noop(number) for number in range(100)))
        noops_left(rows)
        (place / "go").touch()


# --- what was claimed ahead ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", WITHOUT_LISTEN)
def test_prefetch_is_released_behind_long_steps(dsn: str, rows: Rows, place: Path, flags: tuple[str, ...]) -> None:
    with working(dsn, "--concurrency", "10", *flags, procs=2, app="sharing:app"):
        put(dsn, *(sharing.Noop(number) for number in range(8000)))
        put(dsn, *(sharing.Await(str(place), f"await{number}") for number in range(10)))
        put(dsn, *(sharing.Noop(number) for number in range(1000)))
        noops_left(rows)
        assert rows.value("SELECT count(*) FROM pg_task") == 10
        assert not rows("SELECT FROM pg_task WHERE claims <> 1")
        (place / "go").touch()


def test_prefetch_is_released_behind_a_blocked_loop(dsn: str, rows: Rows, place: Path) -> None:
    with working(dsn, procs=2, app="sharing:app"):
        put(dsn, *(sharing.Noop(number) for number in range(6000)))
        put(dsn, sharing.Block(str(place), "blocks"))
        put(dsn, *(sharing.Touch(str(place), f"touch{number}") for number in range(1500)))
        until_begun(place, 1501)
        (place / "go").touch()


def test_released_prefetch_is_as_if_never_claimed(dsn: str, rows: Rows, place: Path) -> None:
    """The last ones are of a class that has not run yet, so they are leased also where the first ones are held."""
    with working(dsn, "--concurrency", "10", app="sharing:app"):
        put(dsn, *(sharing.Noop(number) for number in range(8000)))
        put(dsn, *(sharing.Await(str(place), f"await{number}") for number in range(10)))
        put(dsn, *(sharing.Touch(str(place), f"touch{number}") for number in range(1000)))
        until_begun(place, 10)
        rows.until(
            "SELECT count(*) = 1000 FROM pg_task WHERE step LIKE '%Touch%' AND locked_by IS NULL"
            " AND claims = 0 AND tried = 0 AND wakeup_at <= now()"
        )
        (place / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")


# --- the pump -----------------------------------------------------------------------------------------------------


def test_new_tasks_are_claimed_while_others_start(dsn: str, rows: Rows, place: Path) -> None:
    with working(dsn, app="sharing:app"):
        put(dsn, *(sharing.Await(str(place), f"await{number}", compute=0.01) for number in range(80)))
        until_begun(place, 10)
        put(dsn, *(sharing.Noop(number) for number in range(15)))
        noops_left(rows)
        assert sharing.begun(str(place)) == 80
        (place / "go").touch()


def test_full_pump_continues_with_the_first_free_slot(dsn: str, rows: Rows, place: Path) -> None:
    with working(dsn, "--concurrency", "3", app="sharing:app"):
        put(dsn, *(sharing.Await(str(place), f"await{number}", go=f"go{number}") for number in range(3)))
        rows.until("SELECT count(*) = 3 FROM pg_task WHERE locked_by IS NOT NULL")
        put(dsn, *(sharing.Noop(number) for number in range(50)))
        (place / "go1").touch()
        noops_left(rows)
        for number in (0, 2):
            (place / f"go{number}").touch()


# --- a lack of threads --------------------------------------------------------------------------------------------


def test_steps_without_a_thread_wait_for_one(
    dsn: str, rows: Rows, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARING_THREADS", "3")
    monkeypatch.setenv("SHARING_PLACE", str(place))
    with working(dsn, app="sharing:scarce") as fleet:
        put(dsn, *(sharing.WaitInThread(str(place), f"task{number}", 3) for number in range(30)))
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert fleet.output.count("threads.scarce") == 1
    assert "can't start new thread" in fleet.output
    assert "hint=" in fleet.output
    assert len(sharing.processes(place)) == 1, "the worker has died"
    assert sharing.begun(str(place)) == 30


def test_step_waits_while_there_is_no_thread(
    dsn: str, rows: Rows, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARING_THREADS", "0")
    monkeypatch.setenv("SHARING_PLACE", str(place))
    with working(dsn, app="sharing:scarce") as fleet:
        put(dsn, *(sharing.WaitInThread(str(place), f"task{number}", 1) for number in range(5)))
        fleet.until("threads.scarce")
        put(dsn, *(sharing.Noop(number) for number in range(50)))
        noops_left(rows)
        assert rows.value("SELECT count(*) FROM pg_task WHERE error IS NULL") == 5
        (place / "more").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")


# --- task factories -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", ["followed", "eagerly"])
def test_task_factory_of_the_app_does_not_disturb_worker(dsn: str, rows: Rows, place: Path, app: str) -> None:
    if app == "eagerly" and sys.version_info < (3, 12):
        pytest.skip("eager tasks came with Python 3.12")
    with working(dsn, app=f"sharing:{app}") as fleet:
        put(dsn, *(sharing.Noop(number) for number in range(500)))
        put(dsn, *(sharing.Await(str(place), f"await{number}") for number in range(80)))
        put(dsn, *(sharing.WaitInThread(str(place), f"task{number}", 90) for number in range(10)))
        until_begun(place, 90)
        (place / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert "worker.died" not in fleet.output
    assert len(sharing.processes(place)) == 1


@pytest.mark.parametrize("flags", WITHOUT_LISTEN)
def test_locked_row_does_not_block_the_release_of_others(
    dsn: str, rows: Rows, place: Path, flags: tuple[str, ...]
) -> None:
    async def hold(until: Callable[[], None]) -> None:
        connection = await asyncpg.connect(dsn)
        async with connection.transaction():
            await connection.execute("SELECT FROM pg_task WHERE step LIKE '%held%' FOR UPDATE")
            await asyncio.to_thread(until)
        await connection.close()

    with working(dsn, *flags, procs=2, app="sharing:app") as fleet:
        put(dsn, *(sharing.Noop(number) for number in range(6000)))
        put(dsn, sharing.Block(str(place), "blocks"))
        put(dsn, sharing.Touch(str(place), "held"), *(sharing.Touch(str(place), f"{number}") for number in range(1000)))
        asyncio.run(hold(lambda: until_begun(place, 1001)))
        (place / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
    assert "lease.lost" not in fleet.output


def test_claim_unread_by_a_blocked_loop_is_released(dsn: str, rows: Rows, place: Path) -> None:
    """The claim is held up in the database until the step has blocked the loop."""
    rows(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.locked_by IS NOT NULL AND NEW.step LIKE '%Touch%' THEN PERFORM pg_advisory_xact_lock(7); END IF;"
        " RETURN NEW; END $$"
    )
    rows("CREATE TRIGGER slow BEFORE UPDATE ON pg_task FOR EACH ROW EXECUTE FUNCTION slow()")

    async def hold() -> None:
        connection = await asyncpg.connect(dsn)
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(7)")
            await asyncio.to_thread(put, dsn, sharing.Touch(str(place), "touched"))
            await asyncio.to_thread(until_begun, place, 2)
        await connection.close()

    with working(dsn, app="sharing:app"):
        put(dsn, sharing.BlockLater(str(place), "blocks"))
        until_begun(place, 1)
        asyncio.run(hold())
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE step LIKE '%Touch%' AND locked_by IS NOT NULL")
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE step LIKE '%Touch%' AND locked_by IS NULL AND claims = 0")
        (place / "go").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
