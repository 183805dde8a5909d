"""Unusual ends of workflows and steps: exceptions, cut off calls and unread signals, in a first run and in a replay."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import edge_flows
import pytest
from fix_acts import act, did
from fix_database import run
from fleet import Fleet, Rows
from run_kit import SOON

from pgtask import App, Client, Policy, RunFailed, StepFailed, Transient, WorkflowContext, workflow
from pgtask.testing import MemoryWorker

ONE_RETRY = Policy(retry_limit=1, retry_delay=timedelta(0))


class Odd(BaseException):
    """Not an `Exception`."""


async def raising(error: BaseException) -> None:
    did.append("tried")
    raise error


def raising_in_a_thread(error: BaseException) -> None:
    did.append("tried")
    raise error


async def slow(name: str) -> str:
    did.append(f"{name} begins")
    await asyncio.sleep(30)
    did.append(f"{name} done")
    return name


async def ended(flow: Any, given: Any = None, **options: Any) -> tuple[str, str, list[str]]:
    """A run in memory: its state, its error, and the names of what it has recorded."""
    async with MemoryWorker(App(flow), **options) as worker:
        started = await worker.client.trigger(flow, given)
        await worker.run()
        status = await started.status()
        return status.state, status.error or "", [row.name for row in worker.recorded(started.id)]


# --- what a step raises


RAISED = [
    (StopIteration("x"), "StopIteration"),
    (StopAsyncIteration("x"), "StopAsyncIteration"),
    (KeyboardInterrupt("x"), "KeyboardInterrupt"),
    (SystemExit("no licence"), "SystemExit: no licence"),
    (GeneratorExit("x"), "GeneratorExit"),
    (asyncio.CancelledError("x"), "step leave was cancelled from within: it raised CancelledError"),
    (Odd("x"), "Odd: x"),
    (BaseExceptionGroup("x", [SystemExit("inner")]), "SystemExit: inner"),
]


@pytest.mark.parametrize("function", [raising, raising_in_a_thread])
@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize(("error", "text"), RAISED, ids=lambda value: type(value).__name__)
def test_every_exception_of_a_step_is_a_failed_try_of_it(
    error: BaseException, text: str, is_alone: bool, function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @workflow("leaving", policy=Policy(retry_limit=4))
    async def leaving(ctx: WorkflowContext) -> str:
        step = ctx.step("leave", function, error, policy=ONE_RETRY)
        try:
            await (step if is_alone else ctx.gather(ctx.step("beside", act, "beside"), step))
        except StepFailed as failed:
            return await ctx.step("caught", act, f"{failed.step}, {failed.tries} tries: {failed.error}")
        return "not raised"

    caplog.set_level(logging.WARNING)
    state, _, recorded = run(ended(leaving))
    assert (state, recorded[-2:]) == ("SUCCESS", ["leave", "caught"])
    assert did.count("tried") == 2, "the policy of the step says how often"
    assert did[-1].startswith("leave, 2 tries: ")
    assert text in did[-1]
    (line,) = (record.getMessage() for record in caplog.records if "step.failed" in record.getMessage())
    assert "step=leaving.Run checkpoint=leave tried=1" in line


@pytest.mark.parametrize("where", ["function", "branch"])
def test_system_exit_outside_of_steps_is_retried_by_policy(where: str) -> None:
    async def leave() -> None:
        did.append("tried")
        sys.exit("no licence")

    @workflow("outside", policy=ONE_RETRY)
    async def outside(ctx: WorkflowContext) -> None:
        await (leave() if where == "function" else ctx.gather(ctx.step("beside", act, "beside"), leave()))

    state, error, _ = run(ended(outside))
    assert (state, did.count("tried")) == ("ERROR", 2)
    assert error.startswith("SystemExit: no licence (at ")


def test_a_run_that_raises_cancelled_error_says_where() -> None:
    @workflow("weary", policy=ONE_RETRY)
    async def weary(ctx: WorkflowContext) -> None:
        did.append("tried")
        raise asyncio.CancelledError

    state, error, _ = run(ended(weary))
    assert (state, len(did)) == ("ERROR", 2)
    assert "CancelledError (at " in error
    assert "test_run_edges.py" in error


def test_a_child_whose_step_exits_fails_its_parent_by_name() -> None:
    @workflow("exiting_child")
    async def exiting_child(ctx: WorkflowContext) -> None:
        await ctx.step("leave", raising, SystemExit("no licence"), policy=Policy())

    @workflow("parent_of_it")
    async def parent_of_it(ctx: WorkflowContext) -> str:
        try:
            await (await ctx.spawn("child", exiting_child))
        except RunFailed as failed:
            return failed.error
        return "no"

    async def main() -> None:
        async with MemoryWorker(App(exiting_child, parent_of_it)) as worker:
            started = await worker.client.trigger(parent_of_it)
            await worker.run()
            assert (await started.result()).startswith("leave: SystemExit: no licence (at ")

    run(main())


def test_exceptions_that_no_future_carries_spare_the_worker(dsn: str) -> None:
    async def main() -> list[str]:
        async with Client(dsn) as client:
            runs = [await client.trigger(edge_flows.leaving, how) for how in edge_flows.HOW]
            errors = []
            for one in runs:
                with pytest.raises(RunFailed) as failed:
                    await one.result(timeout=SOON)
                errors.append(failed.value.error)
            return errors

    with Fleet(dsn, app="edge_flows:app") as fleet:
        fleet.until("worker.ready")
        errors = run(main())
        assert "worker.died" not in fleet.output
    for how, error in zip(edge_flows.HOW, errors, strict=True):
        assert error.startswith("leave 1: ")
        assert how.partition(" ")[2] in error


def test_row_names_the_exception_of_a_bare_task(dsn: str) -> None:
    async def main() -> str:
        async with Client(dsn) as client:
            started = await client.trigger(edge_flows.careless)
            with pytest.raises(RunFailed) as failed:
                await started.result(timeout=60)
            return failed.value.error

    with Fleet(dsn, app="edge_flows:app") as fleet:
        fleet.until("worker.ready")
        error = run(main(), timeout=90)
    assert "worker process died 3 times while running careless.Run" in error
    assert "SystemExit: no licence at all" in error


# --- what a workflow cuts off


async def by_timeout(ctx: WorkflowContext, ask: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(0.05):
        await ask()


async def by_cancel(ctx: WorkflowContext, ask: Callable[[], Awaitable[Any]]) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.05, task.cancel)
    try:
        await ask()
    except asyncio.CancelledError:
        task.uncancel()
        raise ValueError("cancelled") from None


async def by_group(ctx: WorkflowContext, ask: Callable[[], Awaitable[Any]]) -> None:
    async def fails() -> None:
        await asyncio.sleep(0.05)
        raise ValueError("of the group")

    async with asyncio.TaskGroup() as group:
        group.create_task(fails())
        await ask()


async def by_gather(ctx: WorkflowContext, ask: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(0.05):
        await ctx.gather(ctx.step("beside", act, "beside"), ask())


async def by_branch(ctx: WorkflowContext, ask: Callable[[], Awaitable[Any]]) -> None:
    await ctx.gather(ctx.step("beside", act, "beside"), by_timeout(ctx, ask))


async def by_generator(ctx: WorkflowContext, ask: Callable[[], Awaitable[Any]]) -> None:
    async def answers() -> AsyncIterator[Any]:
        yield await ask()

    async with asyncio.timeout(0.05):
        async for _ in answers():
            break


@workflow("cut_child")
async def cut_child(ctx: WorkflowContext) -> str:
    return await ctx.wait_for_signal("never", str)


CUT = [by_timeout, by_cancel, by_group, by_gather, by_branch, by_generator]


@pytest.mark.parametrize("cut", CUT, ids=lambda cut: cut.__name__)
@pytest.mark.parametrize("then", ["ask", "return", "raise"])
@pytest.mark.parametrize("replays", [False, True])
def test_a_step_that_the_workflow_cuts_off_ends_the_run(cut: Any, then: str, replays: bool) -> None:
    @workflow("impatient")
    async def impatient(ctx: WorkflowContext) -> str:
        try:
            await cut(ctx, lambda: ctx.step("charge", slow, "charge"))
        except (Exception, ExceptionGroup):
            if then == "raise":
                raise
        return await ctx.step("refund", act, "refund") if then == "ask" else "refunded"

    state, error, recorded = run(ended(impatient, replays=replays))
    assert state == "ERROR"
    by = "a cancellation in the workflow" if cut in (by_cancel, by_group) else "asyncio.timeout"
    assert error == f"step 'charge' was cut off by {by}; use policy=Policy(timeout=...)"
    assert set(recorded) <= {"beside"}
    assert "refund" not in did
    assert "charge done" not in did


def test_a_step_that_was_closed_ends_the_run() -> None:
    @workflow("dropping")
    async def dropping(ctx: WorkflowContext) -> str:
        begun = ctx.step("charge", slow, "charge")
        begun.send(None)
        begun.close()
        return await ctx.step("refund", act, "refund")

    state, error, recorded = run(ended(dropping))
    assert (state, recorded) == ("ERROR", [])
    assert error.startswith("step 'charge' was cut off by a cancellation in the workflow; ")


def test_timeout_that_has_not_expired_changes_nothing() -> None:
    @workflow("in_time")
    async def in_time(ctx: WorkflowContext) -> list[str]:
        async with asyncio.timeout(30):
            found = [await ctx.step("a", act, "a")]
        async with asyncio.timeout(None):
            await ctx.sleep("nap", timedelta(days=1))
        return [*found, await ctx.step("b", act, "b")]

    assert run(ended(in_time, replays=True)) == ("SUCCESS", "", ["a", "nap", "b"])


def test_timeout_inside_of_a_step_is_allowed() -> None:
    async def impatient() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(30)
        except TimeoutError:
            return "late"
        return "in time"

    @workflow("with_impatient_step")
    async def with_impatient_step(ctx: WorkflowContext) -> str:
        return await ctx.step("patience", impatient) + await ctx.step("after", act, "after")

    assert run(ended(with_impatient_step))[::2] == ("SUCCESS", ["patience", "after"])


WAITS: list[tuple[str, Any]] = [
    ("sleep nap", lambda ctx: ctx.sleep("nap", timedelta(days=1))),
    ("signal go", lambda ctx: ctx.wait_for_signal("go", str)),
    ("signal go", lambda ctx: ctx.wait_for_signal("go", str, timeout=timedelta(days=1))),
    ("try 2 of step shaky", lambda ctx: ctx.step("shaky", raising, Transient("no"))),
    ("1 children of child", lambda ctx: of_child(ctx)),
    ("sleep nap, signal go", lambda ctx: ctx.gather(ctx.sleep("nap", timedelta(days=1)), ctx.wait_for_signal("go"))),
    ("sleep nap, signal go", lambda ctx: ctx.gather(limited(ctx), ctx.wait_for_signal("go"))),
]


async def of_child(ctx: WorkflowContext) -> str:
    return await (await ctx.spawn("child", cut_child))


async def limited(ctx: WorkflowContext) -> None:
    async with asyncio.timeout(60):
        await ctx.sleep("nap", timedelta(days=1))


@pytest.mark.parametrize(("what", "ask"), WAITS)
def test_suspension_inside_of_a_timeout_is_refused(what: str, ask: Any) -> None:
    @workflow("hurried")
    async def hurried(ctx: WorkflowContext) -> str:
        try:
            async with asyncio.timeout(60):
                await ask(ctx)
        except TimeoutError:
            return await ctx.step("late", act, "late")
        return "in time"

    async def main() -> None:
        async with MemoryWorker(App(hurried, cut_child)) as worker:
            started = await worker.client.trigger(hurried)
            await worker.run()
            status = await started.status()
            assert status.state == "ERROR"
            assert status.error == (
                f"the workflow waits for {what} inside asyncio.timeout, which does not count while a run pauses; "
                "use wait_for_signal(..., timeout=...), or policy=Policy(timeout=...) for a step"
            )

    run(main())


def test_worker_refuses_cut_off_calls_like_memory(dsn: str) -> None:
    async def main() -> dict[str, str]:
        async with Client(dsn) as client:
            flows = (edge_flows.hasty, edge_flows.hasty_wait)
            runs = {flow.name: await client.trigger(flow) for flow in flows}
            errors = {}
            for name, one in runs.items():
                with pytest.raises(RunFailed) as failed:
                    await one.result(timeout=SOON)
                errors[name] = failed.value.error
            return errors

    with Fleet(dsn, app="edge_flows:app") as fleet:
        fleet.until("worker.ready")
        errors = run(main())
    assert errors["hasty"] == "step 'charge' was cut off by asyncio.timeout; use policy=Policy(timeout=...)"
    assert errors["hasty_wait"].startswith("the workflow waits for signal go inside asyncio.timeout, ")
    assert Rows(dsn).value("SELECT count(*) FROM pg_task_checkpoints WHERE name <> 'before'") == 0


# --- a cancelled run


def test_cancelled_run_logs_no_retry(dsn: str) -> None:
    """Of two branches, one records all the time and is told that the lease is lost; the other has a step under way."""

    async def main() -> None:
        async with Client(dsn) as client:
            for flow in (edge_flows.recording_beside, edge_flows.long_step):
                started = await client.trigger(flow)
                await asyncio.to_thread(
                    Rows(dsn).until, "SELECT count(*) > 0 FROM pg_task_checkpoints WHERE run = $1", started.id
                )
                assert await started.cancel()

    with Fleet(dsn, "--lease-timeout", "2", "--heartbeat-interval", "0.5", app="edge_flows:app") as fleet:
        fleet.until("worker.ready")
        run(main())
        fleet.until("lost", times=2)
        fleet.process.terminate()
        assert fleet.ends() == 0
        assert "step.failed" not in fleet.output
        assert "task.parked" not in fleet.output


# --- signals


@workflow("deaf")
async def deaf(ctx: WorkflowContext, wanted: int) -> int:
    for _ in range(wanted):
        await ctx.wait_for_signal("item", int)
    return wanted


def test_unread_signals_are_logged_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with MemoryWorker(App(deaf)) as worker:
            started = await worker.client.trigger(deaf, 2)
            for number in range(5):
                await started.signal("item", number)
            await started.signal("stop")
            assert (await started.status()).unread_signals == {"item": 5, "stop": 1}
            await worker.run()
            assert await started.result() == 2
            assert (await started.status()).unread_signals == {"item": 3, "stop": 1}

    run(main())
    (line,) = (record.getMessage() for record in caplog.records if "signals.unread" in record.getMessage())
    assert 'step=deaf.Run signals=4 names="3 item, 1 stop"' in line


@pytest.mark.faults
def test_signals_are_taken_or_reported_while_runs_end(dsn: str) -> None:
    """A flood of signals against the ends of runs: each was refused, taken, or logged as unread."""

    async def main() -> tuple[int, int, int, int]:
        async with Client(dsn) as client:
            sent = taken = unread = ends = 0
            for _ in range(10):
                started = await client.trigger(edge_flows.reader)

                async def flood(started: Any = started) -> int:
                    accepted = 0
                    while True:
                        try:
                            await started.signal("item", accepted)
                        except Exception:
                            return accepted
                        accepted += 1

                floods = [asyncio.create_task(flood()) for _ in range(3)]
                taken += await started.result(timeout=SOON)
                sent += sum(await asyncio.gather(*floods))
                left = (await started.status()).unread_signals
                unread += sum(left.values())
                ends += bool(left)
            return sent, taken, unread, ends

    with Fleet(dsn, app="edge_flows:app") as fleet:
        fleet.until("worker.ready")
        sent, taken, unread, ends = run(main())
        assert sent == taken + unread
        fleet.process.terminate()
        assert fleet.ends() == 0
        lines = [line for line in fleet.output.splitlines() if "signals.unread" in line]
    said = sum(int(line.partition("signals=")[2].split()[0]) for line in lines)
    assert (len(lines), said) == (ends, unread)


# --- what is recorded of a failure


def test_failed_run_shows_the_tries_of_its_step() -> None:
    @workflow("hopeless")
    async def hopeless(ctx: WorkflowContext) -> None:
        await ctx.step("try it", raising, Transient("no"), policy=Policy(retry_limit=2, retry_delay=timedelta(0)))

    async def main() -> None:
        async with MemoryWorker(App(hopeless)) as worker:
            started = await worker.client.trigger(hopeless)
            await worker.run()
            status = await started.status()
            assert (status.state, status.tried) == ("ERROR", 3)
            assert (status.error or "").startswith("try it: pgtask.Transient: no (at ")

    run(main())


def test_revived_run_has_all_its_tries_outside_of_steps(dsn: str) -> None:
    rows = Rows(dsn)

    async def main() -> int:
        async with Client(dsn) as client:
            started = await client.trigger(edge_flows.revivable)
            with pytest.raises(RunFailed):
                await started.result(timeout=SOON)
            await asyncio.to_thread(rows, "UPDATE pg_task SET error = NULL WHERE id = $1", started.id)
            return await started.result(timeout=SOON)

    with Fleet(dsn, app="edge_flows:app") as fleet:
        fleet.until("worker.ready")
        assert run(main()) == 1


def test_result_of_a_resumed_step_is_kept(dsn: str) -> None:
    rows = Rows(dsn)

    async def main() -> None:
        async with Client(dsn) as client:
            started = await client.trigger(edge_flows.put_off)
            await asyncio.to_thread(rows.until, "SELECT count(*) = 1 FROM pg_task_checkpoints WHERE due_at IS NOT NULL")
            await asyncio.to_thread(rows.until, "SELECT locked_by IS NULL FROM pg_task")
            assert await started.resume()
            await asyncio.to_thread(
                rows.until,
                "SELECT waits_on = 'signal go' AND locked_by IS NULL FROM pg_task JOIN pg_task_runs USING (id)",
            )
            await started.signal("go")
            assert await started.result(timeout=SOON) == 2

    with Fleet(dsn, app="edge_flows:app") as fleet:
        fleet.until("worker.ready")
        run(main())
    assert [
        tuple(row) for row in rows("SELECT result, error, due_at FROM pg_task_checkpoints WHERE kind = 'step'")
    ] == [("2", None, None)]


# --- times


@pytest.mark.parametrize("duration", [timedelta.max, timedelta(days=365_001), timedelta(microseconds=-1)])
@pytest.mark.parametrize("what", ["sleep", "signal"])
def test_a_wait_that_no_row_can_wait_is_refused(what: str, duration: timedelta) -> None:
    @workflow("eternal")
    async def eternal(ctx: WorkflowContext) -> None:
        try:
            if what == "sleep":
                await ctx.sleep("nap", duration)
            else:
                await ctx.wait_for_signal("go", timeout=duration)
        except Exception:
            did.append("caught")

    state, error, recorded = run(ended(eternal))
    assert (state, recorded, did) == ("ERROR", [], [])
    assert error.startswith("sleep 'nap': " if what == "sleep" else "the wait for signal 'go': timeout=")
    assert "must be a timedelta, zero or more" in error


def test_a_thread_that_has_nothing_to_await_is_free_again() -> None:
    """An exception of a step does not keep its thread."""

    @workflow("two_threads")
    async def two_threads(ctx: WorkflowContext) -> str:
        for number in range(3):
            with contextlib.suppress(StepFailed):
                await ctx.step(f"leave {number}", raising_in_a_thread, StopIteration(), policy=Policy())
        return await ctx.step("thread", lambda: threading.current_thread().name)

    assert run(ended(two_threads))[0] == "SUCCESS"
