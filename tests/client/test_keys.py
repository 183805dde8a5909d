"""Keys: one task of each is in the table, also in races."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from client_kit import count, in_order, numbered, play
from fix_database import run
from post import Numbered, Send, Sweep, Write, doubled
from sessions import connected, until, until_blocked

from pgtask import Client
from pgtask._postgres import many_inserts
from pgtask._postgres.many_inserts import CHUNK_TASKS

HOUR = timedelta(hours=1)
EVERY_LEASE = "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 hour'"
pytestmark = pytest.mark.one_database


STATES = {
    "waiting": "SELECT",
    "future": "UPDATE pg_task SET wakeup_at = now() + interval '1 year'",
    "running": EVERY_LEASE,
    "expired": "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() - interval '1 hour'",
    "parked": "UPDATE pg_task SET error = 'broken', tried = 6",
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_task_in_the_table_occupies_its_key(dsn: str, change: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("first"), key="k")
        await db.execute(change)
        before = await db.fetchrow("SELECT * FROM pg_task")
        again = [
            await client.enqueue(Write("second"), key="k", queue="other", priority=9),
            await client.delay(Write("second"), HOUR, key="k"),
            await client.schedule(Write("second"), datetime.now(UTC), key="k"),
            *await client.enqueue_many([Write("second")], key=lambda _: "k"),
        ]
        assert again == [first] * 4
        assert first.is_new
        assert not any(task.is_new for task in again)
        assert await db.fetch("SELECT * FROM pg_task") == [before]
        assert await client.enqueue(Write("x"), key="K") != first
        longer = await client.enqueue(Write("x"), key="kk")
        assert longer != first
        await db.execute("DELETE FROM pg_task WHERE id = $1", first)
        later = await client.enqueue(Write("x"), key="k")
        assert [await client.enqueue(Write("x"), key=key) for key in ("k", "kk")] == [later, longer]

    play(dsn, scenario)


def test_a_finished_task_frees_its_key(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("first"), key="k")
        await db.execute("DELETE FROM pg_task")
        second = await client.enqueue(Write("second"), key="k")
        assert second != first
        assert await db.fetchval("SELECT id FROM pg_task") == second

    play(dsn, scenario)


def test_many_at_once_with_one_key_make_one_row(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        for key in "abcde":
            ids = await asyncio.gather(*(client.enqueue(Numbered(n), key=key) for n in range(8)))
            assert len(set(ids)) == 1
        assert await count(db) == 5

    play(dsn, scenario, pool_size=8)


@pytest.mark.parametrize("many", [False, True], ids=["enqueue", "enqueue_many"])
@pytest.mark.parametrize("commits", [True, False], ids=["commits", "rolls back"])
def test_the_second_waits_for_the_first_ones_transaction(dsn: str, commits: bool, many: bool) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as rival, connected(dsn) as mine:
            transaction = rival.transaction()
            await transaction.start()
            first = await client.enqueue(Write("first"), key="k", conn=rival)

            async def second() -> UUID:
                if many:
                    return (await client.enqueue_many([Write("second")], key=lambda _: "k", conn=mine))[0]
                return await client.enqueue(Write("second"), key="k", conn=mine)

            own = mine.transaction()
            await own.start()
            waiting = asyncio.create_task(second())
            await until_blocked(db, mine.get_server_pid())
            await (transaction.commit() if commits else transaction.rollback())
            found = await waiting
            await own.commit()
            assert (found == first) is commits
            assert [row["id"] for row in await db.fetch("SELECT id FROM pg_task")] == [found]

    play(dsn, scenario)


class FinishesFirst(asyncpg.Connection):  # type: ignore[misc]
    """A worker elsewhere that finishes the key's task between the insert that found it there and the look for it."""

    rivals: list[Any]

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        await self._finish(query)
        return await super().fetchrow(query, *args, **options)

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        await self._finish(query)
        return await super().fetch(query, *args, **options)

    async def _finish(self, query: str) -> None:
        if "key = ANY" in query and self.rivals:
            await self.rivals.pop().execute("DELETE FROM pg_task WHERE key = 'Post/k'")


@pytest.mark.parametrize("many", [False, True], ids=["enqueue", "enqueue_many"])
def test_the_keys_task_may_finish_in_between(dsn: str, many: bool) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn, connection_class=FinishesFirst) as mine:
            mine.rivals = [db]
            old = await client.enqueue(Write("old"), key="k")
            await mine.execute("BEGIN")
            if many:
                pair = [Write("new"), Write("other")]
                found, other = await client.enqueue_many(pair, key=lambda step: "kl"[step.text == "other"], conn=mine)
                await mine.execute("COMMIT")
                assert {row["id"] for row in await db.fetch("SELECT id FROM pg_task")} == {found, other}
            else:
                found = await client.enqueue(Write("new"), key="k", conn=mine)
                await mine.execute("COMMIT")
            assert mine.rivals == []
            assert found != old
            row = await db.fetchrow("SELECT id, step FROM pg_task WHERE key = 'Post/k'")
            assert tuple(row) == (found, '{"Post":{"Write":{"text":"new"}}}')

    play(dsn, scenario)


@pytest.mark.parametrize("size", [10, CHUNK_TASKS, 3 * CHUNK_TASKS + 7])
def test_keyed_ids_match_their_steps_also_with_duplicates(dsn: str, size: int) -> None:
    """Each key twice: once more at once, and once more at the very end, chunks later."""

    async def scenario(client: Client, db: Any) -> None:
        old = {n: await client.enqueue(Numbered(-1), key=f"key {n}") for n in range(0, size, size // 5)}
        twice = [step for n in range(size) for step in (Numbered(n), Numbered(n))] + list(numbered(size))
        ids = await client.enqueue_many(twice, key=lambda step: f"key {step.n}")
        assert isinstance(ids, list)
        assert len(ids) == 3 * size
        assert ids[0 : 2 * size : 2] == ids[1 : 2 * size : 2] == ids[2 * size :]
        assert await count(db) == size
        keys = [row["key"] for row in await in_order(db, ids[2 * size :])]
        assert keys == [f"Post/key {n}" for n in range(size)]
        assert {n: ids[2 * n] for n in old} == old

    play(dsn, scenario)


@pytest.mark.parametrize("taken", [(), (500,), (1500, 5000), (2999, 3000), range(0, 7000, 100)], ids=repr)
def test_keys_of_many_that_other_tasks_have_are_found(dsn: str, taken: Iterable[int]) -> None:
    """Those of the first statement, which inserts, and of later ones, which copy and fail."""

    async def scenario(client: Client, db: Any) -> None:
        old = {n: await client.enqueue(Numbered(-1), key=f"{n:04}") for n in taken}
        async with db.transaction():
            ids = await client.enqueue_many(numbered(7000), key=lambda step: f"{step.n:04}", conn=db)
            assert await db.fetchval("SELECT 1") == 1, "the transaction has not failed"
        assert {n: id for n, id in enumerate(ids) if not id.is_new} == old
        assert await count(db) == 7000
        rows = await in_order(db, ids)
        assert [row["key"] for row in rows] == [f"Post/{n:04}" for n in range(7000)]

    play(dsn, scenario)


def test_copy_that_met_a_key_of_another_task_is_not_tried_again(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that fails leaves an error in the log of the server."""
    copies = []
    copy = many_inserts._copy_chunk

    async def count(*args: Any, **options: Any) -> Any:
        copies.append(copied := await copy(*args, **options))
        return copied

    monkeypatch.setattr(many_inserts, "_copy_chunk", count)

    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Numbered(-1), key="2500")
        await client.enqueue_many(numbered(9000), key=lambda step: f"{step.n:04}")
        assert [bool(copied) for copied in copies] == [False]
        assert await db.fetchval("SELECT count(*) FROM pg_task") == 9000

    play(dsn, scenario)


def test_the_first_of_two_steps_with_one_key_counts(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        steps = [Write("first"), Send("second"), Write("third")]
        ids = await client.enqueue_many(steps, key=lambda _: "k")
        row = await db.fetchrow("SELECT id, step, queue, priority FROM pg_task")
        assert tuple(row) == (ids[0], '{"Post":{"Write":{"text":"first"}}}', "post", 3)
        assert ids == [ids[0]] * 3

    play(dsn, scenario)


def test_bulks_with_keys_in_opposite_order_do_not_deadlock(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        steps = list(numbered(CHUNK_TASKS))
        for _ in range(3):
            ways = (steps, steps[::-1])
            there, back = await asyncio.gather(
                *(client.enqueue_many(way, key=lambda step: str(step.n)) for way in ways), return_exceptions=True
            )
            assert isinstance(there, list), there
            assert isinstance(back, list), back
            assert there == back[::-1]
            assert await count(db) == len(steps)
            await db.execute("DELETE FROM pg_task")

    play(dsn, scenario)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "with conn"])
def test_bulks_of_several_chunks_do_not_deadlock_either(dsn: str, theirs: bool) -> None:
    """All keys are sorted before the first is inserted, in whichever order the steps come."""

    async def bulk(client: Client, steps: list[Numbered]) -> list[UUID]:
        def key(step: Numbered) -> str:
            return str(step.n)

        if not theirs:
            return list(await client.enqueue_many(steps, key=key))
        async with connected(dsn) as mine, mine.transaction():
            return list(await client.enqueue_many(iter(steps), key=key, conn=mine))

    async def scenario(client: Client, db: Any) -> None:
        steps = list(numbered(3 * CHUNK_TASKS))
        ways = [steps, steps[::-1], steps[1::2] + steps[::2]]
        for _ in range(2):
            there, back, mixed = await asyncio.gather(*(bulk(client, way) for way in ways))
            assert there == back[::-1]
            assert mixed == there[1::2] + there[::2]
            assert await count(db) == len(steps)
            await db.execute("DELETE FROM pg_task")

    play(dsn, scenario)


def test_an_enqueue_that_ends_a_deadlock_is_tried_again(dsn: str) -> None:
    """A trigger of the user's locks something before the row is inserted, which a rival locks after it."""
    lock = """
        CREATE FUNCTION lock_first() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END $$;
        CREATE TRIGGER lock_first BEFORE INSERT ON pg_task FOR EACH ROW WHEN (NEW.queue = 'locks')
        EXECUTE FUNCTION lock_first();
    """
    rivals = """INSERT INTO pg_task (step, key) VALUES ('{"Post":{"Sweep":null}}', 'Post/k') RETURNING id"""
    calls: list[Callable[[Client], Awaitable[Any]]] = [
        lambda client: client.enqueue(Sweep(), key="k", queue="locks"),
        lambda client: client.enqueue_many(iter([Sweep()]), key=lambda _: "k", queue="locks"),
    ]

    async def main() -> None:
        async with connected(dsn) as db, connected(dsn) as rival:
            name = await db.fetchval("SELECT current_database()")
            await db.execute(f"{lock} ALTER DATABASE {name} SET deadlock_timeout = '1s'")
            await rival.execute("SET deadlock_timeout = '50s'")
            async with Client(dsn) as client:
                for call in calls:
                    await rival.execute("BEGIN")
                    first = await rival.fetchval(rivals)
                    waiting = asyncio.ensure_future(call(client))
                    await until(
                        db, "SELECT count(*) > 0 FROM pg_stat_activity WHERE cardinality(pg_blocking_pids(pid)) > 0"
                    )
                    await rival.execute("SELECT pg_advisory_xact_lock(7)")  # once the client has given way
                    await rival.execute("COMMIT")
                    assert await waiting in (first, [first])
                    await db.execute("DELETE FROM pg_task")
            await db.execute(f"DROP FUNCTION lock_first CASCADE; ALTER DATABASE {name} RESET deadlock_timeout")

    run(main())


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
@pytest.mark.parametrize("variable", ["", "PGTASK_NO_LISTEN"], ids=["session", "pooled"])
def test_keys_do_not_mind_the_isolation_of_the_database(
    dsn: str, level: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")

    async def some(client: Client, offset: int) -> None:
        for number in range(20):
            await client.enqueue(Sweep(), key=f"key {(number + offset) % 23}")
            await client.trigger(doubled, 1, key=f"run {(number + offset) % 23}")
            await client.enqueue_many(numbered(5), key=lambda step: f"{step.n} {(number + offset) % 23}")

    async def main() -> None:
        async with connected(dsn) as db:
            name = await db.fetchval("SELECT current_database()")
            await db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
            async with Client(dsn) as client:
                await asyncio.gather(*(some(client, offset) for offset in range(6)))
            assert await count(db) == 7 * 23
            await db.execute(f"ALTER DATABASE {name} RESET default_transaction_isolation")

    run(main())
