"""The promises of workflows, on a real supervisor and a real database."""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import flows
import psutil
import pytest
from fix_database import run
from fleet import SHORT_LEASE, Rows
from run_kit import SOON, ask, marks, until_paused, working

from pgtask import (
    App,
    Client,
    DefinitionError,
    EnqueueError,
    Policy,
    ResultTimeout,
    RunCancelled,
    RunFailed,
    WorkflowContext,
    workflow,
)
from pgtask._postgres.tasks import retry_tasks
from pgtask.errors import RunNotFound

# --- steps


def test_values_of_every_kind_come_back_unchanged(dsn: str) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.typed, flows.Params(7))
        return await run.result(timeout=SOON), await run.status()

    with working(dsn):
        found, status = ask(dsn, question)
    assert found == flows.in_thread(7)
    assert (status.state, status.recorded, status.version, status.name) == ("SUCCESS", 5, 1, "typed")
    assert status.ended_at >= status.started_at >= status.created_at


def test_worker_that_is_killed_in_every_step_repeats_no_other(dsn: str, rows: Rows, tmp_path: Path) -> None:
    kills = tmp_path / "kills"
    kills.mkdir()

    async def question(client: Client) -> Any:
        return await (await client.trigger(flows.ten_steps, str(kills))).result(timeout=100)

    with working(dsn, *("--lease-timeout", "1", "--heartbeat-interval", "0.3"), procs=2) as fleet:
        done = ask(dsn, question)
        assert fleet.output.count("worker.died") == 10
    assert done == [f"step {number}" for number in range(10)]
    assert len(list(kills.iterdir())) == 10
    assert rows.value("SELECT count(*) FROM pg_task_checkpoints") == 10
    assert rows.value("SELECT count(DISTINCT step) FROM mark") == rows.value("SELECT count(*) FROM mark") == 10


def test_run_that_fails_five_times_runs_finished_steps_once(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.transient, 5)
        return run.id, await run.result(timeout=SOON)

    with working(dsn):
        run_id, tries = ask(dsn, question)
    assert tries == 6
    assert marks(rows, run_id) == ["before", "after"]


def test_the_sixth_failure_is_one_too_many(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.transient, 6)
        with pytest.raises(RunFailed, match="Transient: try 6"):
            await run.result(timeout=SOON)
        return await run.status()

    with working(dsn):
        status = ask(dsn, question)
    assert (status.state, status.last_step) == ("ERROR", "before")


@pytest.mark.parametrize("repair", ["resume", "sql", "retry"])
def test_failed_run_is_parked_and_resumes_when_error_is_cleared(
    dsn: str, rows: Rows, tmp_path: Path, repair: str
) -> None:
    file = tmp_path / "missing.txt"

    async def fail(client: Client) -> Any:
        run = await client.trigger(flows.repairable, str(file))
        with pytest.raises(RunFailed, match="FileNotFoundError"):
            await run.result(timeout=SOON)
        return run.id

    async def fix(client: Client) -> Any:
        run = client.run(run_id, flows.repairable)
        if repair == "resume":
            assert await run.resume()
        async with client._postgres.connection() as connection:
            if repair == "sql":
                await connection.execute("UPDATE pg_task SET error = NULL")
            elif repair == "retry":
                await retry_tasks(connection, [run_id])
        result = await run.result(timeout=SOON)
        return result, await run.status(), await run.resume()

    with working(dsn):
        run_id = ask(dsn, fail)
        assert rows.value("SELECT error FROM pg_task WHERE id = $1", run_id).startswith("read: FileNotFoundError")
        file.write_text("here")
        result, status, again = ask(dsn, fix)
    assert (result, status.state, status.error, again) == ("here", "SUCCESS", None, False)
    assert marks(rows, run_id) == ["before"]


def test_a_failed_step_can_be_compensated(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.compensating)
        return run.id, await run.result(timeout=SOON)

    with working(dsn):
        run_id, result = ask(dsn, question)
    assert result.startswith("undone: step pay failed: ")
    assert "Permanent: it cannot be" in result
    assert marks(rows, run_id) == ["book", "unbook"]


@pytest.mark.parametrize(
    ("which", "text"), [("unstorable", "returned what cannot be recorded"), ("mistyped", "Expected `int`, got `str`")]
)
def test_a_result_that_cannot_be_stored_fails_where_it_was_made(dsn: str, which: str, text: str) -> None:
    async def question(client: Client) -> Any:
        with pytest.raises(RunFailed) as failed:
            await (await client.trigger(flows.bad_result, which)).result(timeout=SOON)
        return failed.value.error

    with working(dsn):
        error = ask(dsn, question)
    assert f"step {which} " in error
    assert text in error


def test_a_name_is_asked_for_once(dsn: str) -> None:
    async def question(client: Client) -> Any:
        with pytest.raises(RunFailed, match="step 'same' is asked for twice in one run"):
            await (await client.trigger(flows.twice)).result(timeout=SOON)
        with pytest.raises(RunFailed, match=r"step 'lost' is awaited in a task of its own.*use ctx.gather"):
            await (await client.trigger(flows.stray)).result(timeout=SOON)

    with working(dsn):
        ask(dsn, question)


# --- pauses


def test_a_sleeping_run_is_a_row_and_nothing_else(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.napping, 0.5)
        await asyncio.to_thread(until_paused, rows, run.id)
        status = await run.status()
        assert (status.state, status.waits_on, status.last_step) == ("PAUSED", "sleep nap", "nap")
        return await run.result(timeout=SOON)

    with working(dsn, "--concurrency", "1"):
        before, after = ask(dsn, question)
    assert timedelta(seconds=0.5) <= after - before < timedelta(seconds=5)


def test_a_signal_wakes_a_run_and_one_that_came_before_is_kept(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        early = await client.trigger(flows.asking, 60, after=timedelta(seconds=0.3))
        await early.signal("answer", 1)
        await early.signal("answer", 2)
        assert (await early.status()).state == "QUEUED"
        late = await client.trigger(flows.asking, 60)
        await asyncio.to_thread(until_paused, rows, late.id)
        await late.signal("other", 0)
        await client.signal(late.id, "answer", 3)
        await client.signal(late.id, "answer", 4)
        results = await early.result(timeout=SOON), await late.result(timeout=SOON)
        with pytest.raises(RunNotFound):
            await late.signal("answer", 5)
        return results

    with working(dsn):
        assert ask(dsn, question) == ([1, 2], [3, 4])
    assert rows.value("SELECT string_agg(name, ',') FROM pg_task_signals") == "other"


def test_a_signal_that_does_not_come_is_a_timeout(dsn: str) -> None:
    async def question(client: Client) -> Any:
        return await (await client.trigger(flows.asking, 0.2)).result(timeout=SOON)

    with working(dsn):
        assert ask(dsn, question) == "no signal answer has come in time"


def test_branches_wait_together(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.either)
        for name in ("right", "left"):
            await asyncio.to_thread(
                rows.until,
                "SELECT locked_by IS NULL AND wakeup_at = 'infinity' FROM pg_task WHERE id = $1",
                run.id,
            )
            await run.signal(name, name)
        return run.id, await run.result(timeout=SOON)

    with working(dsn):
        run_id, result = ask(dsn, question)
    assert result == ["left", "right", None, "mark"]
    assert marks(rows, run_id) == ["mark"]


def test_except_exception_does_not_swallow_a_pause(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.swallows)
        await asyncio.to_thread(until_paused, rows, run.id)
        await run.signal("go", "on")
        return await run.result(timeout=SOON)

    with working(dsn):
        assert ask(dsn, question) == "on"


def test_a_replay_sees_the_same_values(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.values)
        await asyncio.to_thread(until_paused, rows, run.id)
        await run.signal("go")
        return run.id, await run.result(timeout=SOON)

    with working(dsn):
        run_id, (now, number, uuid, key) = ask(dsn, question)
    assert key == f"{run_id}/pay"
    (seen,) = marks(rows, run_id)
    assert repr(number) in seen
    assert uuid in seen
    assert now[:19].replace("-", ", ")[:4] in seen


# --- cancelling


def test_a_cancelled_run_stops_at_its_next_step(dsn: str, rows: Rows, tmp_path: Path) -> None:
    file = tmp_path / "go"

    async def question(client: Client) -> Any:
        run = await client.trigger(flows.held, str(file))
        await asyncio.to_thread(rows.until, "SELECT count(*) = 1 FROM mark")
        assert await run.cancel()
        assert not await run.cancel()
        file.touch()
        with pytest.raises(RunCancelled):
            await run.result(timeout=SOON)
        return run.id, await run.status()

    with working(dsn) as fleet:
        run_id, status = ask(dsn, question)
        fleet.until("run.lost")
    assert status.state == "CANCELLED"
    assert [step.partition(" ")[0] for step in marks(rows, run_id)] == ["begin"]


def test_children_are_cancelled_with_their_parent(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.patient)
        await asyncio.to_thread(rows.until, "SELECT count(*) = 3 FROM pg_task WHERE wakeup_at = 'infinity'")
        assert await run.cancel()
        return [status.state for status in await client.runs()]

    with working(dsn):
        assert ask(dsn, question) == ["CANCELLED"] * 3
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_a_cancelled_run_can_be_resumed(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        run = await client.trigger(flows.asking, 60)
        await asyncio.to_thread(until_paused, rows, run.id)
        await run.cancel()
        assert await run.resume()
        await run.signal("answer", 1)
        await run.signal("answer", 2)
        return await run.result(timeout=SOON)

    with working(dsn):
        assert ask(dsn, question) == [1, 2]


# --- children


def test_a_fan_out_comes_back_in_order(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        return await (await client.trigger(flows.parent, 2500)).result(timeout=60)

    with working(dsn, procs=2):
        assert ask(dsn, question) == [2 * number for number in range(2500)]
    assert rows.value("SELECT count(*) FROM pg_task_runs") == 2501
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_the_failure_of_a_child_is_raised_in_its_parent(dsn: str) -> None:
    async def question(client: Client) -> Any:
        return await (await client.trigger(flows.disappointed)).result(timeout=SOON)

    with working(dsn):
        assert ask(dsn, question).startswith("8 pgtask.Permanent: a negative number")


# --- code that changes


def test_runs_finish_on_the_version_they_began_under(dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    async def begin(client: Client) -> Any:
        run = await client.trigger(flows.changing)
        await asyncio.to_thread(until_paused, rows, run.id)
        return run.id

    async def finish(client: Client) -> Any:
        ids = [old, (await client.trigger(flows.changing)).id]
        for run_id in ids:
            await client.signal(run_id, "go")
        return [await client.run(run_id).result(timeout=SOON) for run_id in ids]

    monkeypatch.setenv(flows.OLD, "1")
    with working(dsn):
        old = ask(dsn, begin)
    monkeypatch.delenv(flows.OLD)
    with working(dsn):
        assert ask(dsn, finish) == ["still old 1", "new 3"]


def test_a_run_of_a_newer_version_is_put_back_by_older_code(
    dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begin(client: Client) -> Any:
        run = await client.trigger(flows.changing)
        await asyncio.to_thread(until_paused, rows, run.id)
        return run

    with working(dsn):
        ask(dsn, begin)
    monkeypatch.setenv(flows.OLD, "1")
    with working(dsn) as fleet:
        run_id = rows.value("SELECT id FROM pg_task")
        ask(dsn, lambda client: client.signal(run_id, "go"))
        assert "changing version 3" in fleet.until("step.unknown")
        rows.until("SELECT locked_by IS NULL AND error IS NULL AND wakeup_at > now() FROM pg_task")


def test_an_order_that_contradicts_the_journal_names_both_sides(
    dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begin(client: Client) -> Any:
        run = await client.trigger(flows.reordered)
        await asyncio.to_thread(until_paused, rows, run.id)
        return run.id

    async def finish(client: Client) -> Any:
        await client.signal(run_id, "go")
        with pytest.raises(RunFailed) as failed:
            await client.run(run_id).result(timeout=SOON)
        return failed.value.error

    monkeypatch.setenv(flows.OLD, "1")
    with working(dsn):
        run_id = ask(dsn, begin)
    monkeypatch.delenv(flows.OLD)
    with working(dsn):
        assert "asks for step 'b' at place 1, where the journal has step 'a'" in ask(dsn, finish)


# --- faults


def test_two_workers_never_record_for_one_run(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """A worker is frozen in a step past its lease; another takes over; the first one wakes up and records nothing."""
    file = tmp_path / "go"

    async def trigger(client: Client) -> Any:
        return (await client.trigger(flows.held, str(file))).id

    async def result(client: Client) -> Any:
        return await client.run(run_id).result(timeout=SOON)

    with working(dsn, *SHORT_LEASE, procs=2) as fleet:
        run_id = ask(dsn, trigger)
        pid = rows.until("SELECT max(pid) FROM mark")
        frozen = psutil.Process(pid)
        frozen.suspend()
        try:
            rows.until("SELECT claims > 1 AND locked_by IS NOT NULL FROM pg_task WHERE id = $1", run_id, timeout=20)
            file.touch()
            assert ask(dsn, result) == "end"
            assert rows.value("SELECT count(DISTINCT pid) FROM mark") == 2
        finally:
            frozen.resume()
        fleet.until("lost")  # the lease, or what it wanted to record
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0  # so all that it may have done is done
    assert [step.partition(" ")[0] for step in marks(rows, run_id)] == ["begin", "end"]
    assert rows.value("SELECT count(*) FROM pg_task_checkpoints") == 3


def test_draining_worker_requeues_its_runs_between_two_steps(dsn: str, rows: Rows, tmp_path: Path) -> None:
    file = tmp_path / "go"

    async def trigger(client: Client) -> Any:
        return (await client.trigger(flows.held, str(file))).id

    with working(dsn) as fleet:
        run_id = ask(dsn, trigger)
        rows.until("SELECT count(*) = 1 FROM mark")
        fleet.send(signal.SIGTERM)
        fleet.until("supervisor.stopping")
        file.touch()
        assert fleet.ends() == 0
    assert rows.value("SELECT locked_by IS NULL AND tried = 0 AND claims = 0 FROM pg_task")
    assert rows.value("SELECT count(*) FROM pg_task_checkpoints") in (1, 2)  # before or after the step that waits
    with working(dsn):
        assert ask(dsn, lambda client: client.run(run_id).result(timeout=SOON)) == "end"
    assert [step.partition(" ")[0] for step in marks(rows, run_id)] == ["begin", "end"]


def test_a_run_triggered_by_sql_is_a_run(dsn: str, rows: Rows) -> None:
    with working(dsn):
        run_id = rows.value('INSERT INTO pg_task (step) VALUES (\'{"child": {"Run": 21}}\') RETURNING id')
        rows.until("SELECT count(*) = 0 FROM pg_task")
        assert ask(dsn, lambda client: client.run(run_id).result(timeout=SOON)) == 42


# --- triggering


def test_a_key_gives_the_run_that_has_not_ended(dsn: str) -> None:
    async def question(client: Client) -> Any:
        first = await client.trigger(flows.child, 1, key="k")
        second = await client.trigger(flows.child, 2, key="k")
        return first.id, second.id

    first, second = ask(dsn, question)
    assert first == second


def test_a_run_is_part_of_the_callers_transaction(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        connection = await asyncpg.connect(dsn)
        transaction = connection.transaction()
        await transaction.start()
        run = await client.trigger(flows.child, 1, conn=connection, queue="other", priority=3)
        await run.signal("x", conn=connection)
        await transaction.rollback()
        await connection.close()
        with pytest.raises(RunNotFound):
            await run.status()

    ask(dsn, question)
    assert rows.value("SELECT count(*) FROM pg_task_signals") == 0


def test_wrong_trigger_is_refused_before_it_is_sent() -> None:
    client = Client("postgresql://nowhere")

    async def question() -> None:
        for refused, text in (
            (client.trigger(flows.child, "one"), "Expected `int`"),  # type: ignore[misc]
            (client.trigger(flows.twice, 1), "takes no input"),  # type: ignore[misc]
            (client.trigger(flows.Params), "is not a workflow"),  # type: ignore[arg-type]
            (client.trigger(flows.child, 1, queue=""), "queue"),
            (client.signal(uuid4(), "", 1), "signal ''"),
            (client.signal(uuid4(), "x", object()), "cannot be stored as JSON"),
        ):
            with pytest.raises(EnqueueError, match=text):
                await refused

    run(question())


def test_results_arrive_by_notification_and_time_out(dsn: str, rows: Rows) -> None:
    async def question(client: Client) -> Any:
        asked = [await client.trigger(flows.asking, 60) for _ in range(20)]
        with pytest.raises(ResultTimeout, match=r"has not ended within 0\.05 s"):
            await asked[0].result(timeout=0.05)
        results = [asyncio.create_task(each.result()) for each in asked]
        for each in asked:
            await each.signal("answer", 1)
            await each.signal("answer", 2)
        found = await asyncio.wait_for(asyncio.gather(*results), 4)  # the poll beneath is slower
        return found, rows.value

    with working(dsn):
        found, _ = ask(dsn, question)
    assert found == [[1, 2]] * 20


def test_runs_are_listed_by_name_and_state(dsn: str) -> None:
    async def question(client: Client) -> Any:
        done = await client.trigger(flows.child, 1)
        await done.result(timeout=SOON)
        bad = await client.trigger(flows.child, -1)
        with pytest.raises(RunFailed):
            await bad.result(timeout=SOON)
        other = await client.trigger(flows.asking, 1, after=timedelta(hours=1))
        everything = [status.id for status in await client.runs()]
        assert everything == [other.id, bad.id, done.id]
        assert [status.id for status in await client.runs(flows.child, state="ERROR")] == [bad.id]
        assert [status.id for status in await client.runs("asking")] == [other.id]
        assert [status.id for status in await client.runs(limit=1, before=other.id)] == [bad.id]

    with working(dsn):
        ask(dsn, question)


# --- definitions


def test_definitions_that_cannot_work_are_refused() -> None:
    async def good(ctx: WorkflowContext, number: int) -> int:
        return number

    async def no_argument() -> None: ...

    async def strange(ctx: WorkflowContext, number: asyncio.Event) -> None: ...

    def plain(ctx: WorkflowContext) -> None: ...

    with pytest.raises(DefinitionError, match="not an async def"):
        workflow("w")(plain)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="must take the context"):
        workflow("w")(no_argument)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="version=0"):
        workflow("w", version=0)
    with pytest.raises(DefinitionError, match="later than"):
        workflow("w", version=1, since=2)
    with pytest.raises(DefinitionError, match="workflow ''"):
        workflow("")
    with pytest.raises(DefinitionError, match="policy must be"):
        workflow("w", policy=3)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="its input: the class Event cannot be read from JSON"):
        App(workflow("w")(strange))
    with pytest.raises(DefinitionError, match="workflow w is there twice for version 2"):
        App(workflow("w", version=2)(good), workflow("w", version=3, since=1)(good))
    assert App(workflow("w", version=2)(good), workflow("w", version=1)(good)).workflows["w"][-1].version == 2


def test_calling_a_workflow_calls_its_function() -> None:
    async def nothing(ctx: WorkflowContext) -> int:
        return 5

    assert run(workflow("w", policy=Policy())(nothing)(None)) == 5
