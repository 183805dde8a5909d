"""/livez and /readyz of real fleets, and the ways in which metrics cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from counted import Awaits
from exported import ANY_PORT, APP, Exported
from fleet import Fleet, Rows, put, ready, stop, working
from paths import PYTHONPATH

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate
from pgtask.config import load_config
from pgtask.errors import ConfigError


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Path]:
    try:
        asyncio.run(migrate(embedded.start(tmp_path)))
        yield tmp_path
    finally:
        embedded.stop(tmp_path)


def test_ready_follows_the_database_and_live_does_not(own_server: Path) -> None:
    dsn = embedded.start(own_server)
    with ready(dsn, *ANY_PORT, procs=2, app=APP) as fleet:
        exported = Exported(fleet)
        until(lambda: not exported.failed("/readyz"), 5)
        embedded.stop(own_server)
        until(lambda: "database" in exported.failed("/readyz"), 5)
        assert exported.failed("/livez") == {}
        assert exported.samples()["pgtask_database_up",] == 0
        embedded.start(own_server)
        until(lambda: not exported.failed("/readyz"), 5)
        assert exported.samples()["pgtask_database_up",] == 1
        stop(fleet, dsn)


def test_a_supervisor_without_progress_is_not_live(dsn: str) -> None:
    with ready(dsn, *ANY_PORT, app=APP) as fleet:
        exported = Exported(fleet)
        until(lambda: exported.failed("/livez") == {}, 5)
        fleet.send(signal.SIGSTOP)
        until(lambda: "supervisor" in exported.failed("/livez"), 20)
        fleet.send(signal.SIGCONT)
        until(lambda: exported.failed("/livez") == {}, 5)


def test_a_fleet_that_stops_is_not_ready(dsn: str, rows: Rows) -> None:
    put(dsn, Awaits(seconds=3))
    with working(dsn, *ANY_PORT, app=APP) as fleet:
        exported = Exported(fleet)
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL")
        fleet.send(signal.SIGTERM)
        until(lambda: "supervisor" in exported.failed("/readyz"), 3)
        assert exported.failed("/livez") == {}


def test_a_fleet_whose_workers_are_gone_is_not_ready(dsn: str) -> None:
    with ready(dsn, *ANY_PORT, app=APP) as fleet:
        exported = Exported(fleet)
        until(lambda: exported.failed("/readyz") == {}, 5)
        (worker,) = [child for child in fleet.family() if child.name() == "pgtask w1"]
        worker.kill()
        fleet.until("worker.died")
        assert exported.failed("/readyz").get("workers") in ("none of 1 is ready", None)
        until(lambda: exported.failed("/readyz") == {}, 20)


def test_the_backlog_is_never_empty_while_a_task_runs(dsn: str, rows: Rows) -> None:
    put(dsn, Awaits(seconds=1.5))
    with working(dsn, app=APP):

        async def least() -> Any:

            connection = await asyncpg.connect(dsn)
            found = [await connection.fetchval("SELECT pgtask_backlog()") for _ in range(200)]
            await connection.close()
            return min(found)

        assert asyncio.run(least()) == 1


def test_an_unknown_page_names_the_others(dsn: str) -> None:
    with ready(dsn, *ANY_PORT, app=APP) as fleet:
        status, text = Exported(fleet).get("/")
        assert (status, text) == (404, "there are /metrics /livez /readyz /fleet\n")


def test_a_port_in_use_is_one_clear_error(dsn: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Fleet(dsn, "--metrics", f"127.0.0.1:{port}", app=APP) as fleet:
            assert fleet.ends() == 2
    (line,) = fleet.lines
    assert f"--metrics: cannot listen at 127.0.0.1:{port}: it is in use: give another port" in line


def test_a_missing_library_is_named_with_the_remedy(dsn: str, tmp_path: Path) -> None:
    hide = (
        "import sys; sys.modules['prometheus_client'] = None; from pgtask._cli.supervisor import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", hide, APP, "--dsn", dsn, "--metrics", "0"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "pip install 'pgtask-supervisor[metrics]'" in ended.stderr
    assert "supervisor.started" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "address"),
    [("9464", ("", 9464)), ("localhost:9464", ("localhost", 9464)), ("[::1]:0", ("::1", 0)), (9464, ("", 9464))],
)
def test_address_of_the_metrics(text: object, address: tuple[str, int]) -> None:
    assert load_config({"metrics": text}, environ={}).metrics == address


@pytest.mark.parametrize("text", ["", "x", "70000", "-1", "host:", "::1", "::1:9464", True, 1.5])
def test_wrong_address_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"--metrics=.*expected"):
        load_config({"metrics": text}, environ={})
