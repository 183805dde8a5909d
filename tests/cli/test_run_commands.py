"""The commands about runs, in this process, on runs in each state."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flows
import pytest
from fix_commands import Command
from fix_database import run
from fleet import Fleet, Rows
from marks import MARKS

from pgtask import Client, RunFailed
from pgtask._cli.commands.resume import NOTHING_TO_RESUME
from pgtask._cli.quantities import format_elapsed

ABSENT = "00000000-0000-7000-8000-000000000000"


@pytest.fixture
def runs(dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Runs that have ended well, failed, and wait; a fleet is there for what comes."""
    monkeypatch.setenv("PGTASK_DSN", dsn)
    Rows(dsn)(MARKS)

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
    assert shown["input"] == "21"
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


def test_first_or_last_digits_name_a_run(runs: dict[str, str], command: Command, dsn: str) -> None:
    done, failed, waiting = (runs[name] for name in ("done", "failed", "waiting"))
    for digits in (done[-8:], done[:-4], done[-12:].upper()):
        assert command("run", digits, "--json").objects[0]["id"] == done
    assert command("signal", waiting[-8:], "x").out.startswith("sent; kept until the run waits for it")
    assert command("resume", failed[-8:], failed).out == "1 run resumed\n"
    before = [row["id"] for row in command("runs", "--before", waiting[-8:], "--json").objects]
    assert before == [row["id"] for row in command("runs", "--before", waiting, "--json").objects]
    said = command("show", done)
    assert (said.code, said.err) == (1, f"pgtask: {done}: it is a run that has ended: pgtask run {done}\n")
    for words in (["run"], ["resume"], ["signal"], ["runs", "--before"]):
        said = command(*words, "00000000", *(["x"] if words == ["signal"] else []))
        assert (said.code, said.err) == (1, "pgtask: 00000000: there is no such run\n")
    rows = Rows(dsn)
    first, *_ = rows("SELECT id::text FROM pg_task_runs ORDER BY id LIMIT 1")
    twin = first[0][:-12] + "f" * 12
    rows("INSERT INTO pg_task (id, step, wakeup_at) VALUES ($1, $2, '9000-01-01')", twin, '{"child":{"Run":1}}')
    said = command("run", first[0][:-12])
    assert said.code == 1
    assert said.err.startswith(f"pgtask: {first[0][:-12]}: more than one run has these digits, give more of them:\n")
    assert f"pgtask:   {twin}  QUEUED" in said.err


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


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0 us"),
        (66.4e-6, "66.4 us"),
        (0.0009996, "1 ms"),
        (0.0123, "12.3 ms"),
        (0.9999, "1 s"),
        (2.5, "2.5 s"),
        (119.4, "119 s"),
        (121.0, "2 min 1 s"),
        (3 * 3600 + 65.0, "3 h 1 min"),
    ],
)
def test_elapsed_time_is_shown_in_a_fitting_unit(seconds: float, shown: str) -> None:
    assert format_elapsed(seconds) == shown


def test_unread_signals_are_shown(dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)

    async def make() -> str:
        async with Client(dsn) as client:
            started = await client.trigger(flows.child, 1)
            for number in range(3):
                await started.signal("item", number)
            await started.signal("stop")
            return str(started.id)

    id = run(make())
    assert fields(command("run", id).out)["signals"] == "3 item, 1 stop, not taken"
    with Fleet(dsn, "--burst", app="flows:app") as fleet:
        assert fleet.ends() == 0
        assert 'step=child.Run signals=4 names="3 item, 1 stop"' in fleet.output
    assert fields(command("run", id).out)["signals"] == "3 item, 1 stop, not taken before it ended"
    (row,) = command("run", id, "--json").objects
    assert (row["unread_signals"], row["input"], row["output"]) == ({"item": 3, "stop": 1}, 1, 2)
    said = command("signal", id, "item", "4")
    words = "finished, cancelled, or never existed; the signal was not sent"
    assert (said.code, said.err) == (1, f"pgtask: {id}: {words}\n")


SIGNALLED = """
from __future__ import annotations
import msgspec
from typing import Any
from pgtask import App, WorkflowContext, workflow

class Approval(msgspec.Struct):
    approved: bool

GO = "go"

async def helper(ctx: WorkflowContext) -> int:
    return await ctx.wait_for_signal(name="number", type=int)

@workflow("typed")
async def typed(ctx: WorkflowContext) -> None:
    await ctx.wait_for_signal(GO, Approval)
    await ctx.wait_for_signal("either", int)
    await ctx.wait_for_signal("either", type=list[str] | None)
    await ctx.wait_for_signal("untyped")
    await helper(ctx)

@workflow("computed")
async def computed(ctx: WorkflowContext, number: int) -> None:
    await ctx.wait_for_signal(f"go/{number}", int)
    await ctx.wait_for_signal("go", int)

app = App(typed, computed)
"""


@pytest.mark.parametrize(
    ("flow", "name", "value", "wrong"),
    [
        ("typed", "go", '{"approved": true}', None),
        ("typed", "go", '{"approved": 1}', "waits for a Approval as signal go: Expected `bool`, got `int`"),
        ("typed", "go", "17", "Expected `object`, got `int`"),
        ("typed", "either", "17", None),
        ("typed", "either", '["a"]', None),
        ("typed", "either", '"a"', "as signal either"),
        ("typed", "number", '"a"', "waits for a int as signal number: Expected `int`, got `str`"),
        ("typed", "untyped", '"a"', None),
        ("typed", "unknown", '"a"', None),
        ("computed", "go", '"a"', None),
    ],
)
def test_signal_of_a_wrong_type_is_refused_with_a_known_app(
    dsn: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flow: str,
    name: str,
    value: str,
    wrong: str | None,
) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "signalled_app.py").write_text(SIGNALLED)
    rows = Rows(dsn)
    id = str(rows.value("INSERT INTO pg_task (step) VALUES ($1) RETURNING id", f'{{"{flow}":{{"Run":1}}}}'))
    monkeypatch.setenv("PGTASK_APP", "signalled_app:app")
    said = command("signal", id, name, value)
    sent = rows.value("SELECT count(*) FROM pg_task_signals")
    sys.modules.pop("signalled_app", None)
    if wrong is None:
        assert (said.code, sent) == (0, 1), said.err
    else:
        assert (said.code, sent) == (2, 0)
        assert wrong in said.err
        assert said.err.endswith("it was not sent\n")


def test_signal_is_sent_unchecked_without_a_loadable_app(
    dsn: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTASK_DSN", dsn)
    id = str(Rows(dsn).value("INSERT INTO pg_task (step) VALUES ($1) RETURNING id", '{"pick":{"Run":1}}'))
    monkeypatch.setenv("PGTASK_APP", "no_such_module_here:app")
    said = command("signal", id, "go", "1")
    assert said.code == 0
    assert said.err.startswith("pgtask: the value of the signal is not checked: ")
