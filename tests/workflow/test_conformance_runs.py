"""The store of a client in Postgres and the one in memory: each call has the same answer and the same effect."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import timedelta
from typing import Any
from uuid import UUID

import apps
import flows
import pytest
from fix_database import run
from fix_stores import Stores

from pgtask import Context, Done, EnqueueError, RunCancelled, RunFailed, Task, WorkflowContext, workflow
from pgtask._workflow.entries import EndRun, RecordCheckpoint, SpawnChildren
from pgtask._workflow.values import Checkpoint, ChildRow
from pgtask.errors import ResultTimeout, RunNotFound

DAY = timedelta(days=1)


class Post(Task):
    pass


class Write(Post):
    text: Any = None

    async def run(self, ctx: Context) -> Done:
        return Done()


@workflow("other")
async def other(ctx: WorkflowContext) -> None: ...


# --- trigger and enqueue


def test_key_belongs_to_one_task_or_one_workflow(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            client = world.client
            task = await client.enqueue(Write(), key="one")
            assert await client.enqueue(Write(), key="one") == task
            started = await client.trigger(other, key="one")
            waiting = await client.trigger(flows.waiting, 0, key="one")
            again = await client.trigger(other, key="one")
            assert again.id == started.id
            assert [getattr(one.id, "is_new", None) for one in (started, waiting, again)] == [True, True, False]
            assert {one.id for one in await client.runs()} == {started.id, waiting.id}

    run(main())


def test_key_is_free_when_its_run_has_ended(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            first = await world.client.trigger(other, key="one")
            lease = await world.claim(first.id)
            await world.journal.submit(EndRun(lease, 1, output="null"))
            assert (await world.client.trigger(other, key="one")).id != first.id

    run(main())


def test_many_with_keys_are_one_task_for_each_key(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            ids = await world.client.enqueue_many([Write(text) for text in "abab"], key=lambda step: str(step.text))
            assert ids[:2] == ids[2:]
            assert len(set(ids)) == 2
            plain = await world.client.enqueue_many([Write("a"), Write("b")])
            assert len(set(plain) | set(ids)) == 4

    run(main())


@pytest.mark.parametrize(
    "how",
    ["value", "size", "queue", "key", "delay", "time zone", "many", "input", "signal", "not a workflow", "both times"],
)
def test_wrong_values_are_refused_and_nothing_is_written(stores: Stores, how: str) -> None:
    async def main() -> None:
        async with stores() as world:
            client = world.client
            started = await client.trigger(flows.waiting, 0)
            waiting: Any = flows.waiting
            naive = (await world.now()).replace(tzinfo=None)
            calls: dict[str, Any] = {
                "value": lambda: client.enqueue(Write(object())),
                "size": lambda: client.enqueue(apps.Mark("x" * 2_000_000)),
                "queue": lambda: client.enqueue(Write(), queue=""),
                "key": lambda: client.enqueue(Write(), key=""),
                "delay": lambda: client.delay(Write(), timedelta(-1)),
                "time zone": lambda: client.schedule(Write(), at=naive),
                "many": lambda: client.enqueue_many([Write(), Write(object())]),
                "input": lambda: client.trigger(waiting, "zero"),
                "signal": lambda: client.signal(started.id, "go", float("nan")),
                "not a workflow": lambda: client.trigger(main),  # type: ignore[arg-type]
                "both times": lambda: client.trigger(other, after=DAY, at=naive),
            }
            with pytest.raises(EnqueueError):
                await calls[how]()
            with pytest.raises(ZeroDivisionError):
                await client.enqueue_many(Write(1 // n) for n in (1, 0))
            assert [(one.id, one.unread_signals) for one in await client.runs()] == [(started.id, {})]

    run(main())


def test_runs_are_due_when_they_were_to_be(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            at = (await world.now() + DAY).replace(microsecond=0)
            scheduled = await world.client.trigger(flows.waiting, 0, at=at, queue="slow", priority=7, key="one")
            task = await world.task(scheduled.id)
            assert task is not None
            lane = (task["wakeup_at"], task["queue"], task["priority"], task["key"])
            assert lane in ((at, "slow", 7, "one"), (at, "slow", 7, "waiting/one"))
            later = await (await world.client.trigger(flows.waiting, 0, after=DAY)).status()
            assert later.due_at is not None
            assert abs(later.due_at - later.seen_at - DAY) < timedelta(seconds=20)
            assert (later.state, later.name, later.input, later.recorded) == ("QUEUED", "waiting", "0", 0)

    run(main())


# --- status and results


def test_runs_are_listed_by_name_and_state_latest_first(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            client = world.client
            waiting = sorted([(await client.trigger(flows.waiting, number)).id for number in range(3)])
            (single,) = await client.trigger_many(other, [None])
            await world.claim(waiting[1])
            await client.run(waiting[0]).cancel()

            async def listed(*args: Any, **options: Any) -> list[UUID]:
                return [one.id for one in await client.runs(*args, **options)]

            everything = sorted([single, *waiting], reverse=True)
            assert await listed() == everything
            assert await listed(flows.waiting) == await listed("waiting") == waiting[::-1]
            assert await listed(state="CANCELLED") == waiting[:1]
            assert await listed(state="RUNNING") == [waiting[1]]
            assert await listed("other", state="RUNNING") == []
            assert await listed(limit=2) == everything[:2]
            assert await listed(limit=2, before=everything[1]) == everything[2:]

    run(main())


def test_status_tells_the_progress_of_a_run(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(flows.waiting, 0)
            lease = await world.claim(started.id)
            for number, name in enumerate("ab", 1):
                checkpoint = Checkpoint(number, str(number), "step", name, "1")
                await world.journal.submit(RecordCheckpoint(lease, checkpoint, 4 if number == 1 else None))
            status = await started.status()
            progress = (status.state, status.version, status.recorded, status.last_step, status.started_at is not None)
            assert progress == ("RUNNING", 4, 2, "b", True)
            await world.journal.submit(EndRun(lease, 4, output="7"))
            status = await started.status()
            assert (status.state, status.output, status.error, status.due_at) == ("SUCCESS", "7", None, None)
            assert status.ended_at is not None

    run(main())


def test_result_is_the_end_of_the_run(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            good, bad, gone = [await world.client.trigger(flows.waiting, 0) for _ in range(3)]
            with pytest.raises(ResultTimeout, match="has not ended within"):
                await good.result(timeout=0.01)
            waiting = asyncio.create_task(good.result(timeout=20))
            await asyncio.sleep(0)
            await world.journal.submit(EndRun(await world.claim(good.id), 1, output="7"))
            assert await waiting == 7
            await world.journal.submit(EndRun(await world.claim(bad.id), 1, error="ValueError: no\nat x"))
            with pytest.raises(RunFailed, match=f"^run {bad.id} failed: ValueError: no$"):
                await bad.result(timeout=20)
            await gone.cancel()
            with pytest.raises(RunCancelled, match=f"^run {gone.id} was cancelled$"):
                await gone.result(timeout=20)

    run(main())


def test_unknown_and_ended_runs_are_refused(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            unknown = world.client.run(UUID(int=1))
            with pytest.raises(RunNotFound, match="there is no run"):
                await unknown.status()
            with pytest.raises(RunNotFound, match="has ended, or never was"):
                await unknown.signal("go")
            assert (await unknown.cancel(), await unknown.resume()) == (False, False)
            ended = await world.client.trigger(other)
            await world.journal.submit(EndRun(await world.claim(ended.id), 1, output="null"))
            with pytest.raises(RunNotFound, match="has ended, or never was"):
                await ended.signal("go")
            assert (await ended.cancel(), await ended.resume()) == (False, False)

    run(main())


# --- cancel and resume


def test_cancel_ends_the_children_of_a_run_too(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            parent = await world.client.trigger(flows.patient)
            lease = await world.claim(parent.id)
            row = ChildRow(UUID(int=parent.id.int + 1), "waiting", '{"waiting":{"Run":0}}', "default", 0)
            spawn = Checkpoint(1, "1", "spawn", "inner", "1")
            await world.journal.submit(SpawnChildren(lease, spawn, 1, [row]))
            assert (await world.client.run(row.id).status()).parent == parent.id
            assert await parent.cancel()
            assert not await parent.cancel()
            assert [one.state for one in await world.client.runs()] == ["CANCELLED", "CANCELLED"]

    run(main())


def test_cancelled_run_comes_back_into_its_lane(stores: Stores) -> None:
    """With its key, unless another task has that."""

    async def main() -> None:
        async with stores() as world:
            lane: dict[str, Any] = {"queue": "flows", "priority": 7, "key": "one"}
            first = await world.client.trigger(flows.waiting, 0, **lane)
            assert not await first.resume(), "it is due"
            assert await first.cancel()
            second = await world.client.trigger(flows.waiting, 0, key="one")
            assert second.id != first.id
            with pytest.raises(EnqueueError, match=rf"^run {first.id} .* key 'one' is that of task {second.id} by now"):
                await first.resume()
            assert (await first.status()).state == "CANCELLED"
            await second.cancel()
            assert await first.resume()
            task = await world.task(first.id)
            assert task is not None
            found = {name: task[name] for name in lane}
            assert found in (lane, {**lane, "key": "waiting/one"})
            assert (await world.client.trigger(flows.waiting, 0, key="one")).id == first.id

    run(main())


STATES: dict[str, tuple[dict[str, Any], str | None, bool]] = {
    "scheduled": ({"wakeup_at": 3600.0}, None, False),
    "due": ({"wakeup_at": -1.0}, None, False),
    "due again": ({"wakeup_at": -1.0, "tried": 2}, "a signal", False),
    "to be tried again": ({"wakeup_at": 3600.0, "tried": 2}, None, True),
    "to be tried again by another worker": ({"wakeup_at": 3600.0}, "a signal", False),
    "paused": ({"wakeup_at": None}, "a signal", True),
    "running": ({}, "a signal", False),
    "failed": ({"error": "no", "tried": 3}, None, True),
}


@pytest.mark.parametrize("state", STATES)
def test_resume_wakes_a_run_in_the_states_that_allow_it(stores: Stores, state: str) -> None:
    change, waits_on, resumes = STATES[state]

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(flows.waiting, 0)
            if state == "running":
                await world.claim(started.id)
            await world.change(started.id, **change)
            await world.pause(started.id, waits_on)
            before = await world.task(started.id)
            assert await started.resume() == resumes
            after = await world.task(started.id)
            assert after is not None
            if resumes:
                due = after["wakeup_at"] <= await world.now()
                assert (due, after["tried"], after["error"]) == (True, 0, None)
            else:
                assert after == before

    run(main())


@pytest.mark.parametrize("state", ["scheduled", "to be tried again", "paused"])
def test_signal_wakes_a_paused_run_and_no_other(stores: Stores, state: str) -> None:
    change = STATES[state][0]

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(flows.waiting, 0)
            await world.change(started.id, **change)
            if state != "scheduled":
                await world.pause(started.id, "signal no")
            status = await started.status()
            is_paused = state == "paused"
            assert (status.state, status.waits_on) == (("PAUSED", "signal no") if is_paused else ("QUEUED", None))
            for number in range(2):
                await started.signal("go", number)
            task = await world.task(started.id)
            assert task is not None
            assert (task["wakeup_at"] <= await world.now()) == is_paused
            status = await started.status()
            assert (status.state, status.unread_signals) == ("QUEUED", {"go": 2})

    run(main())


def test_task_that_is_no_run_is_refused_as_one(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            plain = await world.client.enqueue(Write())
            with pytest.raises(
                RunNotFound, match=rf"^task {plain} is not the run of a workflow; signal go was not sent"
            ):
                await world.client.signal(plain, "go")
            other_than_a_run = world.client.run(plain)
            assert (await other_than_a_run.cancel(), await other_than_a_run.resume()) == (False, False)
            assert await world.task(plain) is not None
            assert await world.client.runs() == []

    run(main())


# --- failures


def test_failures_yields_the_tasks_parked_from_now_on(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            early, late = [await world.client.trigger(flows.waiting, 0, queue=name) for name in ("a", "b")]
            await world.change(early.id, error="before")
            async with aclosing(world.client.failures()) as failures:
                told = asyncio.ensure_future(anext(failures))
                parked = None
                async with asyncio.timeout(20):
                    while parked is None:  # it may not listen yet
                        await world.change(late.id, error=None)
                        await world.change(late.id, error="after")
                        await asyncio.wait([told], timeout=0.2)
                        parked = told.result() if told.done() else None
            assert (parked.id, parked.queue, parked.error) == (late.id, "b", "after")

    run(main())


def test_id_of_a_run_may_be_text_and_nothing_else(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(flows.waiting, 0)
            found = world.client.run(str(started.id))
            assert found.id == started.id
            await world.client.signal(str(started.id), "go", 1)
            status = await found.status()
            assert status.unread_signals == {"go": 1}
            with pytest.raises(EnqueueError, match=r"^'abc' is not the id of a run: give a UUID, or its text$"):
                world.client.run("abc")
            assert await world.client.runs(before=str(started.id)) == []
            with pytest.raises(EnqueueError, match="'abc' is not the id of a run"):
                await world.client.runs(before="abc")
            with pytest.raises(EnqueueError, match="None is not the id of a run"):
                await world.client.signal(None, "go")  # type: ignore[arg-type]

    run(main())
