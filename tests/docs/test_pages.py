"""The programs of the pages on FastAPI, on pipelines and on traces: pasted into a file, they run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fleet import Rows
from paths import REPOSITORY

POST = """
from fastapi.testclient import TestClient
from documents import server
with TestClient(server) as client:
    print(client.post("/documents/17").json())
"""


def paste(page: str, number: int, path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / page).read_text(), re.DOTALL | re.MULTILINE)
    path.write_text(blocks[number])


def said_by(directory: Path, dsn: str, *words: str) -> str:
    environment = {**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": f"{REPOSITORY}:{directory}"}
    command = [sys.executable, *words]
    done = subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def burst(directory: Path, dsn: str, app: str) -> str:
    return said_by(directory, dsn, "-m", "pgtask._cli.supervisor", app, "--procs", "1", "--burst")


def test_the_server_of_the_page_enqueues_and_a_worker_parses(dsn: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    paste("docs/fastapi.md", 0, tmp_path / "documents.py")
    id = said_by(tmp_path, dsn, "-W", "ignore", "-c", POST).strip()
    assert [str(row["id"]) for row in Rows(dsn)("SELECT id FROM pg_task")] == [id]
    assert "document 17 is parsed\n" in burst(tmp_path, dsn, "documents:app")


@pytest.mark.parametrize(
    ("number", "table", "words", "left"),
    [
        (
            0,
            "CREATE TABLE vector (id bigint PRIMARY KEY, vector float8[])",
            ("Embed", '{"id": 1, "model": "m", "text": "four"}'),
            "SELECT vector[1]::int FROM vector",
        ),
        (
            1,
            "SELECT",
            ("List", '{"urls": ["a", "b"]}'),
            "SELECT count(*) * 2 FROM pg_task WHERE key LIKE 'Crawl/again %'",
        ),
        (
            2,
            "CREATE TABLE line (number int, text text)",
            ("Line", '{"number": 4, "text": "x"}'),
            "SELECT number FROM line",
        ),
    ],
)
def test_the_pipelines_of_the_page_run(
    number: int, table: str, words: tuple[str, str], left: str, dsn: str, tmp_path: Path
) -> None:
    paste("docs/pipelines.md", number, tmp_path / "pipeline.py")
    rows = Rows(dsn)
    rows(table)
    if number == 0:
        assert table in (REPOSITORY / "docs/pipelines.md").read_text()
    said_by(tmp_path, dsn, "-m", "pgtask", "enqueue", "pipeline:app", *words)
    burst(tmp_path, dsn, "pipeline:app")
    assert rows.value(left) == 4
    assert rows.value("SELECT count(*) FROM pg_task WHERE error IS NOT NULL") == 0


def test_the_programs_of_the_page_on_traces_make_one_trace(dsn: str, tmp_path: Path) -> None:
    paste("docs/traces.md", 0, tmp_path / "orders.py")
    paste("docs/traces.md", 1, tmp_path / "request.py")
    said = said_by(tmp_path, dsn, "request.py") + burst(tmp_path, dsn, "orders:app")
    names = re.findall(r'^    "name": "(.*)"', said, re.MULTILINE)
    assert sorted(names) == ["POST /orders", "process default", "send default", "weigh"]
    assert len(set(re.findall(r'"trace_id": "(.*)"', said))) == 1
