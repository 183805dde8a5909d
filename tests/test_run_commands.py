"""The commands about runs, in this process, on runs in each state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flows
import pytest
from conftest import run
from fleet import Fleet, Rows
from test_commands import Command, command

from pgtask import Client, RunFailed
from pgtask._cli.runs import NOTHING_TO_RESUME

__all__ = ["command"]

ABSENT = "00000000-0000-7000-8000-000000000000"


@pytest.fixture
def runs(dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Runs that have ended well, failed, and wait; a fleet is there for what comes."""
    monkeypatch.setenv("PGTASK_DSN", dsn)
    Rows(dsn)(flows.MARKS)

    async def make() -> dict[str, str]:
        async with Client(dsn) as client:
            done = await client.trigger(flows.child, 21)
            await done.result(timeout=20)
            failed = await client.trigger(flows.repairable, str(tmp_path / "repaired"))
            with pytest.raises(RunFailed):
                await failed.result(timeout=20)
            waiting = await client.trigger(flows.patient)
            return {"done": str(done.id), "failed": str(failed.id), "waiting": str(waiting.id)}

    with Fleet(dsn, app="flows:app") as fleet:
        fleet.until("worker.ready")
        made = run(make())
        Rows(dsn).until("SELECT count(*) = 3 FROM pg_task WHERE wakeup_at = 'infinity' AND locked_by IS NULL")
        yield made


def fields(page: str) -> dict[str, str]:
    return {line[:11].strip(): line[12:] for line in page.split("\n\n")[0].splitlines()}


def test_runs_lists_and_run_shows(runs: dict[str, str], command: Command) -> None:
    said = command("runs")
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["PAUSED", "PAUSED", "PAUSED", "ERROR", "SUCCESS"]
    assert [row["id"] for row in command("runs", "--state", "ERROR", "--json").objects] == [runs["failed"]]
    assert [row["id"] for row in command("runs", "--name", "child", "--json").objects] == [runs["done"]]
    page = command("runs", "--limit", "1", "--json")
    assert page.err == f"pgtask: there may be more: --before {page.objects[0]['id']}\n"
    assert len(command("runs", "--before", page.objects[0]["id"], "--json").objects) == 4

    shown = fields(command("run", runs["done"]).out)
    assert (shown["state"], shown["workflow"], shown["output"]) == ("SUCCESS", "child, version 1", "42")
    assert shown["input"] == '{"child":{"Run":21}}'
    (row,) = command("run", runs["failed"], "--json").objects
    assert (row["state"], row["last_step"], [step["name"] for step in row["checkpoints"]]) == (
        "ERROR",
        "before",
        ["before"],
    )
    assert "FileNotFoundError" in row["error"]
    assert "waits on    1 children of inner" in command("run", runs["waiting"]).out
    assert command("run", ABSENT) == (1, "", f"pgtask: {ABSENT}: there is no such run\n")


def test_signal_and_resume(runs: dict[str, str], command: Command, dsn: str, tmp_path: Path) -> None:
    rows = Rows(dsn)
    innermost = str(rows.value("SELECT id FROM pg_task_runs WHERE waits_on = 'signal go'"))
    kept = "sent; kept until the run waits for it: now it waits for signal go\n"
    assert command("signal", innermost, "goo", "1") == (0, kept, "")
    assert command("signal", innermost, "go", " 17 ") == (0, "sent\n", "")
    rows.until("SELECT output = '17' FROM pg_task_runs WHERE id = $1", runs["waiting"])
    assert command("signal", runs["done"], "go").code == 1
    assert command("signal", innermost, "go", "{").err.startswith("pgtask: the value of the signal is not valid JSON: ")
    assert command("signal", "x", "go").code == 2

    (tmp_path / "repaired").write_text("well")
    said = command("resume", runs["failed"], runs["done"])
    assert (said.code, said.out) == (1, "1 run resumed\n")
    assert said.err == f"pgtask: {runs['done']}: {NOTHING_TO_RESUME}\n"
    rows.until("SELECT output = '\"well\"' FROM pg_task_runs WHERE id = $1", runs["failed"])


def test_cancel_takes_the_children_and_keeps_the_records(runs: dict[str, str], command: Command, dsn: str) -> None:
    said = command("cancel", runs["waiting"], runs["failed"], runs["done"])
    assert (said.code, said.out) == (1, "2 tasks cancelled\n")
    states: list[Any] = [
        tuple(row) for row in Rows(dsn)("SELECT state, count(*) FROM pg_task_runs GROUP BY 1 ORDER BY 1")
    ]
    assert states == [("CANCELLED", 4), ("SUCCESS", 1)]
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


def test_enqueue_triggers_a_workflow(runs: dict[str, str], command: Command, dsn: str) -> None:
    said = command("enqueue", "flows:app", "child", "5", "--key", "five")
    Rows(dsn).until("SELECT output = '10' FROM pg_task_runs WHERE id = $1", said.out.strip())
    refused = command("enqueue", "flows:app", "child", '"five"')
    assert refused.code == 2
    assert refused.err.startswith("pgtask: the input of workflow child cannot be decoded: Expected `int`, got `str`")
    assert json.loads(command("run", said.out.strip(), "--json").out)["state"] == "SUCCESS"
