"""The two web shops and the notebook, with the real libraries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fleet import Fleet, Rows
from paths import REPOSITORY

NOTEBOOK = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
nbclient.NotebookClient(notebook, timeout=60).execute()
for cell in notebook.cells:
    for output in cell.get("outputs", ()):
        print(output["text"], end="")
"""


def said_by(dsn: str, *words: str) -> str:
    environment = {**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "table"), [("shop_fastapi", "fastapi_order"), ("shop_flask", "flask_order")])
def test_an_order_and_its_mail_are_one_transaction(name: str, table: str, dsn: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    rows = Rows(dsn)
    said = said_by(dsn, "-W", "error", "-m", f"examples.{name}")
    assert re.findall(r"^\d+ x (\w+): (\d+)", said, re.MULTILINE) == [("cup", "200"), ("pot", "409"), ("pan", "200")]
    assert said.endswith("orders: 2\n")
    orders = {row["id"]: row["product"] for row in rows(f"SELECT id, product FROM {table}")}
    assert sorted(orders.values()) == ["cup", "pan"]
    assert {row[0] for row in rows("SELECT key FROM pg_task")} == {f"Mails/order {id}" for id in orders}
    with Fleet(dsn, "--burst", app=f"examples.{name}:app") as fleet:
        assert fleet.ends() == 0
    mails = sorted(line.strip() for line in fleet.lines if line.startswith("mail about"))
    counts = {"cup": 2, "pan": 1}
    assert mails == [f"mail about order {id}: {counts[product]} x {product}" for id, product in sorted(orders.items())]


def test_the_notebook_runs_and_says_what_it_says(dsn: str) -> None:
    path = REPOSITORY / "examples/notebook.ipynb"
    assert all(not cell.get("outputs") for cell in json.loads(path.read_text())["cells"]), "it is kept without outputs"
    step = '{"Reports":{"Report":{"day":"2026-11-%s"}}}'
    assert said_by(dsn, "-c", NOTEBOOK, str(path)) == (
        f"True 28\n({step % 29!r}, 'Reports/report 2026-11-29')\n({step % '01'!r}, None)\n"
    )
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 29
