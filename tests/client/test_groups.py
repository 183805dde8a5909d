"""Groups from a client: the same over Postgres and in memory, and what a client refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from client_kit import play
from fix_database import run
from fleet import Fleet
from grouping import Break, Confused, Crawl, Fetch, Page, Report, Walk, app
from marks import MARKS, MemoryMarks

from pgtask import Client, Enqueue, EnqueueError, Group, GroupStatus, SyncClient
from pgtask.errors import DecodeError, GroupNotFound
from pgtask.testing import MemoryWorker

World = tuple[Client, Callable[[], Awaitable[None]]]
"""A client, and a function that has workers run all that is due."""


def drain(dsn: str) -> int:
    with Fleet(dsn, "--burst", app="grouping:app") as fleet:
        return fleet.ends()


@asynccontextmanager
async def in_memory(dsn: str) -> AsyncIterator[World]:
    async with MemoryWorker(app, db=MemoryMarks()) as worker:
        yield worker.client, worker.run


@asynccontextmanager
async def in_postgres(dsn: str) -> AsyncIterator[World]:
    async with Client(dsn) as client:
        connection = await asyncpg.connect(dsn)
        await connection.execute(MARKS)
        await connection.close()

        async def work() -> None:
            parked = await client.tasks(state="parked").count()
            leaves = await client.tasks(step=Break, state=("ready", "scheduled")).count()
            assert await asyncio.to_thread(drain, dsn) == (1 if parked or leaves else 0)

        yield client, work


@pytest.fixture(params=[in_memory, in_postgres])
def world(request: pytest.FixtureRequest, dsn: str) -> Callable[[], Any]:
    return lambda: request.param(dsn)


def test_a_group_from_start_to_end_in_both(world: Callable[[], Any]) -> None:
    """Members of members, results, parked members, a retry, keys, times, and what the handle says meanwhile."""

    async def main() -> None:
        async with world() as (client, work):
            items = [Fetch("a", links=2, depth=1), Enqueue(Fetch("b"), key="k"), Enqueue(Fetch("c"), key="k"), Break()]
            group = await client.start(Group("g", results=True, then=Report("g")), [*items, Walk(2)])
            first = await group.status()
            assert (first.state, first.total, first.done, first.left, first.eta) == ("open", 4, 0, 4, None)
            await work()
            now = await group.status()
            assert (now.state, now.total, now.done, now.parked, now.left) == ("open", 6, 5, 1, 0)
            assert [task.error async for task in group.tasks(parked=True)] == ["broken 17"]
            assert [page.url async for page in group.results(Page)] == ["a", "b", "a/0", "a/1"]
            assert await client.tasks(group="g", error="nothing%").count() == 0
            assert await group.retry(error="nothing%") == 0
            assert await group.retry(error="broken%") == 1
            await work()
            assert (await group.status()).parked == 1
            assert await client.tasks(group="g", task=Crawl).cancel() == 1
            await work()
            ended = await group.wait()
            assert (ended.state, ended.total, ended.done, ended.cancelled) == ("ended", 6, 5, 1)
            assert ended.then_task is not None
            assert not await group.cancel()

    run(main(), timeout=120)


def test_ends_without_work_in_both(world: Callable[[], Any]) -> None:
    async def main() -> None:
        async with world() as (client, _):
            empty = await client.start(Group("empty", then=Enqueue(Report("empty"), queue="q", priority=3)), [])
            assert (await empty.status()).state == "ended"
            ((task,), _) = [[one async for one in client.tasks(queue="q")], None]
            assert (task.priority, task.label) == (3, "Crawl.Report")
            assert task.id == (await empty.status()).then_task
            dropped = await client.start(Group("dropped", then=Report("dropped")), [Fetch("a"), Fetch("b")])
            assert await dropped.cancel(then=False)
            status = await dropped.status()
            assert (status.state, status.cancelled, status.then_task) == ("cancelled", 2, None)
            seen = [now async for now in dropped.watch(timedelta(0))]
            assert seen[-1].has_ended
            with pytest.raises(EnqueueError, match="already"):
                await client.start(Group("empty"), [Fetch("a")])
            assert await client.tasks(step=Fetch).count() == 0, "a start that is refused enqueues nothing"

    run(main())


def test_refusals_in_both(world: Callable[[], Any]) -> None:
    async def main() -> None:
        async with world() as (client, work):
            with pytest.raises(GroupNotFound, match="'no'"):
                await client.group("no").status()
            with pytest.raises(GroupNotFound):
                await client.group("no").retry()
            with pytest.raises(GroupNotFound):
                await client.group("no").cancel()
            group = await client.start(Group("typed", results=True), [Fetch("a")])
            plain = await client.start(Group("plain"), [Fetch("a")])
            await work()
            with pytest.raises(DecodeError, match="the result of task"):
                assert [value async for value in group.results(int)]
            assert [value async for value in group.results()] == [{"url": "a"}]
            with pytest.raises(EnqueueError, match="results=True"):
                assert [value async for value in plain.results()]

    run(main())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Group(""), "1 to 512 characters"),
        (lambda: Group("a\0"), "1 to 512 characters"),
        (lambda: Group("a", on_parked="stop"), '"wait" or "go on"'),  # type: ignore[arg-type]
        (lambda: Group("a", then=Report), "must be a step"),  # type: ignore[arg-type]
        (lambda: Group("a", then=Enqueue(Report("a"), key="k")), "the end of the group is its time"),
    ],
)
def test_wrong_group_is_refused(make: Callable[[], Group], text: str) -> None:
    with pytest.raises(EnqueueError, match=text):
        make()


def test_start_is_part_of_the_transaction_of_the_caller(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        transaction = db.transaction()
        await transaction.start()
        await client.start(Group("g"), (Fetch(f"{number}") for number in range(10)), conn=db)
        assert await db.fetchval("SELECT count(*) FROM pg_task WHERE group_id > 0") == 10
        await transaction.rollback()
        with pytest.raises(GroupNotFound):
            await client.group("g").status()

        def fails() -> Any:
            yield Fetch("a")
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await client.start(Group("g"), fails())
        assert await db.fetchval("SELECT count(*) FROM pg_task") == 0

    play(dsn, scenario)


def test_progress_reads_a_few_rows_by_indexes(dsn: str) -> None:
    """With 30,000 members that wait, and 8,000 that are parked."""

    async def scenario(client: Client, db: Any) -> None:
        group = await client.start(Group("g"), (Fetch(f"{number}") for number in range(38_000)))
        await db.execute(
            "UPDATE pg_task SET error = 'x' WHERE id IN (SELECT id FROM pg_task ORDER BY id LIMIT 8000);"
            " INSERT INTO pg_task_group_counts (group_id, slot, parked) SELECT id, 1, 8000 FROM pg_task_groups; ANALYZE"
        )
        status = await group.status()
        assert (status.parked, status.left) == (8000, 30_000)
        from pgtask._postgres.store import statement  # the plan is that of the statement itself

        await db.execute("SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off")
        text = statement("groups/status").replace("$1", "ARRAY['g']").replace("$2", "1")
        plan = "\n".join(row[0] for row in await db.fetch(f"EXPLAIN (ANALYZE) {text}"))
        assert "Seq Scan on pg_task " not in plan
        assert max(int(float(part.split()[0])) for part in plan.split("rows=") if part[0].isdigit()) <= 38_000
        assert "rows=5000" in plan.replace(".00", "")

    play(dsn, scenario)


def test_sync_client_has_the_same(dsn: str) -> None:
    run(_mark(dsn))
    with SyncClient(dsn) as client:
        group = client.start(Group("g", results=True, then=Report("g")), (Fetch(f"{number}") for number in range(20)))
        assert group.status().total == 20
        assert client.tasks(group="g").count() == 20
        assert drain(dsn) == 0
        assert [page.url for page in group.results(Page)] == [f"{number}" for number in range(20)]
        assert [now.done for now in group.watch()] == [20]
        assert group.wait().has_ended
        assert group.retry() == 0
        assert not group.cancel()
        assert repr(client.group("g")) == "<group g>"


async def _mark(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(MARKS)
    await connection.close()


def test_steps_are_no_result(dsn: str) -> None:
    """`Done([Fetch(...)])` would drop what the user has meant to enqueue."""

    async def main() -> None:
        async with MemoryWorker(app) as worker:
            task = await worker.client.enqueue(Confused())
            await worker.run()
            assert "write Done(enqueue=[...])" in (worker.task(task).error or "")

    run(main())


def test_time_to_the_end_is_unknown_where_a_person_has_to_act() -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    status = GroupStatus(
        name="a", state="open", results=False, total=10, done=8, parked=2, cancelled=0, started_at=began, ended_at=None,
        then_task=None, seen_at=began, rate=5.0,
    )  # fmt: skip
    assert status.eta is None
    assert msgspec.structs.replace(status, parked=0, total=8).eta == timedelta(0)
    assert msgspec.structs.replace(status, total=20).eta == timedelta(seconds=2)
    assert msgspec.structs.replace(status, state="cancelling", total=20).eta is None
