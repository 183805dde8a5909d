"""The journal in Postgres and the one in memory: each entry has the same answer and the same effect."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import flows
import pytest
from fix_database import run
from fix_stores import Stores, World

from pgtask._ids import first_id
from pgtask._workflow.entries import (
    Adopt,
    CollectResults,
    EndRun,
    LeasedEntry,
    LoadHistory,
    RecordCheckpoint,
    SpawnChildren,
    Suspend,
    TakeSignal,
)
from pgtask._workflow.values import Checkpoint, ChildRow, RunResult
from pgtask.errors import RunStopped

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
STEP = Checkpoint(1, "1", "step", "a", "1")
SIGNAL = Checkpoint(1, "1", "signal", "go")


async def claimed(world: World) -> Any:
    """The lease of a new run."""
    started = await world.client.trigger(flows.waiting, 0)
    return await world.claim(started.id)


def child_row(id: UUID | None = None) -> ChildRow:
    return ChildRow(id or UUID(int=first_id()), "waiting", '{"waiting":{"Run":0}}', "default", 0)


async def spawned(world: World, lease: Any, number: int = 1) -> Any:
    """The lease of a new child."""
    row = child_row()
    await world.journal.submit(
        SpawnChildren(lease, Checkpoint(number, str(number), "spawn", f"c{number}", "1"), 1, [row])
    )
    return await world.claim(row.id)


def test_journal_refuses_entries_under_a_lost_lease(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            late = await claimed(world)
            await world.expire(late)
            current = await world.claim(late.id)
            await world.client.signal(late.id, "go")
            row = child_row()
            entries: tuple[LeasedEntry[Any], ...] = (
                Adopt(late, "waiting"),
                RecordCheckpoint(late, STEP, 1),
                SpawnChildren(late, STEP, 1, [row]),
                TakeSignal(late, SIGNAL, 1),
                Suspend(late, late.seen_at, None, 0, "signal go"),
                EndRun(late, 1, output="1"),
                EndRun(late, 1, error="no"),
            )
            for entry in entries:
                with pytest.raises(RunStopped, match="the lease of the run was lost"):
                    await world.journal.submit(entry)
            status = await world.client.run(late.id).status()
            assert (status.state, status.version, status.recorded) == ("RUNNING", None, 0)
            assert status.unread_signals == {"go": 1}
            assert [one.id for one in await world.client.runs()] == [late.id]
            await world.journal.submit(RecordCheckpoint(current, STEP, 1))
            assert await world.recorded(late.id) == [STEP]

    run(main())


def test_history_of_a_run_is_what_it_has_recorded(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            fresh = await world.journal.submit(LoadHistory(lease.id))
            assert (fresh.is_known, fresh.version, fresh.state, fresh.checkpoints) == (True, None, None, [])
            await world.journal.submit(RecordCheckpoint(lease, STEP, 3))
            nap = Checkpoint(2, "2.0.1", "sleep", "nap", due_at=LONG_AGO)
            await world.journal.submit(RecordCheckpoint(lease, nap, None))
            history = await world.journal.submit(LoadHistory(lease.id))
            assert (history.version, sorted(history.checkpoints)) == (3, [STEP, nap])
            assert abs(history.seen_at - await world.now()) < timedelta(seconds=20)
            assert await world.client.run(lease.id).cancel()
            assert (await world.journal.submit(LoadHistory(lease.id))).wakeup_at is None

    run(main())


def test_step_put_off_is_completed_under_its_number(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)

            async def record(tried: int, result: str | None = None) -> tuple[Any, ...]:
                due_at = None if result else datetime(2030, 1, tried, tzinfo=UTC)
                error = None if result else f"try {tried}"
                put = Checkpoint(1, "1", "step", "a", result, error, due_at, tried)
                await world.journal.submit(RecordCheckpoint(lease, put, None))
                (found,) = await world.recorded(lease.id)
                return found[4:8]

            assert await record(1) == (None, "try 1", datetime(2030, 1, 1, tzinfo=UTC), 1)
            assert await record(3) == (None, "try 3", datetime(2030, 1, 3, tzinfo=UTC), 3)
            # An entry that is sent twice may arrive late.
            assert await record(2) == (None, "try 3", datetime(2030, 1, 3, tzinfo=UTC), 3)
            assert await record(3, "5") == ("5", None, None, 3)
            assert await record(3) == ("5", None, None, 3)
            assert await record(4) == ("5", None, None, 3)

    run(main())


@pytest.mark.parametrize("kind", ["record", "spawn", "take"])
def test_progress_of_a_run_clears_its_claims(stores: Stores, kind: str) -> None:
    """Claims that ended without an outcome count no more; a look for a signal that is not there proves nothing."""

    async def main() -> None:
        async with stores() as world:
            started = await world.client.trigger(flows.waiting, 0)
            await world.change(started.id, claims=2)
            lease = await world.claim(started.id)
            entries = {
                "record": RecordCheckpoint(lease, STEP, 1),
                "spawn": SpawnChildren(lease, STEP, 1, [child_row()]),
                "take": TakeSignal(lease, SIGNAL, 1),
            }
            entry: Any = entries[kind]
            if kind == "take":
                await world.journal.submit(entry)
                assert (await claims(world, lease.id), world.cleared) == (3, [])
                await world.client.signal(lease.id, "go")
            await world.journal.submit(entry)
            assert (await claims(world, lease.id), world.cleared) == (1, [lease.id])

    run(main())


async def claims(world: World, run: UUID) -> int:
    task = await world.task(run)
    assert task is not None
    return int(task["claims"])


def test_signals_are_taken_in_their_order_and_once(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            for value in (1, 2):
                await world.client.signal(lease.id, "go", value)
            await world.client.signal(lease.id, "other", 3)
            for number, payload in ((1, "1"), (2, "2")):
                wanted = Checkpoint(number, str(number), "signal", "go")
                taken = await world.journal.submit(TakeSignal(lease, wanted, 1))
                assert (taken.result, taken.error, taken.is_over) == (payload, None, True)
            taken = await world.journal.submit(TakeSignal(lease, Checkpoint(3, "3", "signal", "go"), None))
            assert not taken.is_over
            assert [(one.number, one.result) for one in await world.recorded(lease.id)] == [(1, "1"), (2, "2")]
            assert (await world.client.run(lease.id).status()).unread_signals == {"other": 1}

    run(main())


def test_wait_for_a_signal_remembers_the_end_of_its_time(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            tomorrow = await world.now() + timedelta(days=1)
            waiting = await world.journal.submit(TakeSignal(lease, SIGNAL._replace(due_at=tomorrow), 1))
            assert (waiting.is_over, waiting.due_at) == (False, tomorrow)
            again = await world.journal.submit(TakeSignal(lease, SIGNAL._replace(due_at=LONG_AGO), None))
            assert (again.is_over, again.due_at) == (False, tomorrow), "the first time counts"
            late = Checkpoint(2, "2", "signal", "go", due_at=LONG_AGO)
            over = await world.journal.submit(TakeSignal(lease, late, None))
            assert (over.result, over.error) == (None, "the time for it was over")
            assert [one.error for one in await world.recorded(lease.id)] == [None, "the time for it was over"]

    run(main())


def test_suspended_run_is_paused_until_it_is_due(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            due_at = await world.now() + timedelta(days=1)
            assert await world.journal.submit(Suspend(lease, lease.seen_at, due_at, 2, "sleep nap")) is None
            status = await world.client.run(lease.id).status()
            assert (status.state, status.waits_on, status.due_at, status.tried) == ("PAUSED", "sleep nap", due_at, 2)
            task = await world.task(lease.id)
            assert task is not None
            assert (task["is_leased"], task["claims"]) == (False, 0)

    run(main())


def test_signal_after_the_look_prevents_the_suspension(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            taken = await world.journal.submit(TakeSignal(lease, SIGNAL, 1))
            await world.client.signal(lease.id, "go")
            seen = await world.journal.submit(Suspend(lease, taken.wakeup_at, None, 0, "signal go"))
            assert seen is not None
            assert seen > taken.wakeup_at
            assert await world.journal.submit(Suspend(lease, seen, None, 0, "signal go")) is None
            assert (await world.client.run(lease.id).status()).state == "PAUSED"

    run(main())


@pytest.mark.parametrize("any_child", [False, True], ids=["all", "any"])
def test_parent_wakes_when_its_children_have_ended(stores: Stores, any_child: bool) -> None:
    async def main() -> None:
        async with stores() as world:
            parent = await claimed(world)
            first, second = await spawned(world, parent, 1), await spawned(world, parent, 2)
            ids = [first.id, second.id]
            wait = Suspend(parent, parent.seen_at, None, 0, "2 children", any_child, ids)
            assert await world.journal.submit(wait) is None
            assert not await is_due(world, parent.id)
            await world.journal.submit(EndRun(first, 1, output="1"))
            assert await is_due(world, parent.id) == any_child
            await world.journal.submit(EndRun(second, 1, error="no"))
            assert await is_due(world, parent.id)
            ended = await world.journal.submit(CollectResults([*ids, parent.id]))
            assert ended == {first.id: RunResult("SUCCESS", "1", None), second.id: RunResult("ERROR", None, "no")}

    run(main())


async def is_due(world: World, run: UUID) -> bool:
    task = await world.task(run)
    assert task is not None
    return bool(task["wakeup_at"] <= await world.now())


def test_run_whose_children_have_ended_is_not_suspended(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            parent = await claimed(world)
            child = await spawned(world, parent)
            await world.journal.submit(EndRun(child, 1, output="1"))
            wait = Suspend(parent, parent.seen_at, None, 0, "1 children", children=[child.id])
            assert await world.journal.submit(wait) == parent.seen_at
            assert (await world.client.run(parent.id).status()).state == "RUNNING"

    run(main())


def test_end_of_a_run_counts_the_signals_left_unread(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            reader, leaver, failing = [await claimed(world) for _ in range(3)]
            for name in ("b", "a", "b"):
                await world.client.signal(leaver.id, name)
                await world.client.signal(failing.id, name)
            leaver.seen_at = failing.seen_at = None
            assert not await world.journal.submit(EndRun(reader, 1, output="1"))
            assert await world.journal.submit(EndRun(leaver, 1, output="2")) == {"a": 1, "b": 2}
            assert await world.journal.submit(EndRun(failing, 1, error="no")) is None
            assert await world.client.run(leaver.id).result(timeout=20) == 2
            assert await world.task(leaver.id) is None

    run(main())


def test_failed_run_forgets_its_uncaught_failures(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            failed = Checkpoint(2, "2", "step", "b", None, "no", None, 6)
            for checkpoint in (STEP, failed):
                await world.journal.submit(RecordCheckpoint(lease, checkpoint, 1))
            await world.journal.submit(EndRun(lease, 1, error="b: no", tried=6, forgotten=[2]))
            assert await world.recorded(lease.id) == [STEP]
            status = await world.client.run(lease.id).status()
            assert (status.state, status.error, status.tried) == ("ERROR", "b: no", 6)
            assert await world.client.run(lease.id).resume()
            assert (await world.client.run(lease.id).status()).state == "QUEUED"

    run(main())


def test_adopted_run_has_not_ended(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            await world.journal.submit(EndRun(lease, 1, error="no"))
            assert await world.client.run(lease.id).resume()
            again = await world.claim(lease.id)
            await world.journal.submit(Adopt(again, "waiting"))
            history = await world.journal.submit(LoadHistory(lease.id))
            assert (history.is_known, history.state) == (True, None)
            assert await world.journal.submit(CollectResults([lease.id])) == {}

    run(main())


@pytest.mark.parametrize("kind", ["record", "spawn", "take"])
def test_entry_that_is_sent_again_changes_nothing(stores: Stores, kind: str) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            for value in (1, 2):
                await world.client.signal(lease.id, "go", value)
            entries = {
                "record": RecordCheckpoint(lease, STEP, 1),
                "spawn": SpawnChildren(lease, Checkpoint(1, "1", "spawn", "c", "1"), 1, [child_row()]),
                "take": TakeSignal(lease, SIGNAL, 1),
            }
            entry: Any = entries[kind]
            answer = await world.journal.submit(entry)
            before = (await world.recorded(lease.id), len(await world.client.runs()))
            if kind == "spawn":
                await world.client.run(entry.children[0].id).cancel()
            again = await world.journal.submit(entry)
            assert (await world.recorded(lease.id), len(await world.client.runs())) == before
            if kind == "take":
                assert (again.result, again.error) == (answer.result, answer.error) == ("1", None)
                assert (await world.client.run(lease.id).status()).unread_signals == {"go": 1}
            if kind == "spawn":
                assert (await world.client.run(entry.children[0].id).status()).state == "CANCELLED"

    run(main())


@pytest.mark.parametrize("end", ["journal", "cancel"])
def test_parent_that_waits_for_another_try_is_not_woken(stores: Stores, end: str) -> None:
    """It has waited for its children, was woken by something else, and has failed."""

    async def main() -> None:
        async with stores() as world:
            parent = await claimed(world)
            children = [await spawned(world, parent, number) for number in (1, 2)]
            ids = [child.id for child in children]
            assert (
                await world.journal.submit(Suspend(parent, parent.seen_at, None, 0, "2 children", False, ids)) is None
            )
            await world.change(parent.id, wakeup_at=3600.0, tried=1)
            for child in children:
                if end == "cancel":
                    assert await world.client.run(child.id).cancel()
                else:
                    await world.journal.submit(EndRun(child, 1, error="no"))
            assert not await is_due(world, parent.id)
            status = await world.client.run(parent.id).status()
            assert (status.state, status.waits_on, status.tried) == ("QUEUED", None, 1)

    run(main())


def test_child_that_is_resumed_has_not_ended(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            parent = await claimed(world)
            child = await spawned(world, parent)
            await world.journal.submit(EndRun(child, 1, error="no"))
            assert await world.client.run(child.id).resume()
            assert await world.journal.submit(CollectResults([child.id])) == {}
            status = await world.client.run(child.id).status()
            assert (status.state, status.error, status.ended_at) == ("QUEUED", None, None)
            wait = Suspend(parent, parent.seen_at, None, 0, "1 children", children=[child.id])
            assert await world.journal.submit(wait) is None

    run(main())
