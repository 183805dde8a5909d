"""`pgtask check`: it names what new code breaks, and nothing else, and changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest
from checked import BREAKING, CHANGES, HARMLESS, ONCE, reserve
from fix_checked import parked_by_worker
from fix_commands import Command, query
from fix_database import run, with_database

from pgtask import WorkflowContext, workflow
from pgtask._check.causes import MAX_CAUSES, Break, Causes
from pgtask._check.replay import replay
from pgtask._check.time_limit import OutOfTime, time_limit
from pgtask._fastpath import RowReader, Table
from pgtask._postgres.waiting import WaitingRun
from pgtask._workflow.values import Checkpoint, History

pytestmark = pytest.mark.timeout(120)

ORACLE = [
    *("field_with_default", "field_renamed_with_option", "other_step_not_passed", "third_branch", "branch_by_version"),
    *("renamed_field", "removed_step", "swapped_steps", "result_type", "gather_to_other_step", "removed_workflow"),
]
"""The changes whose rows a worker runs here; the others are in tests/faults."""


@pytest.fixture
def here(filled: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The filled database, which the commands find."""
    monkeypatch.setenv("PGTASK_DSN", filled)
    return filled


# --- what is named ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_change_breaks_nothing(here: str, command: Command, change: str) -> None:
    said = command("check", f"checked:app_{change}", "--json")
    assert said.objects == []
    assert said.code == 0
    assert said.err.endswith("pgtask: 14 tasks checked, 3 of them runs; nothing would break\n")


@pytest.mark.parametrize("change", BREAKING)
def test_breaking_change_is_named(here: str, command: Command, change: str) -> None:
    _, breaks, says = CHANGES[change]
    said = command("check", f"checked:app_{change}", "--json")
    assert said.code == 1
    assert {cause["what"] for cause in said.objects} == set(breaks)
    for cause in said.objects:
        assert says in cause["error"], cause["error"]
        assert cause["remedy"]
        assert query(here, "SELECT count(*) FROM pg_task WHERE id = $1::uuid", cause["example"]) == [(1,)]


@pytest.mark.parametrize("change", ORACLE)
def test_check_names_what_a_worker_parks(waiting: str, command: Command, change: str) -> None:
    named = {
        cause["what"].removesuffix(".Run") for cause in command("check", f"checked:app_{change}", "--json").objects
    }
    assert named == parked_by_worker(waiting, change)


def test_there_are_forty_changes() -> None:
    assert len(BREAKING) + len(HARMLESS) >= 40
    assert set(ORACLE) <= set(CHANGES)


# --- how it reads -------------------------------------------------------------------------------------------


def test_role_that_may_only_select_checks_in_read_only(here: str, command: Command) -> None:
    query(here, "CREATE ROLE checks LOGIN")
    try:
        query(here, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO checks")
        dsn = here.replace("postgres@", "checks@") + "&options=-cdefault_transaction_read_only%3Don"
        before = query(here, "SELECT pg_task::text, xmin FROM pg_task ORDER BY id")
        said = command("check", "checked:app_renamed_field", "--dsn", dsn)
        assert (said.code, said.err.count("1 task would break")) == (1, 1)
        assert query(here, "SELECT pg_task::text, xmin FROM pg_task ORDER BY id") == before
    finally:
        query(here, "DROP OWNED BY checks")
        query(here, "DROP ROLE checks")


def test_task_parked_for_the_same_error_does_not_count(waiting: str, command: Command) -> None:
    error = "Mail.Count cannot be decoded: Object missing required field `rest`"
    query(waiting, "UPDATE pg_task SET error = $1 WHERE step LIKE '%Count%'", error)
    said = command("check", "checked:app_renamed_field")
    assert said.code == 0
    assert said.out.startswith("broken ")
    assert "nothing would break; 1 more are parked already for the same error" in said.err
    query(waiting, "UPDATE pg_task SET error = 'Permanent: the counter is closed' WHERE step LIKE '%Count%'")
    assert command("check", "checked:app_renamed_field").code == 1


def test_only_tasks_of_named_queues_are_checked(waiting: str, command: Command) -> None:
    query(waiting, "UPDATE pg_task SET queue = 'slow' WHERE step LIKE '%Count%'")
    assert command("check", "checked:app_renamed_field", "-q", "default").code == 0
    said = command("check", "checked:app_renamed_field", "-q", "slow")
    assert (said.code, "1 task checked" in said.err) == (1, True)


def test_apps_that_share_a_table_are_named_together(here: str, command: Command) -> None:
    said = command("check", "apps:app", "--json")
    assert {cause["kind"] for cause in said.objects} == {"unknown"}
    assert "if another app has it, name that app too" in said.objects[0]["remedy"]
    assert command("check", "apps:app", "checked:app_before").code == 0


def test_rows_that_no_worker_can_read_are_named(waiting: str, command: Command) -> None:
    wrong = ("nonsense", '{"Mail":{"Count":{"left":tru}}}', '{"Mail":{"Count":{"left":1}},"b":1}')
    for step in wrong:
        query(waiting, "INSERT INTO pg_task (step) VALUES ($1)", step)
    said = command("check", "checked:app_before", "--json")
    assert sorted(cause["kind"] for cause in said.objects) == ["envelope", "envelope", "payload"]
    assert {cause["remedy"] for cause in said.objects} == {"cancel the task, or repair its column step by SQL"}


def test_names_with_escapes_are_read(waiting: str, command: Command) -> None:
    query(waiting, "INSERT INTO pg_task (step) VALUES ($1)", '{"M\\u0061il":{"Count":{"left":1}}}')
    assert command("check", "checked:app_before").code == 0


def test_step_too_large_for_workers_is_named(here: str, command: Command) -> None:
    said = command("check", "checked:app_before", "--max-step-bytes", "40", "--json")
    assert {cause["kind"] for cause in said.objects} == {"size"}
    assert said.objects[0]["error"] == "the step is larger than 40 bytes"


def test_history_of_many_megabytes_is_read_in_parts(waiting: str, command: Command) -> None:
    query(
        waiting,
        "INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result) "
        "SELECT id, n, CASE n WHEN 12 THEN '1.0.1' ELSE (n + 1)::text END, 'step', 's' || n, "
        "to_json(repeat('x', 4000000))::text "
        "FROM pg_task_runs, generate_series(4, 12) AS n WHERE name = 'order'",
    )
    said = command("check", "checked:app_before", "--json")
    assert "passes step 's12', which the journal has at place 1.0.1" in said.objects[0]["error"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_rows_are_read_from_portions_of_any_size(here: str, size: int) -> None:
    async def copy() -> bytes:
        connection = await asyncpg.connect(here)
        chunks: list[bytes] = []

        async def take(chunk: bytes) -> None:
            chunks.append(bytes(chunk))

        try:
            await connection.copy_from_query("SELECT id, step, error FROM pg_task", output=take, format="binary")
        finally:
            await connection.close()
        return b"".join(chunks)

    copied = run(copy())
    whole = RowReader([Table(CHANGES["renamed_field"].make())])
    found = whole.feed(copied)
    parts = RowReader([Table(CHANGES["renamed_field"].make())])
    assert [row for at in range(0, len(copied), size) for row in parts.feed(copied[at : at + size])] == found
    assert parts.rows == whole.rows == 14
    assert len(found) == 4, "the renamed field, and three runs"


# --- what a replay does -------------------------------------------------------------------------------------

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def replayed(function: Callable[..., Any], *checkpoints: tuple[str, str, str, str | None], seconds: float = 5) -> Any:
    """Replay a run of a workflow that has recorded these checkpoints; return its break."""
    flow = workflow("flow", policy=ONCE)(function)
    done = [Checkpoint(at, *one) for at, one in enumerate(checkpoints, 1)]
    history = History(NOW, True, 1, None, done, NOW)
    waiting = WaitingRun(uuid4(), "", 0, None)
    return run(replay([flow], waiting, msgspec.Raw(b"null"), history, max_bytes=1000, seconds=seconds))


def test_replay_runs_no_step_and_ends_at_first_unrecorded_call() -> None:
    called: list[str] = []

    async def flow(ctx: WorkflowContext) -> None:
        called.append(await ctx.step("one", called.pop))
        called.append("between")
        await ctx.step("two", called.pop)
        called.append("after")

    assert replayed(flow, ("1", "step", "one", '"recorded"')) is None
    assert called == ["recorded", "between"]


def test_replay_hands_what_is_absent_to_steps() -> None:
    async def flow(ctx: WorkflowContext) -> None:
        await ctx.step("one", reserve, ctx.resources.http["a"].limit)
        await ctx.step("two", reserve, ctx.db)
        await ctx.step("three", reserve, ctx.client)  # type: ignore[arg-type]

    assert replayed(flow, ("1", "step", "one", '"r"'), ("2", "step", "two", '"r"')) is None


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (lambda ctx: ctx.db.fetch("SELECT 1"), "ctx.db.fetch"),
        (lambda ctx: bool(ctx.resources["flag"]), "ctx.resources['flag']"),
        (lambda ctx: f"{ctx.resources.url}/a", "ctx.resources.url"),
        (lambda ctx: ctx.resources.limit > 3, "ctx.resources.limit"),
        (lambda ctx: ctx.step("one", ctx.resources.http.get), "ctx.resources.http.get"),
    ],
)
def test_use_of_what_is_absent_is_explained(use: Callable[[Any], Any], named: str) -> None:
    async def flow(ctx: WorkflowContext) -> None:
        try:
            await use(ctx)
        except Exception:
            await ctx.step("one", reserve, 1)

    broken = replayed(flow, ("1", "step", "one", '"r"'))
    assert broken.kind == "unchecked"
    assert broken.error == f"the code between its calls uses {named}"
    assert broken.remedy() == f"a check has no {named}: use it in a step, and decide by what the step returns"


async def _sleeps(ctx: WorkflowContext) -> None:
    await asyncio.sleep(3600)


async def _blocks(ctx: WorkflowContext) -> None:
    time.sleep(3600)  # noqa: ASYNC251


async def _computes(ctx: WorkflowContext) -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:
            continue


async def _computes_in_branch(ctx: WorkflowContext) -> None:
    await ctx.gather(_computes(ctx), _sleeps(ctx))


@pytest.mark.parametrize("flow", [_sleeps, _blocks, _computes, _computes_in_branch])
def test_replay_has_a_time_limit(flow: Callable[..., Any]) -> None:
    broken = replayed(flow, seconds=0.1)
    assert (broken.kind, broken.error) == ("unchecked", "the code between its calls took longer than 0.1 s")


def test_time_limit_leaves_other_code_alone() -> None:
    async def main() -> None:
        with pytest.raises(OutOfTime):
            async with time_limit(0.01):
                await asyncio.sleep(3600)
        async with time_limit(3600):
            await asyncio.sleep(0)

    run(main())


@pytest.mark.parametrize("error", [SystemExit(3), BaseException("odd"), asyncio.CancelledError()])
def test_replay_survives_any_exception(error: BaseException) -> None:
    async def flow(ctx: WorkflowContext) -> None:
        raise error

    assert replayed(flow).kind == "raises"


def test_failures_that_are_recorded_are_no_break() -> None:
    async def flow(ctx: WorkflowContext) -> None:
        await ctx.step("one", reserve, 1)

    flow_ = workflow("flow", policy=ONCE)(flow)
    failed = Checkpoint(1, "1", "step", "one", None, "ValueError: no", None, 1)
    history = History(NOW, True, 1, None, [failed], NOW)
    task = WaitingRun(uuid4(), "", 0, None)
    assert run(replay([flow_], task, msgspec.Raw(b"null"), history, max_bytes=1000, seconds=5)) is None


# --- files, samples and queues ------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ORACLE)
def test_check_of_a_dump_says_what_that_of_the_table_says(
    here: str, command: Command, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "waiting.dump"
    assert command("check", "--dump", str(file)) == (0, "", f"pgtask: 14 tasks written to {file}\n")
    assert (file.stat().st_mode & 0o777, list(tmp_path.iterdir())) == (0o600, [file])
    of_table = command("check", f"checked:app_{change}")
    monkeypatch.setenv("PGTASK_DSN", with_database(here, "missing"))
    assert command("check", "--from", str(file), f"checked:app_{change}") == of_table


def test_dump_holds_times_that_python_cannot(waiting: str, command: Command, tmp_path: Path) -> None:
    query(waiting, "UPDATE pg_task SET wakeup_at = '50000-01-01' WHERE error IS NULL AND locked_by IS NULL")
    query(waiting, "UPDATE pg_task_checkpoints SET due_at = 'infinity'")
    file = str(tmp_path / "waiting.dump")
    assert command("check", "--dump", file).code == 0
    assert command("check", "--from", file, "checked:app_before").err == command("check", "checked:app_before").err


def test_dump_of_a_queue_or_a_sample_says_so(waiting: str, command: Command, tmp_path: Path) -> None:
    query(waiting, "UPDATE pg_task SET queue = 'slow' WHERE step LIKE '%Count%'")
    file = str(tmp_path / "waiting.dump")
    assert "1 task written" in command("check", "--dump", file, "--queue", "slow").err
    assert command("check", "--from", file, "checked:app_before").err == (
        "pgtask: the file has the tasks of the queues slow only\n"
        "pgtask: 1 task checked, 0 of them runs; nothing would break\n"
    )
    assert command("check", "--dump", file, "--sample", "3").code == 0
    assert "3 tasks checked, chosen at random, " in command("check", "--from", file, "checked:app_before").err


@pytest.mark.parametrize("size", [0, 10, 30, 200, -1])
def test_dump_that_is_cut_is_refused(here: str, command: Command, tmp_path: Path, size: int) -> None:
    file = tmp_path / "waiting.dump"
    assert command("check", "--dump", str(file)).code == 0
    file.write_bytes(file.read_bytes()[:size])
    said = command("check", "--from", str(file), "checked:app_before")
    assert (said.code, said.out) == (2, "")
    assert "pgtask check --dump FILE" in said.err


def test_sample_reads_so_many_tasks(here: str, command: Command) -> None:
    said = command("check", "checked:app_before", "--sample", "5")
    assert said.err.startswith("pgtask: 5 tasks checked, chosen at random, ")
    said = command("check", "checked:app_renamed_field", "--sample", "1000")
    assert (said.code, "14 tasks checked, chosen at random" in said.err) == (1, True)


def test_mistyped_queue_is_refused(here: str, command: Command) -> None:
    said = command("check", "checked:app_before", "--queue", "defualt")
    assert (said.code, said.out) == (2, "")
    assert "--queue defualt: the table has no task in it, and the code no step that waits there" in said.err
    assert "the queues of the code are default" in said.err


# --- causes, and the command --------------------------------------------------------------------------------


def test_causes_are_folded_and_bounded() -> None:
    causes = Causes()
    for number in range(1000):
        causes.add(Break("raises", "a", f"ValueError: {number} of {uuid4()}", lambda: "do"), UUID(int=number), None)
    [cause] = causes.found()
    assert (cause.count, cause.example, cause.remedy) == (1000, UUID(int=0), "do")
    for number in range(1000):
        name = "".join(chr(97 + int(digit)) for digit in str(number))
        causes.add(Break("raises", name, "x", lambda: "do"), UUID(int=number), None)
    assert len(causes.found()) <= MAX_CAUSES + 1
    assert sum(cause.count for cause in causes.found()) == 2000


def test_text_for_people_names_count_example_and_remedy(here: str, command: Command) -> None:
    said = command("check", "checked:app_renamed_field")
    lines = said.out.splitlines()
    assert lines[:2] == [
        "breaks      1 task of Mail.Count",
        "error       Mail.Count cannot be decoded: Object missing required field `rest`",
    ]
    assert lines[3] == (
        'remedy      if rest is the new name of left: class Count(..., rename={"rest": "left"}); else give it a default'
    )
    renamed = command("check", "checked:app_renamed_step").out
    assert "remedy      was it renamed to SendMail? keep Send too" in renamed


def test_prints_of_the_code_are_kept_out_of_the_result(here: str, command: Command) -> None:
    said = command("check", "checked:app_printing", "--json")
    assert (said.code, said.out) == (0, "")
    assert "pgtask: a print between the calls\n" in said.err


def test_wrong_use_of_check_is_one_line(here: str, command: Command) -> None:
    assert command("check", "checked:missing").code == 4
    assert command("check").code == 2
    assert command("check", "checked:app_before", "--replay-limit", "soon").code == 2
    assert command("check", "checked:app_before", "--dsn", with_database(here, "missing")).code == 5
    assert command("check", "--from", "missing.dump", "checked:app_before").code == 2
    assert command("check", "--from", "missing.dump", "-q", "a", "checked:app_before").code == 2
    assert command("check", "--dump", "a.dump", "checked:app_before").code == 2
    assert command("check", "--dump", "missing/a.dump").code == 2
