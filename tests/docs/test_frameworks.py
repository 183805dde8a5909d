"""The examples of FastAPI and Django, with the real libraries, a real server and real supervisors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fleet import Rows, ready
from paths import PYTHONPATH

httpx = pytest.importorskip("httpx")


def python(*words: str, dsn: str, settings: str = "") -> str:
    """Run a module to its end, and return its output."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "DATABASE_URL": dsn}
    if settings:
        environment["DJANGO_SETTINGS_MODULE"] = settings
    command = [sys.executable, "-W", "error", "-m", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Django


def test_shop_has_an_order_and_its_task_or_neither(empty_dsn: str) -> None:
    pytest.importorskip("django")
    said = python("examples.shop_django", dsn=empty_dsn)
    first, refused, second = said.splitlines()
    assert refused == "3 x pot: not in stock; no order, no task"
    ids = [line.rpartition(" ")[2] for line in (first, second)]
    rows = Rows(empty_dsn)
    assert [str(row["id"]) for row in rows("SELECT id FROM pg_task ORDER BY id")] == ids
    assert rows.value("SELECT count(*) FROM shop_django_order") == 2
    settings = "examples.shop_django.settings"
    python("pgtask._cli.supervisor", "--procs", "1", "--burst", dsn=empty_dsn, settings=settings)
    told = python("examples.shop_django", "show", *ids, dsn=empty_dsn)
    assert told.count("confirmed: True") == 2
    assert f"task {ids[0]}: SUCCESSFUL, 'confirmed 2 x cup'" in told


# --- FastAPI


@contextmanager
def serving(dsn: str, tmp_path: Path) -> Iterator[str]:
    """Serve the example by uvicorn; yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.set_inheritable(True)
    command = [sys.executable, "-m", "uvicorn", "examples.progress_fastapi:server", "--fd", str(listener.fileno())]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "DATABASE_URL": dsn}
    log = tmp_path / "uvicorn.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, pass_fds=[listener.fileno()], cwd=tmp_path
        )
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield address
    finally:
        process.terminate()
        code = process.wait(30)
        listener.close()
    assert code in (0, -15), log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def events_of(answer: Any, count: int) -> list[tuple[int, str, Any]]:
    """Read events off a stream, so many or up to its end."""
    found: list[tuple[int, str, Any]] = []
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
        if len(found) == count:
            break
    return found


def test_reader_that_was_cut_off_misses_no_event(dsn: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with (
        serving(dsn, tmp_path) as address,
        ready(dsn, app="examples.progress_fastapi:app"),
        httpx.Client(base_url=address, timeout=30) as http,
    ):
        assert "EventSource" in http.get("/").text
        id = http.post("/reports", params={"seconds": 0.3}).json()["id"]
        path = f"/reports/{id}/events"
        with http.stream("GET", path) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            before = events_of(answer, 2)
        Rows(dsn).until("SELECT count(*) >= 4 FROM pg_task_checkpoints")  # unseen
        with http.stream("GET", path, headers={"Last-Event-ID": str(before[-1][0])}) as answer:
            after = events_of(answer, 99)
        steps = [told for told in before + after if told[1] == "step"]
        assert [number for number, _, _ in steps] == [1, 2, 3, 4, 5]
        assert [data["step"] for _, _, data in steps] == ["fetch", "parse", "count", "index", "publish"]
        assert after[-1][1] == "end"
        assert json.loads(after[-1][2]["output"]) == "fetch parse count index publish"
        assert http.get("/reports/00000000-0000-0000-0000-000000000000/events").status_code == 404
