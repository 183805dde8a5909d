"""Traces: the spans of producers, of tries, batches and steps of workflows, and how they hang together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, Rows
from paths import PYTHONPATH

Span = dict[str, Any]
TRACED = Path(__file__).parent.parent / "support" / "traced.py"


class Spans:
    """The spans of a producer and of a fleet."""

    def __init__(self, found: list[Span]) -> None:
        self._found = found

    def named(self, name: str) -> list[Span]:
        return [span for span in self._found if span["name"] == name]

    def one(self, name: str) -> Span:
        (span,) = self.named(name)
        return span

    def of(self, act: str) -> Spans:
        """Return those in the trace of an act."""
        (trace,) = (span["trace"] for span in self.named("request") if span["attributes"]["act"] == act)
        return Spans([span for span in self._found if span["trace"] == trace])


Tell = Callable[..., Spans]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "spans"
    file.touch()
    monkeypatch.setenv("SPANS", str(file))
    return file


def produce(dsn: str, *acts: str) -> None:
    command = [sys.executable, "-W", "error", str(TRACED), dsn, *acts]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONPATH": PYTHONPATH})


def work(dsn: str, path: str = PYTHONPATH) -> None:
    with Fleet(dsn, "--burst", app="traced:app", path=path) as fleet:
        assert fleet.ends() in (0, 1)  # 1: a task is parked


@pytest.fixture
def tell(dsn: str, file: Path) -> Tell:
    """Enqueue in one process, work in others, and return all spans."""

    def run(*acts: str) -> Spans:
        produce(dsn, *acts)
        work(dsn)
        return Spans([json.loads(line) for line in file.read_text().splitlines()])

    return run


def test_first_try_is_a_child_of_the_producer(tell: Tell) -> None:
    steps = {"plain": "Plain", "suspends": "Suspends", "in a thread": "InThread"}
    found = tell(*steps)
    for act, step in steps.items():
        assert_is_child(found.of(act), step)


def assert_is_child(spans: Spans, step: str) -> None:
    request, send, process = spans.one("request"), spans.one("send q"), spans.one("process q")
    assert (send["parent"], send["kind"]) == (request["id"], "PRODUCER")
    assert (process["parent"], process["kind"], process["links"]) == (send["id"], "CONSUMER", [])
    assert spans.one("inside")["parent"] == process["id"], "the span of the user's code is not below that of the step"
    assert {span["trace"] for span in (send, process, spans.one("inside"))} == {request["trace"]}
    assert process["pid"] != send["pid"]
    task = send["attributes"]["messaging.message.id"]
    assert process["attributes"] == {
        "messaging.system": "pgtask",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "q",
        "messaging.message.id": task,
        "pgtask.step": f"Traced.{step}",
        "pgtask.attempt": 1,
        "pgtask.outcome": "Done",
    }
    same = {"messaging.operation.name": "send", "messaging.operation.type": "send"}
    common = {
        name: value for name, value in process["attributes"].items() if name not in {"pgtask.attempt", "pgtask.outcome"}
    }
    assert send["attributes"] == common | same


def test_retries_are_roots_with_a_link(tell: Tell) -> None:
    spans = tell("fails")
    send, tries = spans.one("send q"), spans.named("process q")
    tries.sort(key=lambda span: span["attributes"]["pgtask.attempt"])
    assert [(span["parent"], span["links"]) for span in tries] == [
        (send["id"], []),
        (None, [send["id"]]),
        (None, [send["id"]]),
    ]
    assert len({span["trace"] for span in tries}) == 3
    assert [(span["status"], span["attributes"].get("error.type")) for span in tries] == [
        ("ERROR", "LookupError"),
        ("ERROR", "LookupError"),
        ("UNSET", None),
    ]


def test_parked_try_has_the_type_of_its_error(tell: Tell) -> None:
    found = tell("too long", "gives")
    for act, kind in (("too long", "StepTimeout"), ("gives", "Fail")):
        process = found.of(act).one("process q")
        assert (process["status"], process["attributes"]["error.type"]) == ("ERROR", kind)


def test_batch_is_one_span_with_links(tell: Tell) -> None:
    spans = tell("together")
    process = spans.one("process q")
    assert process["parent"] is None
    assert sorted(process["links"]) == sorted(send["id"] for send in spans.named("send q"))
    assert process["attributes"]["messaging.batch.message_count"] == 3
    assert spans.one("inside")["parent"] == process["id"]


def test_each_step_is_a_child_of_the_producer(tell: Tell) -> None:
    spans = tell("goes")
    assert [span["parent"] for span in spans.named("process q")] == [spans.one("send q")["id"]] * 2


@pytest.mark.parametrize("act", ["fans", "by client"])
def test_tasks_of_a_step_are_its_children(tell: Tell, act: str) -> None:
    spans = tell(act)
    first, new = spans.one("process q"), spans.named("process default")
    parent = first if act == "fans" else spans.one("send default")
    assert [span["parent"] for span in new] == [parent["id"]] * (2 if act == "fans" else 1)
    if act == "by client":
        assert parent["parent"] == first["id"]


def test_each_way_to_enqueue_is_traced(tell: Tell) -> None:
    tasks = {"many": 4, "many with keys": 2, "key": 1, "rule": 1, "delay": 1, "asyncpg": 1, "sync": 1, "sync many": 2}
    found = tell(*tasks)
    for act, count in tasks.items():
        spans = found.of(act)
        send = spans.one("send default")
        assert send["parent"] == spans.one("request")["id"], act
        assert [span["parent"] for span in spans.named("process default")] == [send["id"]] * count, act
        assert send["attributes"].get("messaging.batch.message_count", 1) == count, act


def test_sync_connection_is_traced(tell: Tell) -> None:
    spans = tell("sync psycopg")
    one, many = spans.named("send default")
    parents = [span["parent"] for span in spans.named("process default")]
    assert sorted(parents) == sorted([one["id"], many["id"], many["id"]])


def test_steps_of_a_workflow_are_spans_below_its_try(tell: Tell) -> None:
    spans = tell("trigger")
    process = spans.one("process default")
    assert process["parent"] == spans.one("send default")["id"]
    steps = [spans.one("first"), spans.one("second")]
    assert [span["parent"] for span in steps] == [process["id"]] * 2
    assert {span["parent"] for span in spans.named("inside")} == {span["id"] for span in steps}


def test_child_runs_are_below_the_try_that_makes_them(tell: Tell) -> None:
    spans = tell("children")
    tries = spans.named("process default")
    send = spans.one("send default")
    above = {span["id"] for span in tries if span["parent"] == send["id"]}  # before its children ran, and after that
    children = [span["parent"] for span in tries if span["attributes"]["pgtask.step"] == "count.Run"]
    assert (len(children), len(set(children))) == (2, 1)
    assert set(children) < above
    assert {span["trace"] for span in tries} == {send["trace"]}


def test_consumer_makes_a_span_for_each_claim_and_try(dsn: str, file: Path) -> None:
    produce(dsn, "plain")
    produce(dsn, "consume")
    spans = Spans([json.loads(line) for line in file.read_text().splitlines()])
    send = spans.one("send q")
    claims = spans.named("receive q")
    assert [(one["kind"], one["links"]) for one in claims] == [("CONSUMER", [send["id"]])] * 2
    first, second = spans.named("process q")
    assert (first["parent"], first["links"], first["trace"]) == (send["id"], [], send["trace"])
    assert (second["parent"], second["links"]) == (None, [send["id"]])
    assert [one["attributes"]["pgtask.attempt"] for one in (first, second)] == [1, 2]
    assert first["attributes"]["pgtask.step"] == "Traced.Plain"
    assert [one["parent"] for one in spans.named("inside")] == [first["id"], second["id"]]


def test_consumer_that_does_not_trace_makes_none(dsn: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    produce(dsn, "plain")
    before = file.read_text()
    monkeypatch.delenv("SPANS")
    produce(dsn, "consume")
    assert file.read_text() == before


PARENT = f"00-{7:032x}-{9:016x}-01"


@pytest.mark.parametrize(
    ("parent", "state", "written"),
    [
        (PARENT, "", PARENT),
        (PARENT, "a=b", f"{PARENT} a=b"),
        (PARENT[:-1] + "0", "", None),
        (f"00-{0:032x}-{9:016x}-01", "", None),
        ("nonsense", "a=b", None),
        ("", "", None),
    ],
)
def test_command_enqueues_into_the_trace_of_its_environment(
    dsn: str, rows: Rows, parent: str, state: str, written: str | None
) -> None:
    environ = {**os.environ, "PGTASK_DSN": dsn, "PYTHONPATH": PYTHONPATH, "TRACEPARENT": parent, "TRACESTATE": state}
    command = [sys.executable, "-m", "pgtask", "enqueue", "traced:app", "Traced.Plain"]
    subprocess.run(command, check=True, timeout=60, env=environ, stdout=subprocess.DEVNULL)
    assert rows.value("SELECT trace FROM pg_task") == written


def test_what_is_not_sampled_has_no_trace(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer decides for all that follows."""
    monkeypatch.setenv("RATIO", "0.1")
    spans = tell("sampled")
    sent = {span["id"] for span in spans.named("send default")}
    assert 0 < len(sent) < 100
    assert {span["parent"] for span in spans.named("process default")} == sent


def test_who_does_not_trace_writes_none(dsn: str, rows: Rows) -> None:
    produce(dsn, "many")
    assert [row["trace"] for row in rows("SELECT trace FROM pg_task")] == [None] * 4


def test_task_of_who_does_not_trace_runs_without_span(dsn: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as untraced:
        untraced.delenv("SPANS")
        produce(dsn, "plain")
    work(dsn)
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == ["inside"]


def test_broken_trace_harms_no_step(dsn: str, rows: Rows, file: Path) -> None:
    produce(dsn, "plain")
    produce(dsn, "together")
    rows("UPDATE pg_task SET trace = '00-nonsense'")
    work(dsn)
    assert rows("SELECT FROM pg_task") == []


def test_worker_that_does_not_trace_ignores_traces(
    dsn: str, rows: Rows, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce(dsn, "fails")
    monkeypatch.delenv("SPANS")
    work(dsn)
    assert rows("SELECT FROM pg_task") == []
    assert '"process' not in file.read_text()


def test_provider_from_before_the_fork_exports_all(dsn: str, file: Path, tmp_path: Path) -> None:
    """As opentelemetry-instrument sets it."""
    (tmp_path / "sitecustomize.py").write_text("from traced import set_provider\nset_provider()\n")
    produce(dsn, "plain")
    work(dsn, path=f"{tmp_path}:{PYTHONPATH}")
    names = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    assert sorted(names) == ["inside", "process q", "request", "send q"]


def test_nothing_is_imported_while_off() -> None:
    modules = "pgtask, pgtask.client, pgtask.sync_client, pgtask._worker.boot"
    text = f"import sys, {modules}; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", text], check=True, timeout=60)
