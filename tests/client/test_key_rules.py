"""Keys that another task has: what each rule does to one that waits, runs or is parked; and tasks that expire.

The scenarios run over Postgres and in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import fleet
import pytest
from client_kit import count, play
from fleet import Fleet, Rows
from post import Send, Write
from shifts import Begin, Park, Put, Shift, Tell, app, told

from pgtask import Client, Enqueue, EnqueueError, TaskId
from pgtask._placement import scoped_key, shown_key
from pgtask.testing import MemoryClient, MemoryWorker

HOUR = timedelta(hours=1)
RUNS = "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 h' WHERE key = 'Post/k'"
IS_PARKED = "UPDATE pg_task SET error = 'wrong', tried = 3"


async def states(db: Any) -> list[tuple[Any, ...]]:
    """Return key, text and whether it waits behind another one, of all tasks."""
    rows = await db.fetch(
        "SELECT key, step::json -> 'Post' -> 'Write' ->> 'text', behind IS NOT NULL FROM pg_task ORDER BY key DESC"
    )
    return [tuple(row) for row in rows]


# --- the scope


def test_key_belongs_to_the_name_of_its_task(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("x"), key="k")
        other = await client.enqueue(Tell("x"), key="k")
        assert first.is_new
        assert other.is_new
        again = await client.enqueue(Send("y"), key="k")
        assert (again, again.is_new) == (first, False), "all steps of a task share its keys"

    play(dsn, scenario)


@pytest.mark.parametrize("one", ["a", "a/b", "a%2F", "/", "%"])
@pytest.mark.parametrize("two", ["a", "a/b", "a%2F", "/", "%"])
def test_two_names_never_share_a_key(one: str, two: str) -> None:
    keys = ("k", "/k", "b/k", "2F/k", "%2Fk")
    pairs = {scoped_key(name, key) for name in (one, two) for key in keys}
    assert len(pairs) == len({one, two}) * len(keys)


def test_key_is_shown_as_it_was_given() -> None:
    assert shown_key('{"a/b": {"Step": 1', scoped_key("a/b", "k/l")) == "k/l"
    assert shown_key('{"A":{"Step":{}}}', "/" + scoped_key("A", "k")) == "k"
    assert shown_key('{"A":{"Step":{}}}', "plain") == "plain"
    assert shown_key("[]", "A/k") == "A/k"


def test_key_that_is_too_long_with_its_name_is_refused() -> None:
    with pytest.raises(EnqueueError, match="more than the 2600"):
        scoped_key("\U00010000" * 200, "\U00010000" * 512)


# --- while the other one waits


def test_waiting_task_is_kept_or_replaced(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.delay(Write("first"), HOUR, key="k")
        assert await client.enqueue(Write("kept"), key="k") == first
        assert await states(db) == [("Post/k", "first", False)]
        again = await client.enqueue(Write("new"), key="k", on_conflict="replace", queue="other", priority=7)
        assert (again, again.is_new) == (first, False)
        assert await states(db) == [("Post/k", "new", False)]
        row = await db.fetchrow("SELECT queue, priority, wakeup_at <= now() FROM pg_task")
        assert tuple(row) == ("other", 7, True)

    play(dsn, scenario)


def test_same_step_that_waits_is_enough_for_after(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("x"), key="k", on_conflict="after")
        again = await client.enqueue(Write("x"), key="k", on_conflict="after")
        assert (again, again.is_new) == (first, False)
        other = await client.enqueue(Write("y"), key="k", on_conflict="after")
        assert other.is_new
        last = await client.enqueue(Write("z"), key="k", on_conflict="after")
        assert (last, last.is_new) == (other, False)
        assert await states(db) == [("Post/k", "x", False), ("/Post/k", "z", True)]

    play(dsn, scenario)


def test_task_that_is_enough_is_due_and_expires_as_both_need(dsn: str) -> None:
    """Else the write of the second call would be read late, or never."""

    async def scenario(client: Client, db: Any) -> None:
        await client.delay(Write("x"), HOUR, key="k", on_conflict="after", expires=2 * HOUR)
        assert not (await client.enqueue(Write("x"), key="k", on_conflict="after", expires=3 * HOUR)).is_new
        row = "SELECT wakeup_at <= now(), expires_at > now() + interval '150 min' FROM pg_task"
        assert tuple(await db.fetchrow(row)) == (True, True)
        await client.enqueue(Write("x"), key="k", on_conflict="after")
        assert await db.fetchval("SELECT expires_at FROM pg_task") is None

    play(dsn, scenario)


def test_backoff_of_a_task_that_is_enough_stays(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Write("x"), key="k")
        await db.execute("UPDATE pg_task SET tried = 1, wakeup_at = now() + interval '1 h'")
        await client.enqueue(Write("x"), key="k", on_conflict="after")
        assert await db.fetchval("SELECT wakeup_at > now() FROM pg_task")

    play(dsn, scenario)


def test_enqueue_after_a_waiting_task_holds_it_until_the_commit(dsn: str) -> None:
    """A worker that claimed it before would not see what the caller has written."""

    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Write("x"), key="k")
        async with db.transaction():
            await client.enqueue(Write("x"), key="k", on_conflict="after", conn=db)
            async with client._postgres.connection() as other:
                assert not await other.fetch("SELECT FROM pg_task FOR UPDATE SKIP LOCKED")

    play(dsn, scenario)


# --- while the other one runs


@pytest.mark.parametrize("rule", ["after", "replace"])
def test_new_task_waits_behind_one_that_runs(dsn: str, rule: Any) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("x"), key="k")
        await db.execute(RUNS)
        kept = await client.enqueue(Write("kept"), key="k")
        assert (kept, kept.is_new) == (first, False)
        second = await client.enqueue(Write("x"), key="k", on_conflict=rule)
        assert second.is_new
        third = await client.enqueue(Write("y"), key="k", on_conflict=rule, expires=HOUR)
        assert (third, third.is_new) == (second, False)
        assert await states(db) == [("Post/k", "x", False), ("/Post/k", "y", True)]
        assert await db.fetchval("SELECT wakeup_at FROM pg_task WHERE behind IS NOT NULL") == datetime.max

    play(dsn, scenario)


def test_task_that_waits_alone_takes_the_newer_step(dsn: str) -> None:
    """The other one has gone, and no worker has looked yet. A new task would run first, and the older step last."""

    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Write("x"), key="k")
        await db.execute(RUNS)
        second = await client.enqueue(Write("older"), key="k", on_conflict="replace")
        await db.execute("DELETE FROM pg_task WHERE key = 'Post/k'")
        again = await client.enqueue(Write("newer"), key="k", on_conflict="replace")
        assert (again, again.is_new) == (second, False)
        assert await states(db) == [("/Post/k", "newer", True)]

    play(dsn, scenario)


def test_task_behind_another_one_cannot_be_hurried(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Write("x"), key="k")
        await db.execute(RUNS)
        second = await client.enqueue(Write("x"), key="k", on_conflict="after")
        assert not await client.task(second).retry()
        assert not await client.task(second).reschedule(after=timedelta(0))
        assert await client.tasks(state="scheduled").retry() == 0
        assert await client.tasks(state="scheduled").reschedule(after=timedelta(0)) == 0
        assert await client.task(second).cancel()

    play(dsn, scenario)


def test_task_that_would_expire_before_it_is_due_is_refused(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        with pytest.raises(EnqueueError, match="it would never start"):
            await client.delay(Write("x"), HOUR, expires=timedelta(minutes=1))
        at = datetime.now(UTC) + HOUR
        with pytest.raises(EnqueueError, match="it would never start"):
            await client.schedule(Write("x"), at, expires=at - timedelta(seconds=1))
        with pytest.raises(EnqueueError, match=r"^expires=1:00:00 is before the task is due"):
            await client.enqueue_many([Write("x"), Enqueue(Write("y"), after=2 * HOUR)], expires=HOUR)
        assert await count(db) == 0

    play(dsn, scenario)


# --- while the other one is parked


def test_parked_task_is_kept_revived_or_replaced(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("x"), key="k")
        await db.execute(IS_PARKED)
        kept = await client.enqueue(Write("x"), key="k", on_conflict="after")
        assert (kept, kept.is_new) == (first, False)
        assert await db.fetchval("SELECT error FROM pg_task") == "wrong"
        await client.enqueue(Write("x"), key="k", on_parked="revive")
        assert tuple(await db.fetchrow("SELECT error, tried FROM pg_task")) == (None, 0)
        await db.execute(IS_PARKED)
        assert await client.enqueue(Write("new"), key="k", on_parked="replace") == first
        assert tuple(await db.fetchrow("SELECT error, tried FROM pg_task")) == (None, 0)
        assert await states(db) == [("Post/k", "new", False)]

    play(dsn, scenario)


# --- debounce


def test_debounce_puts_off_up_to_its_ceiling(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        options: dict[str, Any] = {"key": "k", "debounce": timedelta(minutes=10), "ceiling": timedelta(minutes=15)}
        first = await client.enqueue(Write("x"), **options)
        assert await seconds_until_due(db) == pytest.approx(600, abs=5)
        await db.execute(
            "UPDATE pg_task SET wakeup_at = now() + interval '1 min', created_at = now() - interval '1 min'"
        )
        assert await client.enqueue(Write("y"), **options) == first
        assert await seconds_until_due(db) == pytest.approx(600, abs=5)
        await db.execute("UPDATE pg_task SET created_at = now() - interval '12 min'")
        await client.enqueue(Write("z"), **options)
        assert await seconds_until_due(db) == pytest.approx(180, abs=5)
        assert await states(db) == [("Post/k", "z", False)]

    play(dsn, scenario)


async def seconds_until_due(db: Any) -> float:
    return float(await db.fetchval("SELECT extract(epoch FROM wakeup_at - now()) FROM pg_task"))


# --- many


def test_of_items_with_one_key_the_first_is_new(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids = await client.enqueue_many([Write("x"), Write("y"), Write("x")], key=lambda step: step.text)
        assert [id.is_new for id in ids] == [True, True, False]
        items = [Enqueue(Write("z"), key="z"), Enqueue(Write("z"), key="z")]
        assert [getattr(id, "is_new", None) for id in await client.enqueue_many(items)] == [True, False]

    play(dsn, scenario)


def test_many_take_rules_and_items_of_their_own(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Write("0"), key="0")
        await db.execute("UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 h'")
        steps = [Write(str(n)) for n in range(450)]
        ids = await client.enqueue_many(steps, key=lambda step: step.text, on_conflict="after")
        assert all(id.is_new for id in ids)
        assert await count(db) == 451
        again = await client.enqueue_many(steps, key=lambda step: step.text, on_conflict="after")
        assert list(again) == ids
        assert not any(id.is_new for id in again)

    play(dsn, scenario)


def test_items_of_many_have_queues_priorities_times_and_keys(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        old = await client.enqueue(Write("old"), key="k")
        items: list[Any] = [
            Write("plain"),
            Enqueue(Write("lane"), queue="q", priority=5),
            Enqueue(Write("later"), after=HOUR),
            Write("plain"),
            Enqueue(Write("keyed"), key="k"),
            Enqueue(Write("other"), key="l", at=datetime.now(UTC) + HOUR),
        ]
        ids = await client.enqueue_many(items)
        assert ids[4] == old
        assert isinstance(ids[5], TaskId)
        assert ids[5].is_new
        rows = await db.fetch(
            "SELECT id, queue, priority, key, wakeup_at > now() FROM pg_task WHERE id = ANY ($1)", ids
        )
        found = {row[0]: tuple(row)[1:] for row in rows}
        assert [found[id] for id in ids] == [
            ("post", 3, None, False),
            ("q", 5, None, False),
            ("post", 3, None, True),
            ("post", 3, None, False),
            ("post", 3, "Post/k", False),
            ("post", 3, "Post/l", True),
        ]

    play(dsn, scenario)


def test_more_items_with_times_than_one_statement_takes(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        items = [Enqueue(Write(str(n)), after=HOUR) if n % 3 else Write(str(n)) for n in range(5000)]
        ids = await client.enqueue_many(items)
        rows = await db.fetch("SELECT id, step::json -> 'Post' -> 'Write' ->> 'text' FROM pg_task")
        texts = dict(map(tuple, rows))
        assert [texts[id] for id in ids] == [str(n) for n in range(5000)]

    play(dsn, scenario)


# --- wrong arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": "k", "on_conflict": "drop"}, "on_conflict='drop' must be one of 'keep', 'replace', 'after'"),
        ({"key": "k", "on_parked": "after"}, "on_parked='after' must be one of"),
        ({"on_conflict": "after"}, "give key= as well"),
        ({"debounce": HOUR}, "give key= as well"),
        ({"key": "k", "ceiling": HOUR}, "give debounce= as well"),
        ({"key": "k", "debounce": HOUR, "ceiling": timedelta(minutes=1)}, "must not be shorter"),
        ({"key": "k", "debounce": 5}, "timedelta"),
        ({"expires": timedelta(-1)}, "is in the past"),
        ({"expires": 5}, "expires=5 must be a timedelta or a datetime"),
        ({"expires": datetime(2030, 1, 1)}, "no time zone"),
    ],
)
def test_wrong_rules_are_refused(dsn: str, options: dict[str, Any], words: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        for one in (client, MemoryClient()):
            with pytest.raises(EnqueueError, match=words):
                await one.enqueue(Write("x"), **options)
        assert await count(db) == 0

    play(dsn, scenario)


# --- in a worker


def test_task_behind_another_one_starts_when_that_ends(dsn: str, rows: Rows) -> None:
    async def enqueue(text: str) -> TaskId:
        async with Client(dsn) as client:
            return await client.enqueue(Shift(text), key="k", on_conflict="after")

    asyncio.run(enqueue("slow"))
    with Fleet(dsn, app="shifts:app"):
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL", holds=lambda value: value == 1)
        rows.until("SELECT count(to_regclass('told'))", holds=lambda value: value == 1)
        assert asyncio.run(enqueue("second")).is_new
        assert rows.value("SELECT count(*) FROM pg_task WHERE behind IS NOT NULL") == 1
        rows("INSERT INTO told (text) VALUES ('go')")
        rows.until("SELECT count(*) FROM pg_task", holds=lambda value: value == 0, timeout=5)
    assert told(rows) == ["go", "slow", "second"]


@pytest.mark.parametrize(
    "end",
    ["DELETE FROM pg_task WHERE key = 'Shifts/k'", "UPDATE pg_task SET key = NULL WHERE key = 'Shifts/k'"],
    ids=["cancelled", "set free"],
)
def test_task_behind_another_one_starts_whoever_ends_that(dsn: str, rows: Rows, end: str) -> None:
    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.delay(Shift("first"), HOUR, key="k")
            await client.enqueue(Shift("second"), key="k", on_conflict="after")

    asyncio.run(enqueue())
    rows(end)
    fleet.burst(dsn, app="shifts:app", procs=1)
    assert told(rows) == ["second"]


def test_expired_task_is_dropped_or_parked_unless_it_has_begun(dsn: str, rows: Rows) -> None:
    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue(Tell("late"), expires=timedelta(microseconds=1))
            await client.enqueue(Park("late"), expires=datetime(2020, 1, 1, tzinfo=UTC))
            await client.enqueue(Tell("in time"), expires=HOUR)
            await client.enqueue_many([Tell("many")], expires=timedelta(microseconds=1))
            await client.enqueue(Tell("begun"), expires=timedelta(hours=2))

    asyncio.run(enqueue())
    rows("UPDATE pg_task SET tried = 1, expires_at = now() WHERE expires_at > now() + interval '90 min'")
    done = fleet.burst(dsn, app="shifts:app", procs=1, code=1)
    assert sorted(told(rows)) == ["begun", "in time"]
    assert rows.value("SELECT error FROM pg_task") == "Tale.Park has expired before it began"
    assert "task.expired" in done.output


def test_task_that_has_begun_does_not_expire(dsn: str, rows: Rows) -> None:
    """Its expiry passes while it is put off: in its first step, and in one that it went on to under the same lease."""

    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue(Put("once more"), expires=timedelta(seconds=1))
            await client.enqueue(Begin(), expires=timedelta(seconds=1))

    with fleet.ready(dsn, app="shifts:app"):  # so that both start within their second
        asyncio.run(enqueue())
        rows.until("SELECT count(*) FROM pg_task", holds=lambda value: value == 0)
    assert sorted(told(rows)) == ["once more", "once more", "went on", "went on"]
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_expiry_is_gone_when_a_task_goes_on(dsn: str, rows: Rows) -> None:
    """It may be released before its next step starts, and claimed later."""

    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue(Begin(waits=True), expires=HOUR)

    asyncio.run(enqueue())
    with Fleet(dsn, app="shifts:app"):
        rows.until("SELECT count(to_regclass('told'))", holds=lambda value: value == 1)
        assert [tuple(row) for row in rows("SELECT locked_by IS NULL, expires_at FROM pg_task")] == [(False, None)]
        rows("INSERT INTO told (text) VALUES ('go')")
        rows.until("SELECT count(*) FROM pg_task", holds=lambda value: value == 0)


def test_step_that_a_stop_has_cancelled_does_not_expire(dsn: str, rows: Rows) -> None:
    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue(Shift("slow"), expires=HOUR)

    asyncio.run(enqueue())
    with Fleet(dsn, "--grace", "0", app="shifts:app") as workers:
        rows.until("SELECT count(to_regclass('told'))", holds=lambda value: value == 1)
        workers.process.terminate()
        assert workers.ends() == 0
    ((locked_by, expires_at),) = rows("SELECT locked_by, expires_at FROM pg_task")
    assert (locked_by, expires_at) == (None, None)


def test_parked_task_that_is_rescheduled_does_not_expire_again(dsn: str, rows: Rows) -> None:
    async def main(*, is_first: bool) -> None:
        async with Client(dsn) as client:
            if is_first:
                await client.enqueue(Park("late"), expires=timedelta(0))
            else:
                assert await client.tasks(state="parked").reschedule(after=timedelta(0)) == 1

    for is_first in (True, False):
        asyncio.run(main(is_first=is_first))
        fleet.burst(dsn, app="shifts:app", procs=1, code=int(is_first))
    assert told(rows) == ["late"]


def test_consumer_gets_no_expired_tasks(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Tell("late"), expires=timedelta(0))
        await client.enqueue(Park("late"), expires=timedelta(0))
        await client.enqueue(Tell("in time"), expires=HOUR)
        async with Client(dsn, app=app) as mine, mine.consumer() as consumer:
            leases = await consumer.claim(wait=timedelta(seconds=1))
            assert [lease.raw for lease in leases] == ['{"Tale":{"Tell":{"text":"in time"}}}']
            assert await consumer.done(leases) == []
        assert [row[0] for row in await db.fetch("SELECT error FROM pg_task")] == ["has expired before it began"]

    play(dsn, scenario)


def test_tasks_behind_parked_ones_do_not_hide_another(dsn: str, rows: Rows) -> None:
    """There are more of them than one look reads, and all were due before."""
    rows(
        """INSERT INTO pg_task (step, key, error) SELECT '{"Shifts":{"Shift":{"text":"x"}}}', 'Shifts/' || n, 'wrong'
        FROM generate_series(1, 2500) AS n"""
    )
    rows(
        """INSERT INTO pg_task (step, key, wakeup_at, behind)
        SELECT '{"Shifts":{"Shift":{"text":"x"}}}', '/Shifts/' || n, 'infinity', now() - interval '1 h'
        FROM generate_series(1, 2500) AS n"""
    )
    rows(
        """INSERT INTO pg_task (step, key, wakeup_at, behind)
        VALUES ('{"Shifts":{"Shift":{"text":"free"}}}', '/Shifts/free', 'infinity', now())"""
    )
    fleet.burst(dsn, app="shifts:app", procs=1, code=1)
    assert told(rows) == ["free"]


def test_key_that_is_not_committed_holds_up_its_own_task_only(dsn: str, rows: Rows) -> None:
    step = '{"Shifts":{"Shift":{"text":"%s"}}}'
    for number in range(30):
        rows(
            "INSERT INTO pg_task (step, key, wakeup_at, behind) VALUES ($1, $2, 'infinity', now())",
            step % number,
            f"/Shifts/{number}",
        )

    async def main() -> None:
        db = await asyncpg.connect(dsn)
        async with db.transaction():
            await db.execute("INSERT INTO pg_task (step, key) VALUES ($1, 'Shifts/7')", step % "new")
            with Fleet(dsn, app="shifts:app"):
                await asyncio.to_thread(
                    rows.until, "SELECT count(*) FROM pg_task WHERE key <> '/Shifts/7'", holds=lambda value: value == 0
                )
        await db.close()

    asyncio.run(main())
    assert sorted(told(rows)) == sorted(str(number) for number in range(30) if number != 7)


def test_many_expired_tasks_are_passed_under_hold(dsn: str, rows: Rows) -> None:
    async def enqueue() -> None:
        async with Client(dsn) as client:
            await client.enqueue_many([Tell("")] * 2000)
            await client.enqueue_many([Tell("late")] * 3000, expires=timedelta(microseconds=1))

    asyncio.run(enqueue())
    fleet.burst(dsn, app="shifts:app", procs=1)
    assert told(rows) == []
    assert rows.value("SELECT count(*) FROM pg_task") == 0


# --- what became of the step


RULES = [
    (conflict, parked, debounce)
    for conflict in ("keep", "replace", "after")
    for parked in ("keep", "revive", "replace")
    for debounce in (None, timedelta(minutes=1))
]
STATES = ("none", "waits", "scheduled", "runs", "parked", "runs, one behind", "parked, one behind")


def expected(state: str, same: bool, conflict: str, parked: str, debounce: timedelta | None) -> str:
    """The outcome, by the words of the reference."""
    takes = conflict == "replace" or debounce is not None
    if state == "none":
        return "new"
    if state.startswith("runs"):
        behind = "replaced" if "behind" in state else "behind"
        return behind if takes or conflict == "after" else "kept"
    if state.startswith("parked"):
        if parked != "revive":
            return "replaced" if parked == "replace" else "kept"
        if same or (conflict == "keep" and debounce is None):
            return "revived"
        return "replaced" if "behind" in state else "behind"  # behind the one that is revived
    if takes:
        return "replaced"
    if conflict == "after" and same and state == "scheduled" and parked == "replace":
        return "replaced"  # it is due earlier; the statement cannot tell that from a parked one
    return "behind" if conflict == "after" and not same else "kept"


async def in_memory(state: str, step: Write, rule: Any) -> str:
    client = MemoryClient()
    if state != "none":
        first = await client.delay(Write("x"), HOUR if state == "scheduled" else timedelta(0), key="k")
        task = client.rows.tasks[first]
        if "behind" in state:
            task.state = "leased"
            await client.enqueue(Write("behind"), key="k", on_conflict="replace")
        task.state = {"runs": "leased", "park": "parked"}.get(state[:4], "waiting")  # type: ignore[assignment]
        client.rows.now += timedelta(seconds=1)
    return (await client.enqueue(step, key="k", **rule)).outcome


@pytest.mark.parametrize("state", STATES)
@pytest.mark.one_database
def test_outcome_says_what_became_of_the_step(dsn: str, state: str) -> None:
    async def prepare(client: Client, db: Any) -> TaskId | None:
        await db.execute("DELETE FROM pg_task")
        if state == "none":
            return None
        first = await client.delay(Write("x"), HOUR if state == "scheduled" else timedelta(0), key="k")
        if "behind" in state:
            await db.execute(RUNS)
            await client.enqueue(Write("behind"), key="k", on_conflict="replace")
        await db.execute("UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL")
        if state.startswith("runs"):
            await db.execute(RUNS)
        elif state.startswith("parked"):
            await db.execute(IS_PARKED + " WHERE key = 'Post/k'")
        return first

    async def scenario(client: Client, db: Any) -> None:
        for conflict, parked, debounce in RULES:
            for same in (True, False):
                first = await prepare(client, db)
                step = Write("x" if same else "y")
                rule: Any = {"on_conflict": conflict, "on_parked": parked, "debounce": debounce}
                id = await client.enqueue(step, key="k", **rule)
                said = (state, same, conflict, parked, debounce, id.outcome)
                assert id.outcome == expected(state, same, conflict, parked, debounce), said
                assert id.is_new == (id.outcome in ("new", "behind")), said
                assert id.outcome == await in_memory(state, step, rule), said
                row = await db.fetchrow("SELECT step, behind, error FROM pg_task WHERE id = $1", id)
                has_it = f'"text":"{step.text}"' in row["step"]
                if id.outcome == "revived":
                    assert (id, row["error"]) == (first, None), said
                elif id.outcome != "kept":
                    assert has_it, said
                if id.outcome == "behind":
                    assert row["behind"] is not None, said
                    assert (await client.task(id).status()).behind_id == first, said
                if not same and id.outcome == "kept":
                    assert not has_it, said

    play(dsn, scenario)


# --- in memory


def test_rules_in_memory_are_those_of_the_table(dsn: str) -> None:
    """The same calls, one after the other, have the same answers."""
    calls: list[Callable[[Client], Awaitable[TaskId]]] = [
        lambda client: client.delay(Write("a"), HOUR, key="k"),
        lambda client: client.enqueue(Write("b"), key="k"),
        lambda client: client.enqueue(Write("b"), key="k", on_conflict="after"),
        lambda client: client.enqueue(Write("c"), key="k", on_conflict="after"),
        lambda client: client.delay(Write("d"), HOUR, key="k", on_conflict="replace"),
        lambda client: client.enqueue(Write("e"), key="k", debounce=HOUR),
        lambda client: client.enqueue(Tell("e"), key="k"),
        lambda client: client.enqueue(Write("x"), key="k", on_parked="revive"),
        lambda client: client.delay(Write("f"), HOUR, key="l", on_conflict="after", expires=2 * HOUR),
        lambda client: client.enqueue(Write("f"), key="l", on_conflict="after", expires=3 * HOUR),
    ]

    async def scenario(client: Client, db: Any) -> None:
        memory = MemoryClient()
        mine: list[TaskId] = []
        theirs: list[TaskId] = []
        for call in calls:
            mine.append(await call(memory))
            theirs.append(await call(client))
        assert [mine.index(id) for id in mine] == [theirs.index(id) for id in theirs]
        assert [id.outcome for id in mine] == [id.outcome for id in theirs]
        raw = {row["id"]: row["step"] for row in await db.fetch("SELECT id, step FROM pg_task")}
        assert {memory.rows.tasks[one].raw for one in mine} == {raw[one] for one in theirs}
        last = memory.rows.tasks[mine[-1]]
        assert last.expires_at is not None
        ours = (last.due_at <= memory.rows.now, last.expires_at > memory.rows.now + 2 * HOUR)
        row = "SELECT wakeup_at <= now(), expires_at > now() + interval '2 h' FROM pg_task WHERE id = $1"
        assert ours == tuple(await db.fetchrow(row, theirs[-1])) == (True, True)

    play(dsn, scenario)


def test_memory_worker_passes_expired_tasks_and_promotes(dsn: str) -> None:
    async def main() -> None:
        async with MemoryWorker(app, resources=None) as worker:
            late = await worker.client.enqueue(Tell(""), expires=timedelta(0))
            first = await worker.client.delay(Tell(""), HOUR, key="k")
            second = await worker.client.enqueue(Tell("x" * 0), key="k", on_conflict="replace")
            assert second == first
            await worker.run()
            tasks = {task.id: task for task in worker.tasks}
            assert tasks[first].state == "done"
            assert tasks[late].state == "done"

    asyncio.run(main())
