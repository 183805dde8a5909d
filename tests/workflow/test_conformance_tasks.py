"""The tasks of a client in Postgres and in memory: each call has the same answer and the same effect."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from fix_database import run
from fix_stores import Stores, World

from pgtask import Context, Done, EnqueueError, Task, WorkflowContext, workflow
from pgtask.errors import TaskNotFound
from pgtask.tasks import TaskStatus

HOUR = timedelta(hours=1)


class Errand(Task):
    pass


class Walk(Errand):
    place: str = "home"

    async def run(self, ctx: Context) -> Done:
        return Done()


class Carry(Errand):
    weight: int

    async def run(self, ctx: Context) -> Done:
        return Done()


@workflow("journey")
async def journey(ctx: WorkflowContext) -> None: ...


async def four(world: World) -> dict[str, UUID]:
    """A task in each state."""
    client = world.client
    ids: dict[str, UUID] = {
        "leased": await client.enqueue(Walk("a"), key="one"),
        "ready": await client.enqueue(Carry(1), queue="heavy", priority=2),
        "scheduled": await client.delay(Walk("b"), HOUR),
    }
    ids["parked"] = (await client.trigger(journey, key="two")).id
    await world.claim(ids["leased"])
    await world.change(ids["parked"], error="OSError: no such road", tried=3)
    return ids


async def states(world: World, **wanted: Any) -> list[str]:
    return [task.state async for task in world.client.tasks(**wanted)]


async def column(world: World, id: UUID, name: str) -> Any:
    task = await world.task(id)
    assert task is not None
    return task[name]


def test_status_has_the_state_and_columns_of_a_task(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await four(world)
            found: dict[str, TaskStatus] = {name: await world.client.task(id).status() for name, id in ids.items()}
            assert {name: task.state for name, task in found.items()} == {name: name for name in ids}
            assert [task.label for task in found.values()] == [
                "Errand.Walk",
                "Errand.Carry",
                "Errand.Walk",
                "journey.Run",
            ]
            heavy, parked = found["ready"], found["parked"]
            assert (heavy.step, heavy.queue, heavy.priority) == ('{"Errand":{"Carry":{"weight":1}}}', "heavy", 2)
            assert (parked.error, parked.tried, parked.key) == ("OSError: no such road", 3, "two")
            assert abs(found["scheduled"].wakeup_at - found["scheduled"].seen_at - HOUR) < timedelta(seconds=20)
            assert (heavy.error, heavy.progress, heavy.leased_until) == (None, None, None)

    run(main())


def test_task_that_is_not_there_is_said_so(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            gone = await world.client.enqueue(Walk())
            handle = world.client.task(str(gone))
            assert await handle.cancel()
            uses: list[Any] = [handle.status, handle.cancel, handle.retry, lambda: handle.reschedule(after=HOUR)]
            for use in [*uses, lambda: handle.move(queue="other"), world.client.task(uuid4()).status]:
                with pytest.raises(TaskNotFound, match=r"is not in the table: .*finished tasks leave the table"):
                    await use()

    run(main())


def test_changes_of_one_task_leave_a_leased_one_alone(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await four(world)
            leased = world.client.task(ids["leased"])
            assert not await leased.cancel()
            assert not await leased.retry()
            assert not await leased.reschedule(after=HOUR)
            assert not await leased.move(queue="other", priority=5)
            assert await column(world, ids["leased"], "queue") == "default"
            assert await leased.cancel(force=True)
            assert await world.task(ids["leased"]) is None

    run(main())


def test_changes_of_one_task_are_made(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await four(world)
            client = world.client
            assert await client.task(ids["scheduled"]).retry()
            assert (await client.task(ids["scheduled"]).status()).state == "ready"
            assert await client.task(ids["ready"]).move(priority=7)
            assert await client.task(ids["ready"]).move(queue="light")
            assert [await column(world, ids["ready"], name) for name in ("queue", "priority")] == ["light", 7]
            at = (await world.now() + HOUR).replace(microsecond=0)
            assert await client.task(ids["ready"]).reschedule(at=at)
            assert await column(world, ids["ready"], "wakeup_at") == at
            assert await client.task(ids["parked"]).reschedule(after=HOUR)
            revived = await client.task(ids["parked"]).status()
            assert (revived.state, revived.error, revived.tried) == ("scheduled", None, 0)
            assert (await client.run(ids["parked"]).status()).state == "QUEUED"

    run(main())


def test_retry_of_a_parked_run_reopens_it(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await four(world)
            assert (await world.client.run(ids["parked"]).status()).state == "ERROR"
            assert await world.client.task(ids["parked"]).retry()
            status = await world.client.run(ids["parked"]).status()
            assert (status.state, status.error, status.ended_at) == ("QUEUED", None, None)

    run(main())


def test_cancel_of_a_run_keeps_its_record(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await four(world)
            assert await world.client.task(ids["parked"]).cancel()
            assert (await world.client.run(ids["parked"]).status()).state == "CANCELLED"
            assert await world.client.tasks().cancel() == 2
            running = await world.client.trigger(journey)
            await world.claim(running.id)
            assert not await world.client.task(running.id).cancel()
            assert await world.client.tasks(task=journey).cancel(force=True) == 1
            assert (await running.status()).state == "CANCELLED"

    run(main())


def test_paused_run_is_not_rescheduled(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            paused = await world.client.trigger(journey)
            await world.change(paused.id, wakeup_at=None)
            await world.pause(paused.id, "signal go")
            assert not await world.client.task(paused.id).reschedule(after=HOUR)
            assert await world.client.tasks().reschedule(after=HOUR) == 0
            assert (await paused.status()).state == "PAUSED"

    run(main())


def test_filters_choose_tasks(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            await four(world)
            every = ["leased", "ready", "scheduled", "parked"]
            assert await states(world) == every
            assert await states(world, state=("parked", "ready")) == ["ready", "parked"]
            assert await states(world, queue="heavy") == ["ready"]
            assert await states(world, task=Errand) == await states(world, task="Errand") == every[:3]
            assert await states(world, task=journey) == ["parked"]
            for step in (Walk, "Walk", "Errand.Walk"):
                assert await states(world, step=step) == ["leased", "scheduled"]
            assert await states(world, error="OSError%road") == ["parked"]
            assert await states(world, error="OSError") == await states(world, error="O_Error") == []
            assert await states(world, task=Errand, key="one") == ["leased"]
            assert await states(world, task=Errand, key="one", state="parked") == []
            assert await states(world, older_than=HOUR) == []
            assert await world.client.tasks(task="Errand", queue="default").count() == 2
            assert await states(world, where={"weight": 1}) == await states(world, where={"weight": "1"}) == ["ready"]
            assert await states(world, where={"weight": 10}) == await states(world, where={"weight.0": 1}) == []

    run(main())


def test_age_counts_since_a_task_fell_due_or_was_parked(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await four(world)
            for id in ids.values():
                await world.change(id, wakeup_at=-3 * 3600)
            assert await states(world, older_than=2 * HOUR) == ["leased", "ready", "ready", "parked"]
            assert await states(world, older_than=4 * HOUR) == []

    run(main())


def test_changes_of_many_are_counted_once(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            await four(world)
            await world.client.enqueue_many(Carry(n) for n in range(5))
            tasks = world.client.tasks()
            assert await tasks.move(queue="other") == 8
            assert await tasks.move(queue="other") == 0
            assert await tasks.reschedule(after=2 * HOUR) == 8
            assert await world.client.tasks(state="scheduled").count() == 8
            assert await tasks.retry() == 8
            assert await tasks.retry() == 0
            assert await world.client.tasks(step=Carry).cancel() == 6
            assert await tasks.cancel(force=True) == 3
            assert await tasks.count() == 0

    run(main())


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"state": "waiting"}, "must be one of leased, ready, scheduled, parked"),
        ({"state": ()}, "must be one of"),
        ({"state": "ready", "error": "x"}, "only parked tasks have an error"),
        ({"queue": 5}, r"tasks\(queue=5\) must be a text"),
        ({"error": "a\0"}, "without NUL"),
        ({"task": Walk}, "is a step; give it as step="),
        ({"task": 5}, "must be a task or a workflow"),
        ({"step": Errand}, "is not a step"),
        ({"step": ""}, "must be the class of a step"),
        ({"step": "Errand.Walk", "task": "Other"}, "Other.* has no step Errand.Walk"),
        ({"key": "", "task": "Errand"}, "must be 1 to 512 characters"),
        ({"key": "k"}, "a key belongs to a task; give task= as well"),
        ({"older_than": 5}, "^older_than=5 must be a timedelta"),
        ({"queue": "a,b"}, "no queue has a comma in its name"),
        ({"where": {"a..b": 1}}, "'a..b' is not the name of a field"),
        ({"where": {"a": object()}}, "the value of a cannot be JSON"),
        ({"where": {"a": "x\0"}}, "without NUL"),
    ],
)
def test_wrong_filters_are_refused(stores: Stores, wanted: dict[str, Any], says: str) -> None:
    async def main() -> None:
        async with stores() as world:
            with pytest.raises(EnqueueError, match=says):
                world.client.tasks(**wanted)

    run(main())


def test_wrong_changes_are_refused_before_anything_is_sent(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await four(world)
            for tasks in (world.client.task(ids["ready"]), world.client.tasks()):
                changes: Any = tasks
                calls: list[tuple[Any, str]] = [
                    (lambda: changes.reschedule(), "needs a time"),  # noqa: B023
                    (lambda: changes.reschedule(after=HOUR, at=HOUR), "either after= or at="),  # noqa: B023
                    (lambda: changes.reschedule(after=-HOUR), "zero or more"),  # noqa: B023
                    (lambda: changes.move(), "needs a place"),  # noqa: B023
                    (lambda: changes.move(queue="a,b"), "without a comma"),  # noqa: B023
                    (lambda: changes.move(priority=40_000), "must be a whole number"),  # noqa: B023
                ]
                for call, says in calls:
                    with pytest.raises(EnqueueError, match=says):
                        await call()
            with pytest.raises(EnqueueError, match="'x' is not the id of a task"):
                world.client.task("x")
            assert await states(world) == ["leased", "ready", "scheduled", "parked"]

    run(main())


def test_stats_count_the_tasks_of_each_lane(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            await four(world)
            default, heavy = (await world.client.stats()).lanes
            assert (default.queue, default.priority, heavy.queue, heavy.priority) == ("default", 0, "heavy", 2)
            assert (default.ready, default.scheduled, default.leased, default.parked) == (0, 1, 1, 1)
            assert (heavy.ready, heavy.scheduled, heavy.leased, heavy.parked) == (1, 0, 0, 0)
            assert default.oldest_due is None
            assert heavy.oldest_due is not None
            assert default.next_due is not None

    run(main())
