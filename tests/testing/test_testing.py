"""`pgtask.testing`: a task does the same in memory as in a worker, only at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import apps
import asyncpg
import flows
import pytest
from apps import (
    Counts,
    First,
    Forever,
    Gives,
    GoesUrgent,
    InThread,
    Later,
    Noop,
    Raises,
    Retries,
    ReturnsNone,
    Second,
    Slow,
    Third,
    Urgent,
    Uses,
)
from fix_database import run
from fleet import Fleet, Rows
from marks import MARKS, MemoryMarks

from pgtask import (
    App,
    Client,
    Context,
    DatabaseRefused,
    DefinitionError,
    Done,
    EnqueueError,
    Next,
    Policy,
    Task,
    WorkflowContext,
    workflow,
)
from pgtask.testing import MemoryClient, MemoryTask, MemoryWorker, run_task


@asynccontextmanager
async def worker(**options: Any) -> AsyncIterator[MemoryWorker]:
    async with MemoryWorker(apps.app, db=MemoryMarks(), **options) as made:
        yield made


def names(task: MemoryTask) -> list[str]:
    return [type(step).__name__ for step in task.steps]


# --- running


def test_a_task_runs_to_its_end() -> None:
    task = run_task(apps.app, First(7), db=MemoryMarks())
    assert (task.state, task.steps, task.error) == ("done", [First(7), Second(7), Third(7)], None)


def test_run_task_says_what_to_do_where_a_loop_is_running() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="async with MemoryWorker"):
            run_task(apps.app, First(7))

    run(main())


def test_delays_and_retries_pass_at_once() -> None:
    async def main() -> None:
        async with worker() as w:
            began, start = time.monotonic(), w.now
            later = await w.client.enqueue(Later(86_400.0))
            await w.client.schedule(Noop(1), at=datetime.now(UTC) + timedelta(days=300))
            retried = await w.client.delay(Retries(3), timedelta(hours=5))
            await w.run()
            assert {task.state for task in w.tasks} == {"done"}
            assert w.task(later).tries[1].at - start == timedelta(days=1)
            tries = w.task(retried).tries
            assert [one.attempt for one in tries] == [1, 2, 3, 4]
            assert [one.error for one in tries[:1] + tries[3:]] == [tries[0].error, None]
            assert tries[0].error is not None
            assert tries[0].error.startswith("RuntimeError: not yet (at ")
            assert tries[3].at - tries[0].at == timedelta(seconds=0.15)
            assert w.now - start >= timedelta(days=299)
            assert time.monotonic() - began < 100

    run(main())


def test_within_a_time_only_what_falls_due_in_it_runs() -> None:
    async def main() -> None:
        async with worker() as w:
            start = w.now
            soon = await w.client.delay(Noop(1), timedelta(minutes=5))
            late = await w.client.delay(Noop(2), timedelta(minutes=15))
            await w.run(within=timedelta(minutes=10))
            assert (w.task(soon).state, w.task(late).state) == ("done", "waiting")
            assert w.now - start == timedelta(minutes=10)
            await w.run(within=timedelta(minutes=5))
            assert w.task(late).state == "done"

    run(main())


def test_tasks_run_in_the_order_of_a_worker() -> None:
    async def main() -> None:
        async with worker() as w:
            for number, priority in enumerate([0, 5, 0, 5]):
                await w.client.enqueue(Noop(number), priority=priority)
            await w.run()
            ran = sorted((task.tries[0] for task in w.tasks), key=lambda one: one.at)
            assert len(ran) == 4
        order: list[int] = []

        class Order(Task):
            pass

        class Note(Order):
            number: int

            async def run(self, ctx: Context) -> Done:
                order.append(self.number)
                return Done()

        async with MemoryWorker(App(Order)) as w:
            for number, priority in enumerate([0, 5, 0, 5]):
                await w.client.enqueue(Note(number), priority=priority)
            await w.run()
        assert order == [1, 3, 0, 2]

    run(main())


def test_endless_task_is_named_and_runs_for_a_time() -> None:
    class Loop(Task):
        pass

    class Look(Loop):
        async def run(self, ctx: Context) -> Next[Look]:
            return Next(Look(), after=timedelta(minutes=1))

    async def main() -> None:
        async with MemoryWorker(App(Loop), max_steps=50) as w:
            id = await w.client.enqueue(Look())
            with pytest.raises(AssertionError, match="after 50 steps there is still something to do"):
                await w.run()
            before = len(w.task(id).tries)
            await w.run(within=timedelta(minutes=10))
            assert 9 <= len(w.task(id).tries) - before <= 11

    run(main())


def test_a_long_chain_goes_by_way_of_the_queue_now_and_then() -> None:
    assert len(run_task(apps.app, Counts(250)).tries) == 251


def test_steps_may_wait_together_if_there_is_room() -> None:
    class Pairs(Task):
        pass

    class Meet(Pairs):
        async def run(self, ctx: Context) -> Done:
            await asyncio.wait_for(ctx.resources.wait(), 10)
            return Done()

    async def main() -> None:
        async with MemoryWorker(App(Pairs), resources=asyncio.Barrier(2), concurrency=2) as w:
            await w.client.enqueue_many([Meet(), Meet()])
            await w.run()
            assert [task.state for task in w.tasks] == ["done", "done"]

    run(main())


def test_cancelled_run_releases_its_leases() -> None:
    async def main() -> None:
        async with worker() as w:
            id = await w.client.enqueue(Forever("says-goodbye"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await w.run()
            assert w.task(id).state == "waiting"

    run(main())


def test_the_lifespan_is_entered_unless_resources_are_given() -> None:
    marks = MemoryMarks()
    run_task(apps.app, Uses(), db=marks)
    run_task(apps.app, Uses(), db=marks, resources={"name": "from the test"})
    assert [args[1] for args in marks.rows] == ["from the lifespan", "from the test"]


def test_the_missing_database_is_named() -> None:
    task = run_task(apps.app, First(1))
    assert task.state == "parked"
    assert task.error is not None
    assert task.error.startswith("ctx.db.execute: there is no database in memory")
    assert issubclass(DatabaseRefused, Exception)


# --- the same as in a worker

SAME = [
    First(1),
    Raises("boom"),
    Retries(2),
    Gives("no"),
    ReturnsNone(),
    GoesUrgent(),
    InThread(),
    Counts(120),
    apps.Pair((1, 2)),
    Slow(),
]


@pytest.mark.timeout(60)
def test_task_in_memory_ends_as_in_a_worker(dsn: str) -> None:
    rows = Rows(dsn)
    rows(MARKS)

    async def enqueue() -> list[UUID]:
        async with Client(dsn) as client:
            ids: list[UUID] = [await client.enqueue(step) for step in SAME]
            connection = await asyncpg.connect(dsn)
            insert = "INSERT INTO pg_task (step) VALUES ($1) RETURNING id"
            ids += [await connection.fetchval(insert, text) for text in WRONG]
            await connection.close()
            return ids

    ids = run(enqueue())
    with Fleet(dsn, "--burst", "--unknown", "park") as fleet:
        assert fleet.ends() == 1
    columns = "id, step, tried, error, queue, priority, claims"
    real = {row["id"]: tuple(row)[1:] for row in rows(f"SELECT {columns} FROM pg_task")}

    async def in_memory() -> list[MemoryTask]:
        async with worker() as w:
            for step in SAME:
                await w.client.enqueue(step)
            for text in WRONG:
                await w.client.enqueue(Noop())
                w.tasks[-1].raw = text
            await w.run()
            return w.tasks

    for id, task in zip(ids, run(in_memory()), strict=True):
        found = None
        if task.state != "done":
            found = (task.raw, task.tried, task.error, task.queue, task.priority, task.claims)
        assert real.get(id) == found, task.raw


WRONG = ['{"Odd":{"Noop":{"number":"x"}}}', "garbage", '{"Of":{"Others":null}}']


# --- faults


def test_failures_are_put_where_a_test_wants_them() -> None:
    async def main() -> None:
        async with worker() as w:
            w.fail(Second, OSError("no such disk"))
            id = await w.client.enqueue(First(1))
            await w.run()
            task = w.task(id)
            assert (task.state, task.error, names(task)) == ("parked", "OSError: no such disk", ["First", "Second"])
            w.fail(Retries, ValueError, times=5)
            w.fail(Retries, OSError("the last"))
            id = await w.client.enqueue(Retries(0))
            await w.run()
            assert [one.error for one in w.task(id).tries] == ["ValueError"] * 5 + ["OSError: the last"]
            id = await w.client.enqueue(Retries(0))
            await w.run()
            assert w.task(id).state == "done", "the faults are used up"

    run(main())


def test_a_timeout_comes_at_once_and_cancels_the_step() -> None:
    cancelled = []

    class Patient(Task):
        policy = Policy(timeout=timedelta(hours=1), retry_limit=1)

    class Wait(Patient):
        async def run(self, ctx: Context) -> Done:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                cancelled.append(ctx.attempt)
                raise
            return Done()

    class InAThread(Patient):
        def run(self, ctx: Context) -> Done:
            return Done()

    async def main() -> None:
        async with MemoryWorker(App(Patient)) as w:
            for step in (Wait, InAThread):
                w.time_out(step)
                id = await w.client.enqueue(step())
                await w.run()
                task = w.task(id)
                said = f"Patient.{step.__name__} ran longer than its timeout of 3600 s"
                assert (task.state, [one.error for one in task.tries]) == ("done", [said, None])
        assert cancelled == [1]

    run(main())


def test_a_crash_loses_the_outcome_but_not_what_the_step_did() -> None:
    async def main() -> None:
        for step, ran in ((First(1), ["First", "First", "Second", "Third"]), (Third(1), ["Third", "Third"])):
            async with worker() as w:
                w.crash(type(step))
                id = await w.client.enqueue(step)
                await w.run()
                assert (w.task(id).state, names(w.task(id))) == ("done", ran)
                assert [one.attempt for one in w.task(id).tries] == [1] * len(ran)

    run(main())


def test_a_fault_that_no_try_has_met_is_an_error_of_the_test() -> None:
    @workflow("pays")
    async def pays(ctx: WorkflowContext) -> None:
        await ctx.step("charge", dict)

    async def main() -> None:
        async with MemoryWorker(App(pays)) as w:
            w.fail("chrage", OSError("the bank is away"))
            await w.client.trigger(pays)
            await w.run()

    with pytest.raises(
        AssertionError, match=r"^a fault was put into chrage, which was never tried; .* ran: Run, charge"
    ):
        run(main())


def test_a_fault_that_cannot_be_is_refused() -> None:
    async def main() -> None:
        async with worker() as w:
            with pytest.raises(DefinitionError, match="step First cannot time out: its policy has no timeout"):
                w.time_out(First)
            with pytest.raises(DefinitionError, match="Other is not a step of this app"):
                w.fail(Other, OSError)

    run(main())


class Other(Task):
    pass


# --- the client


def test_a_client_remembers_what_was_enqueued() -> None:
    async def main() -> None:
        async with MemoryClient() as client:
            first = await client.enqueue(Noop(1), queue="mail", priority=3)
            await client.delay(Noop(2), timedelta(minutes=5), key="two")
            again = await client.enqueue(Noop(3), key="two")
            ids = await client.enqueue_many([Noop(4), Urgent()])
            keyed = await client.enqueue_many(
                [Noop(5), Noop(6), Noop(5)], key=lambda step: f"noop {step.number}", conn=object()
            )
        assert client.assert_enqueued(Noop(1), queue="mail", priority=3, times=1).task_id == first
        assert client.assert_enqueued(Noop(2), delay=timedelta(minutes=5), key="two").task_id == again
        assert not client.assert_enqueued(Noop(3)).is_new
        assert [one.task_id for one in client.enqueued[3:5]] == list(ids)
        client.assert_enqueued(Urgent, queue="urgent", priority=5)
        client.assert_enqueued(Noop, times=7)
        assert keyed[0] == keyed[2] != keyed[1]
        client.assert_not_enqueued(First)
        wrongs: list[tuple[Callable[[], Any], str]] = [
            (lambda: client.assert_enqueued(Noop(9)), r"Noop\(number=9\) was not enqueued so; what was:\n  Noop"),
            (lambda: client.assert_enqueued(Noop(1), times=2), "was not enqueued so 2 times, but 1 times"),
            (lambda: client.assert_enqueued(Noop(1), queue="x"), "was not enqueued so"),
            (lambda: client.assert_enqueued(Noop(2), delay=timedelta(0)), "was not enqueued so"),
            (lambda: client.assert_not_enqueued(Noop), "was enqueued, in 'mail'"),
        ]
        for wrong, said in wrongs:
            with pytest.raises(AssertionError, match=said):
                wrong()

    run(main())


def test_a_client_remembers_what_was_triggered() -> None:
    class Start(Task):
        pass

    class Order(Start):
        async def run(self, ctx: Context) -> Done:
            await ctx.resources.trigger(flows.child, 5, key="five")
            return Done()

    async def main() -> None:
        client = MemoryClient()
        async with MemoryWorker(App(Start, flows.parent, flows.child), client=client, resources=client) as w:
            await client.enqueue(Order())
            await client.enqueue(Order())
            later = await client.trigger(flows.parent, 2, queue="slow", priority=3, after=timedelta(hours=1))
            assert client.assert_triggered(flows.parent, 2, delay=timedelta(hours=1)).run_id == later.id
            await w.run()
        one = client.assert_triggered(flows.child, 5, key="five", times=2)
        assert (one.workflow, one.input, one.queue, one.parent) == ("child", 5, "default", None)
        assert [call.is_new for call in client.triggered if call.key] == [True, False]
        assert client.assert_triggered("parent", queue="slow", priority=3, times=1).input == 2
        assert client.assert_triggered("child", 1, times=1).parent == later.id
        client.assert_triggered(flows.child, times=4)
        client.assert_not_triggered(flows.child, 3)
        client.assert_not_triggered("typed")
        for wrong, said in (
            (
                lambda: client.assert_triggered(flows.child, 3),
                r"child with 3 was not triggered so; what was:\n  parent",
            ),
            (lambda: client.assert_triggered("child", times=1), "child was not triggered so 1 times, but 4 times"),
            (lambda: client.assert_not_triggered("child", 5), "child was triggered with 5, in 'default'"),
            (lambda: client.assert_triggered("child", priority=1), "was not triggered so"),
        ):
            with pytest.raises(AssertionError, match=said):
                wrong()
        with pytest.raises(ValueError, match="there is assert_not_"):
            client.assert_triggered("child", times=0)

    run(main())


def test_memory_client_has_no_consumer() -> None:
    with pytest.raises(EnqueueError, match="use the fixture pgtask_database"):
        MemoryClient().consumer()


@workflow("one_by_one")
async def one_by_one(ctx: WorkflowContext) -> list[Any]:
    first, second = await ctx.spawn_many("children", flows.child, [1, 2])
    return [await second, await first, await ctx.results([first, first]), await first]


def test_children_may_be_awaited_in_any_order_and_more_than_once() -> None:
    async def main() -> None:
        async with MemoryWorker(App(one_by_one, flows.child), replays=True) as w:
            run_of = await w.client.trigger(one_by_one)
            await w.run()
            assert await run_of.result() == [4, 2, [2, 2], 2]

    run(main())
