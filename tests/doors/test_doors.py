"""The doors: the same scenarios on the connection of each driver."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest
from client_kit import numbered
from door_kit import ALL, Caller, end_sessions, play_door
from post import Numbered, Send, Sweep, Write, doubled
from round_trips import RoundTrips

from pgtask import Enqueue
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, DataRefused, EnqueueError, RowsLocked

HOUR = timedelta(hours=1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the database during app initialization:RuntimeWarning"),
    pytest.mark.one_database(
        "DROP TRIGGER IF EXISTS refuse ON pg_task", "DELETE FROM pg_task_runs", "DELETE FROM pg_task_signals"
    ),
    pytest.mark.parametrize("name", ALL),
]
ODD = """%s %(p1)s $1 'quoted' "twice" \\back {braces},comma é 猫"""
REFUSE = """
    CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN IF NEW.step LIKE '%bad%' THEN RAISE EXCEPTION 'too bad: 100%%'; END IF; RETURN NEW; END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON pg_task FOR EACH ROW EXECUTE FUNCTION refuse()
"""


def tasks(look: Any) -> int:
    return int(look.execute("SELECT count(*) FROM pg_task").fetchone()[0])


async def by_every_way(client: Any, conn: Any) -> list[UUID]:
    runs = [await client.trigger(doubled, 1, conn=conn), await client.trigger(doubled, 1, key="run", conn=conn)]
    await client.signal(runs[0].id, "go", {"100%": ODD}, conn=conn)
    await client.run(runs[0].id).signal("go", conn=conn)
    return [
        await client.enqueue(Write(ODD), conn=conn),
        await client.enqueue(Write("x"), key=ODD, conn=conn),
        await client.delay(Sweep(), HOUR, conn=conn),
        await client.schedule(Send("x"), datetime.now(UTC) + HOUR, conn=conn),
        *await client.enqueue_many(numbered(3), conn=conn),
        *await client.enqueue_many(numbered(3), key=lambda step: f"{ODD} {step.n}", conn=conn),
        *[run.id for run in runs],
        *await client.trigger_many(doubled, [1, 2], conn=conn),
    ]


def test_commit(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        ids = await by_every_way(client, caller.conn)
        assert tasks(look) == 0
        await caller.commit()
        found = look.execute("SELECT id, step, queue, priority, key, wakeup_at > now() FROM pg_task").fetchall()
        rows = {id: tuple(row) for id, *row in found}
        assert set(rows) == set(ids)
        assert len(ids) == 14
        written = msgspec.json.encode({"Post": {"Write": {"text": ODD}}}).decode()
        assert rows[ids[0]] == (written, "post", 3, None, False)
        assert rows[ids[1]][3] == f"Post/{ODD}"
        assert rows[ids[2]] == ('{"Post":{"Sweep":null}}', "post", 3, None, True)
        assert rows[ids[3]][1:] == ("outgoing", -7, None, True)
        assert sorted(rows[id][3] or "" for id in ids[7:10]) == [f"Post/{ODD} {n}" for n in range(3)]
        signals = look.execute("SELECT payload FROM pg_task_signals ORDER BY length(payload) DESC").fetchall()
        assert [msgspec.json.decode(payload) for (payload,) in signals] == [{"100%": ODD}, None]

    play_door(name, dsn, scenario)


def test_rollback(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        await by_every_way(client, caller.conn)
        await caller.rollback()
        assert tasks(look) == 0
        await caller.begin()
        await client.enqueue(Write("after"), conn=caller.conn)
        await caller.commit()
        assert tasks(look) == 1

    play_door(name, dsn, scenario)


def test_savepoint(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        first = await client.enqueue(Write("first"), conn=caller.conn)
        await caller.send("SAVEPOINT mine")
        await by_every_way(client, caller.conn)
        await caller.send("ROLLBACK TO SAVEPOINT mine")
        last = await client.enqueue(Write("last"), key="run", conn=caller.conn)
        await caller.commit()
        assert {row[0] for row in look.execute("SELECT id FROM pg_task")} == {first, last}

    play_door(name, dsn, scenario)


def test_read_only_transaction_is_refused_by_name(dsn: str, name: str) -> None:
    """To try again is of no use, so it is no `DatabaseUnavailable`."""

    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.enqueue(Write("x"), conn=caller.conn),
            lambda: client.enqueue(Write("x"), key="k", conn=caller.conn),
            lambda: client.enqueue(Write("x"), key="k", on_conflict="after", conn=caller.conn),
            lambda: client.enqueue_many(numbered(3), conn=caller.conn),
            lambda: client.enqueue_many(numbered(3), key=lambda step: str(step.n), conn=caller.conn),
            lambda: client.trigger(doubled, 1, conn=caller.conn),
            lambda: client.trigger_many(doubled, [1, 2], conn=caller.conn),
        ]
        for call in calls:
            await caller.begin()
            await caller.send("SET LOCAL transaction_read_only = on")
            with pytest.raises(EnqueueError, match=r"conn= is in a read-only transaction.* \(SQLSTATE 25006\)$"):
                await call()
            await caller.rollback()
        assert tasks(look) == 0

    play_door(name, dsn, scenario)


def test_key_conflict(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        first = await client.enqueue(Numbered(1), key="1", conn=caller.conn)
        assert await client.enqueue(Numbered(2), key="1", conn=caller.conn) == first
        await caller.commit()
        await caller.begin()
        assert await client.delay(Numbered(3), HOUR, key="1", conn=caller.conn) == first
        many = await client.enqueue_many(numbered(3), key=lambda step: str(step.n), conn=caller.conn)
        assert (many[1], len(set(many))) == (first, 3)
        assert (await client.trigger(doubled, 1, key="1", conn=caller.conn)).id != first
        options = {"key": "1", "on_conflict": "replace", "on_parked": "revive", "expires": HOUR}
        assert await client.enqueue(Numbered(5), conn=caller.conn, **options) == first
        behind = await client.enqueue(Numbered(6), key="1", on_conflict="after", conn=caller.conn)
        assert behind.is_new
        again = await client.enqueue(Numbered(6), key="1", debounce=HOUR, ceiling=2 * HOUR, conn=caller.conn)
        assert (again, again.is_new) == (first, False)
        items = [Numbered(7), Enqueue(Numbered(8), after=HOUR), Enqueue(Numbered(9), key="9", queue="q")]
        assert len(await client.enqueue_many(items, conn=caller.conn)) == 3
        await caller.commit()
        assert tasks(look) == 8

    play_door(name, dsn, scenario)


def test_many_stream_in_chunks(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        steps = [Write(f"{n} {'x' * 200}") for n in range(3000)]
        await caller.begin()
        assert len(await client.enqueue_many([], conn=caller.conn)) == 0
        ids = await client.enqueue_many(iter(steps), priority=-1, conn=caller.conn)  # two bytes like those of the end
        await caller.commit()
        found = look.execute("SELECT id, step FROM pg_task ORDER BY id").fetchall()
        assert [row[0] for row in found] == list(ids)
        assert [msgspec.json.decode(row[1])["Post"]["Write"]["text"] for row in found] == [step.text for step in steps]

    play_door(name, dsn, scenario)


def test_many_with_keys_are_copied_but_for_those_of_others(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        other = await client.enqueue(Numbered(0), key="2500", conn=caller.conn)
        ids = await client.enqueue_many(numbered(4000), key=lambda step: f"{step.n:04}", conn=caller.conn)
        await caller.commit()
        assert [n for n, id in enumerate(ids) if not id.is_new] == [2500]
        assert ids[2500] == other
        found = look.execute("SELECT id FROM pg_task ORDER BY key").fetchall()
        assert [row[0] for row in found] == list(ids)

    play_door(name, dsn, scenario)


@pytest.mark.parametrize("key", [None, repr], ids=["copy", "keyed"])
def test_many_that_are_refused_leave_the_transaction_usable(dsn: str, name: str, key: Any) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        look.execute(REFUSE)
        await caller.begin()
        await client.enqueue(Write("before"), conn=caller.conn)
        with pytest.raises(DataRefused, match="too bad: 100%"):
            await client.enqueue_many([Write("good"), Write("bad")], key=key, conn=caller.conn)
        with pytest.raises(EnqueueError):
            await client.enqueue_many([Write("good"), Numbered("x")], key=key, conn=caller.conn)  # type: ignore[arg-type]
        await client.enqueue(Write("after"), conn=caller.conn)
        await caller.commit()
        assert tasks(look) == 2

    play_door(name, dsn, scenario)


def test_one_that_is_refused_fails_to_the_savepoint(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        look.execute(REFUSE)
        await caller.begin()
        await client.enqueue(Write("before"), conn=caller.conn)
        await caller.send("SAVEPOINT mine")
        with pytest.raises(DataRefused, match=r"too bad: 100% \(SQLSTATE P0001\)"):
            await client.enqueue(Write("bad"), conn=caller.conn)
        for call in WITH_CONN.values():
            with pytest.raises(DatabaseRefused, match="current transaction is aborted"):
                await call(client, caller.conn)
        await caller.send("ROLLBACK TO SAVEPOINT mine")
        await client.enqueue(Write("after"), conn=caller.conn)
        await caller.commit()
        assert tasks(look) == 2

    play_door(name, dsn, scenario)


WITH_CONN: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
    "enqueue": lambda client, conn: client.enqueue(Write("x"), conn=conn),
    "with a key": lambda client, conn: client.enqueue(Write("x"), key="k", conn=conn),
    "delay": lambda client, conn: client.delay(Write("x"), HOUR, conn=conn),
    "schedule": lambda client, conn: client.schedule(Write("x"), datetime.now(UTC), conn=conn),
    "enqueue_many": lambda client, conn: client.enqueue_many(numbered(3), conn=conn),
    "enqueue_many with keys": lambda client, conn: client.enqueue_many(
        numbered(3), key=lambda step: str(step.n), conn=conn
    ),
    "trigger": lambda client, conn: client.trigger(doubled, 1, conn=conn),
    "trigger_many": lambda client, conn: client.trigger_many(doubled, [1, 2], conn=conn),
    "signal": lambda client, conn: client.signal(UUID(int=1), "go", conn=conn),
    "signal of a run": lambda client, conn: client.run(UUID(int=1)).signal("go", conn=conn),
    "cancel": lambda client, conn: client.run(UUID(int=1)).cancel(conn=conn),
    "resume": lambda client, conn: client.run(UUID(int=1)).resume(conn=conn),
}


def test_outside_of_a_transaction_it_is_refused(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.leave()
        for call in WITH_CONN.values():
            with pytest.raises(EnqueueError, match="conn= is not in a transaction, so this would be committed at once"):
                await call(client, caller.conn)
        assert tasks(look) == 0

    play_door(name, dsn, scenario)


def test_a_closed_connection_is_unavailable(dsn: str, name: str) -> None:
    if "ession" in name or name == "Django":
        pytest.skip("it connects again by itself")

    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.conn.close() if "sync" in name else caller.conn.close()
        for call in WITH_CONN.values():
            with pytest.raises(DatabaseUnavailable, match="conn= is closed"):
                await call(client, caller.conn)

    play_door(name, dsn, scenario)


@pytest.mark.parametrize("call", ["enqueue", "enqueue_many", "enqueue_many with keys"])
def test_a_lost_connection_is_unavailable(dsn: str, name: str, call: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        await client.enqueue(Write("x"), conn=caller.conn)
        end_sessions(look)
        with pytest.raises(DatabaseUnavailable):
            await WITH_CONN[call](client, caller.conn)
        assert tasks(look) == 0
        with suppress(Exception):
            await caller.rollback()

    play_door(name, dsn, scenario)


def test_a_lock_timeout_says_so(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        await caller.send("SET LOCAL lock_timeout = '50ms'")
        with look.transaction():
            look.execute("LOCK pg_task")
            with pytest.raises(RowsLocked, match=r"lock timeout \(SQLSTATE 55P03\)"):
                await client.enqueue(Write("x"), conn=caller.conn)
        await caller.rollback()

    play_door(name, dsn, scenario)


def test_runs_are_cancelled_and_resumed_in_the_transaction(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Caller, look: Any) -> None:
        await caller.begin()
        run = await client.trigger(doubled, 1, conn=caller.conn)
        await caller.commit()
        await caller.begin()
        assert await client.run(run.id).cancel(conn=caller.conn)
        assert tasks(look) == 1
        await caller.commit()
        assert tasks(look) == 0
        await caller.begin()
        assert await client.run(run.id).resume(conn=caller.conn)
        assert not await client.run(run.id).resume(conn=caller.conn)
        assert tasks(look) == 0
        await caller.commit()
        assert tasks(look) == 1

    play_door(name, dsn, scenario)


def test_one_task_is_one_round_trip(dsn: str, name: str) -> None:
    with RoundTrips(dsn) as line:

        async def scenario(client: Any, caller: Caller, look: Any) -> None:
            await caller.begin()
            counts = []
            for key in (None, None, None, "a", "b", "c"):
                before = line.count
                await client.enqueue(Write("x"), key=key, conn=caller.conn)
                counts.append(line.count - before)
            await caller.commit()
            assert (counts[2], counts[5]) == (1, 1), counts

        play_door(name, dsn, scenario, line=line.dsn)
