"""Groups: each ends once, when nothing of it waits or runs, whatever ends its members and whichever process dies."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from operator import le
from pathlib import Path
from typing import Any

import pytest
from fix_database import run
from fleet import Fleet, Rows, burst, ready
from grouping import Break, Crawl, Fetch, Gather, Insert, Keep, Odd, Page, Report, Wait, Walk

from pgtask import App, Client, Group, GroupStatus, Task
from pgtask.groups import OnParked

pytestmark = pytest.mark.timeout(120)

APP = "grouping:app"
ENDED = "SELECT count(*) FROM pg_task_groups WHERE ended_at IS NOT NULL"
THEN = "SELECT count(*) FROM mark WHERE step LIKE 'then %'"


def start(dsn: str, *members: Task, name: str = "g", results: bool = False, on_parked: OnParked = "wait") -> None:
    async def main() -> None:
        async with Client(dsn) as client:
            await client.start(Group(name, results=results, then=Report(name), on_parked=on_parked), members)

    run(main())


def status(dsn: str, name: str = "g") -> GroupStatus:
    async def main() -> GroupStatus:
        async with Client(dsn) as client:
            return await client.group(name).status()

    return run(main())


def counts(dsn: str, name: str = "g") -> tuple[Any, ...]:
    found = status(dsn, name)
    return found.state, found.total, found.done, found.parked, found.cancelled


def results(dsn: str, kind: Any, name: str = "g") -> list[Any]:
    async def main() -> list[Any]:
        async with Client(dsn) as client:
            return [value async for value in client.group(name).results(kind)]

    return run(main())


# --- the end, and what counts


def test_members_that_members_enqueue_count_and_end(dsn: str, rows: Rows) -> None:
    start(dsn, *(Fetch(f"{number}", links=4, depth=2) for number in range(50)), results=True)
    burst(dsn, procs=2, app=APP)
    total = 50 * (1 + 4 + 16)
    assert counts(dsn) == ("ended", total, total, 0, 0)
    pages = results(dsn, Page)
    assert len(pages) == len({page.url for page in pages}) == total
    assert rows.value(THEN) == 1, "and a burst runs the step at the end"


def test_each_kind_of_outcome_counts(dsn: str, rows: Rows) -> None:
    """Next with new members, batches, transactions, the archive, a value that is no JSON, and what a step parks."""
    start(dsn, *(Walk(3, links=2) for _ in range(10)), name="walk")
    start(dsn, *(Gather(number) for number in range(30)), name="gather", results=True, on_parked="go on")
    start(dsn, *(Insert(number) for number in range(10)), name="insert", results=True)
    start(dsn, *(Keep(number) for number in range(10)), name="keep", results=True)
    start(dsn, Odd(), Break(), name="odd", results=True, on_parked="go on")
    burst(dsn, procs=2, app=APP, code=1)
    assert counts(dsn, "walk") == ("ended", 70, 70, 0, 0)
    assert counts(dsn, "gather") == ("ended", 30, 29, 1, 0)
    assert sorted(results(dsn, int, "gather")) == [number for number in range(30) if number != 13]
    assert counts(dsn, "insert") == ("ended", 10, 10, 0, 0)
    assert sorted(results(dsn, int, "insert")) == sorted(results(dsn, int, "keep")) == list(range(10))
    assert rows.value("SELECT count(*) FROM pg_task_archive") == 10
    assert counts(dsn, "odd") == ("ended", 2, 0, 2, 0)
    assert "cannot be stored as JSON" in rows.value("SELECT string_agg(error, '') FROM pg_task")
    assert rows.value("SELECT count(*) FROM pg_task WHERE group_id IS NOT NULL") == 3
    assert rows.value(THEN) == 5


def test_short_steps_in_turns_count_with_results(dsn: str, rows: Rows) -> None:
    start(dsn, *(Fetch(f"{number}") for number in range(6000)), results=True)
    burst(dsn, procs=1, app=APP)
    assert counts(dsn) == ("ended", 6000, 6000, 0, 0)
    assert sorted(int(page.url) for page in results(dsn, Page)) == list(range(6000))


def test_last_member_ends_its_group_by_each_way_out(dsn: str, rows: Rows) -> None:
    """Parked, cancelled, retried, or deleted by SQL, while a fleet is there."""
    with ready(dsn, procs=2, app=APP):
        start(dsn, Break(), name="goes on", on_parked="go on")
        for name in ("cancelled", "revived", "deleted"):
            start(dsn, Break(), Fetch("a"), name=name)
        rows.until("SELECT count(*) FROM pg_task WHERE error IS NOT NULL", holds=lambda parked: parked == 4)
        rows.until(ENDED)
        assert counts(dsn, "goes on") == ("ended", 1, 0, 1, 0)
        assert counts(dsn, "revived") == ("open", 2, 1, 1, 0)

        async def end() -> None:
            async with Client(dsn) as client:
                assert await client.tasks(group="cancelled").cancel() == 1
                assert await client.group("revived").retry(error="nothing%") == 0

        run(end())
        rows("DELETE FROM pg_task USING pg_task_groups g WHERE group_id = g.id AND name = 'deleted'")
        rows("UPDATE pg_task SET step = $1, error = NULL WHERE group_id = (SELECT id FROM pg_task_groups"
             " WHERE name = 'revived')", '{"Crawl":{"Fetch":{"url":"b"}}}')  # fmt: skip
        rows.until(ENDED, holds=lambda ended: ended == 4)
        rows.until(THEN, holds=lambda then: then == 4)
    assert counts(dsn, "cancelled") == counts(dsn, "deleted") == ("ended", 2, 1, 0, 1)
    assert counts(dsn, "revived") == ("ended", 2, 2, 0, 0)


def test_groups_without_members_end_at_their_start(dsn: str, rows: Rows) -> None:
    start(dsn)
    assert counts(dsn) == ("ended", 0, 0, 0, 0)
    assert rows.value("SELECT count(*) FROM pg_task") == 1


def many(dsn: str, groups: int, members: int) -> None:
    async def main() -> None:
        async with Client(dsn) as client:
            for number in range(groups):
                steps = [Fetch(f"{one}", links=1, depth=1) for one in range(members)]
                await client.start(Group(f"{number}", then=Report(f"{number}")), steps)

    run(main(), timeout=300)


def race(dsn: str, rows: Rows, groups: int, procs: int, kills: int) -> None:
    """Let workers race to the ends of groups, and kill some of them; each group must end once."""
    with ready(dsn, procs=procs, app=APP) as fleet:
        many(dsn, groups, 3)
        for number in range(kills):
            rows.until(ENDED, holds=partial(le, groups * number // (kills + 1)))
            fleet.family()[-1].kill()
            fleet.until("worker.ready")
        rows.until(ENDED, holds=lambda ended: ended == groups)
        rows.until("SELECT count(*) FROM pg_task", holds=lambda left: left == 0)
    assert rows("SELECT step, count(*) FROM mark GROUP BY step HAVING count(*) > 1") == []
    assert rows.value(THEN) == groups
    totals = rows("SELECT sum(total) + (SELECT sum(added) FROM pg_task_group_counts) FROM pg_task_groups")
    assert totals[0][0] == groups * 6 == rows.value("SELECT sum(done) FROM pg_task_group_counts")


def test_small_groups_end_once_in_a_race_with_a_kill(dsn: str, rows: Rows) -> None:
    race(dsn, rows, groups=60, procs=3, kills=1)


@pytest.mark.faults
def test_two_thousand_groups_end_once_under_kills(dsn: str, rows: Rows) -> None:
    race(dsn, rows, groups=2000, procs=8, kills=10)


# --- progress and cancellation


def test_progress_never_goes_back_and_is_exact_at_the_end(dsn: str, rows: Rows) -> None:
    async def watch() -> list[GroupStatus]:
        async with Client(dsn) as client:
            group = await client.start(Group("g"), (Fetch(f"{number}") for number in range(20_000)))
            seen = []
            while True:
                seen.append(await group.status())
                if seen[-1].has_ended:
                    return seen

    with ready(dsn, procs=2, app=APP):
        seen = run(watch())
    done = [one.done for one in seen]
    assert done == sorted(done)
    assert all(one.total == 20_000 and one.left == 20_000 - one.done for one in seen)
    assert seen[-1].done == 20_000


def test_cancelled_group_starts_nothing_more_and_ends(dsn: str, rows: Rows, tmp_path: Path) -> None:
    """While each of two workers runs some, has some in hand, and many wait."""
    members = [Wait(str(tmp_path), goes_on=True) for _ in range(12_000)]
    with ready(dsn, "--concurrency", "4", procs=2, app=APP):
        start(dsn, *members)
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL", holds=lambda held: held >= 8)

        async def cancel() -> None:
            async with Client(dsn) as client:
                group = client.group("g")
                assert await group.cancel()
                while (await group.status()).left > 8:  # noqa: ASYNC110  workers remove the others
                    await asyncio.sleep(0.01)
                (tmp_path / "go").touch()
                ended = await group.wait()
                assert (ended.state, ended.total, ended.done, ended.cancelled) == ("cancelled", 12_000, 0, 12_000)
                assert not await group.cancel()

        run(cancel())
        rows.until(THEN)
    started = {path.name.split("-", 1)[1] for path in tmp_path.iterdir() if path.name != "go"}
    assert len(started) == 8, "neither another member nor the next step of one has begun"


def test_cancel_ends_a_small_group_without_a_worker(dsn: str, rows: Rows) -> None:
    start(dsn, Fetch("a"), Fetch("b"))

    async def main() -> None:
        async with Client(dsn) as client:
            assert await client.group("g").cancel(then=False)

    run(main())
    assert counts(dsn) == ("cancelled", 2, 0, 0, 2)
    assert rows.value("SELECT count(*) FROM pg_task") == 0


# --- consumers


def test_consumer_finishes_members_and_ends_their_group(dsn: str, rows: Rows) -> None:
    start(dsn, *(Fetch(f"{number}") for number in range(10)))

    async def main() -> None:
        async with Client(dsn, app=App(Crawl)) as client, client.consumer() as consumer:
            leases = await consumer.claim(10)
            assert await consumer.done(leases[:5]) == []
            async with client._store.connection() as db, db.transaction():  # type: ignore[attr-defined]
                assert await consumer.done(leases[5:], conn=db) == []
            assert len(await consumer.claim(1, wait=timedelta(seconds=30))) == 1, "the step at the end"

    run(main())
    assert counts(dsn) == ("ended", 10, 10, 0, 0)


def test_fleet_without_groups_sends_nothing_for_them(dsn: str, rows: Rows) -> None:
    """The statements that a worker knows, by what the server has prepared for it."""
    with Fleet(dsn, "--burst", app=APP) as fleet:
        assert fleet.ends() == 0
    assert rows.value("SELECT count(*) FROM pg_stat_user_tables WHERE relname = 'pg_task_group_counts'"
                      " AND seq_scan + coalesce(idx_scan, 0) > 0") == 0  # fmt: skip
