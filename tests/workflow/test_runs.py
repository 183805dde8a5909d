"""Changes of runs from outside their journal: each way to park one wakes its parent; cancel, resume and signal act by
the state of the run. Most of these tests need no worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import asyncpg
import flows
import pytest
from fix_database import run
from fleet import Rows
from run_kit import SOON, ask, until_paused, working
from sessions import connected, opened, until_waiting

from pgtask import Client, EnqueueError, RunFailed
from pgtask._postgres import run_results
from pgtask._postgres.runs import cancel_runs, resume_runs
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import cancel_tasks, retry_tasks
from pgtask.errors import RunNotFound

STEP = '{"waiting":{"Run":0}}'


# --- a run that is parked by others than its journal


async def by_flush(db: Any, child: UUID) -> None:
    moved = [[child], [child], [None], [1], ["not decoded"], [0.0], [None], [None], [None]]
    await db.execute(statement("flush"), [], [], [], [], [], 0, *moved, False)


async def by_reaper(db: Any, child: UUID) -> None:
    await db.execute("UPDATE pg_task SET claims = 3 WHERE id = $1", child)
    await db.fetch(
        statement("release_orphaned"), child, child, [child], True, "killed by signal 9", "nobody", None, None
    )


async def by_hand(db: Any, child: UUID) -> None:
    await db.execute("UPDATE pg_task SET error = 'not today' WHERE id = $1", child)


async def by_journal(db: Any, child: UUID) -> None:
    await db.fetch(statement("journal/end"), [child], [child], ["it failed"], [None], [1], [None], *[[]] * 12)


# The lease of a child has its own id as the token.
FAMILY = """
    WITH runs AS (
        INSERT INTO pg_task_runs (id, name, parent, waits_on, paused_until, waits_for, awaited)
        VALUES ($1, 'waiting', NULL, '2 children of c', 'infinity', 2, false),
            ($2, 'waiting', $1, NULL, NULL, 0, true),
            ($3, 'waiting', $1, NULL, NULL, 0, true)
    )
    INSERT INTO pg_task (id, step, wakeup_at, locked_by, lock_expires_at)
    VALUES ($1, $4, 'infinity', NULL, NULL),
        ($2, $4, now(), $2, now() + interval '1 hour'),
        ($3, $4, now(), $3, now() + interval '1 hour')
"""
WOKEN = "SELECT wakeup_at <= now() FROM pg_task WHERE id = $1"


@pytest.mark.parametrize("park", [by_flush, by_reaper, by_hand, by_journal])
def test_parked_child_wakes_its_waiting_parent(dsn: str, park: Callable[[Any, UUID], Awaitable[None]]) -> None:
    """Once for each child; the last one wakes."""

    async def main() -> None:
        parent, first, second = (UUID(int=number) for number in range(1, 4))
        async with opened(dsn) as (client, db):
            await db.execute(FAMILY, parent, first, second, STEP)
            result = asyncio.create_task(client.run(first).result())
            await park(db, first)
            with pytest.raises(RunFailed):
                await asyncio.wait_for(result, 2)  # by a notification: the poll comes after 5 s
            assert await db.fetchval("SELECT error FROM pg_task WHERE id = $1", first)
            await db.execute("UPDATE pg_task SET error = 'again' WHERE id = $1", first)
            assert not await db.fetchval(WOKEN, parent)
            await park(db, second)
            assert await db.fetchval(WOKEN, parent)
            (status,) = await client.runs(state="ERROR", limit=1)
            assert (status.id, status.ended_at is not None) == (second, True)

    run(main())


AGAIN_LATER = "UPDATE pg_task SET wakeup_at = now() + interval '1 hour', tried = 1 WHERE id = $1"


@pytest.mark.parametrize("end", [by_flush, by_reaper, by_hand])
def test_parent_that_waits_for_another_try_is_not_woken(dsn: str, end: Callable[[Any, UUID], Awaitable[None]]) -> None:
    """It has waited for its children, was woken by something else, and has failed."""

    async def main() -> None:
        parent, first, second = (UUID(int=number) for number in range(1, 4))
        async with opened(dsn) as (client, db):
            await db.execute(FAMILY, parent, first, second, STEP)
            await db.execute(AGAIN_LATER, parent)
            await end(db, first)
            await end(db, second)
            assert await db.fetchval("SELECT waits_for FROM pg_task_runs WHERE id = $1", parent) == 0
            assert not await db.fetchval(WOKEN, parent)
            status = await client.run(parent).status()
            assert (status.state, status.waits_on, status.tried) == ("QUEUED", None, 1)

    run(main())


def test_parking_a_child_locks_the_parent_task_before_a_record(dsn: str) -> None:
    """In the order of the statement that suspends the parent, or there would be a deadlock."""

    async def main() -> None:
        parent, first, second = (UUID(int=number) for number in range(1, 4))
        async with opened(dsn) as (_, db), connected(dsn) as other:
            await db.execute(FAMILY, parent, first, second, STEP)
            async with db.transaction():
                await db.execute("SELECT FROM pg_task WHERE id = $1 FOR NO KEY UPDATE", parent)
                parking = asyncio.create_task(by_hand(other, first))
                await until_waiting(db)
                await db.execute("SET LOCAL lock_timeout = '500ms'")
                await db.execute("UPDATE pg_task_runs SET awaited = true WHERE id = $1", first)
            await parking
            assert await db.fetchval("SELECT waits_for FROM pg_task_runs WHERE id = $1", parent) == 1

    run(main())


def test_run_triggers_fire_for_parked_tasks_only(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            await db.execute("INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, 4)")
            async with db.transaction():
                await db.execute("SET LOCAL track_functions = 'all'")
                token = UUID(int=1)
                rows = await db.fetch(statement("claim"), "default", 0, 4, token, 60.0, 1000, 0.0)
                done, kept, again, parked = ([row["id"]] for row in rows)
                moved = [[*again, *parked], [token, token], [None, None], [1, 1], [None, "no"], [0.0, 0.0]]
                nulls = [[None, None]] * 3
                await db.execute(statement("flush"), done, [token], kept, [token], ["{}"], 0, *moved, *nulls, False)
                calls = "SELECT pg_stat_get_xact_function_calls($1::text::regproc)"
                assert await db.fetchval(calls, "pg_task_run_parked") == 1
                assert await db.fetchval(calls, "pg_task_run_revived") is None

    run(main())


def test_a_child_that_is_revived_has_not_ended(dsn: str) -> None:
    async def main() -> None:
        parent, first, second = (UUID(int=number) for number in range(1, 4))
        async with opened(dsn) as (_, db):
            await db.execute(FAMILY, parent, first, second, STEP)
            await by_hand(db, first)
            await db.execute("UPDATE pg_task SET error = NULL WHERE id = $1", first)
            record = await db.fetchrow("SELECT state, error, ended_at FROM pg_task_runs WHERE id = $1", first)
            assert tuple(record) == (None, None, None)

    run(main())


def test_parking_a_task_needs_no_privilege_on_the_runs(dsn: str) -> None:
    """A table of the role by that name is not used in their place: that would lend it the owner's privileges."""

    async def main() -> None:
        parent, first, second = (UUID(int=number) for number in range(1, 4))
        async with opened(dsn) as (_, db):
            await db.execute(FAMILY, parent, first, second, STEP)
            async with db.transaction():
                await db.execute("CREATE ROLE parker; GRANT SELECT, UPDATE ON pg_task TO parker")
                await db.execute("CREATE TEMP TABLE pg_task_runs (LIKE public.pg_task_runs)")
                await db.execute("ALTER TABLE pg_temp.pg_task_runs OWNER TO parker; SET LOCAL ROLE parker")
                await db.execute("SET LOCAL search_path = ''")
                await db.execute("UPDATE public.pg_task SET error = 'not today'")
                await db.execute("RESET ROLE; RESET search_path; DROP OWNED BY parker; DROP ROLE parker")
            assert await db.fetchval("SELECT count(*) FROM public.pg_task_runs WHERE state = 'ERROR'") == 3

    run(main())


TRIGGER = "CREATE TRIGGER own AFTER INSERT ON own FOR EACH ROW EXECUTE FUNCTION {}()"


@pytest.mark.parametrize("function", ["pg_task_run_parked", "pg_task_run_revived"])
def test_run_triggers_lend_no_privilege_to_other_tables(dsn: str, function: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):
            await client.trigger(flows.waiting, 0)
            before = await db.fetchrow("UPDATE pg_task_runs SET state = 'ERROR' RETURNING *")
            if function == "pg_task_run_parked":
                before = await db.fetchrow("UPDATE pg_task_runs SET state = NULL RETURNING *")
            async with db.transaction():
                await db.execute("CREATE ROLE stranger; CREATE TEMP TABLE own (id uuid, error text)")
                await db.execute("ALTER TABLE own OWNER TO stranger; SET LOCAL ROLE stranger")
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    async with db.transaction():
                        await db.execute(TRIGGER.format(function))
                await db.execute("RESET ROLE")
                # A role that may create it, by mistake, does no harm either.
                await db.execute(TRIGGER.format(function))
                await db.execute("INSERT INTO own VALUES ($1, 'forged')", before["id"])
                await db.execute("DROP TABLE own; DROP ROLE stranger")
            assert await db.fetchrow("SELECT * FROM pg_task_runs") == before

    run(main())


SPOIL = """UPDATE pg_task SET step = '{"waiting":{"Run":"zero"}}', wakeup_at = now() WHERE id = $1"""


def test_a_child_that_no_worker_can_decode_fails_its_parent(dsn: str) -> None:
    rows = Rows(dsn)

    async def question(client: Client) -> Any:
        parent = await client.trigger(flows.patient)
        await asyncio.to_thread(rows.until, "SELECT count(*) = 1 FROM pg_task_runs WHERE waits_on = 'signal go'")
        innermost = (await client.runs("waiting"))[0].id
        await asyncio.to_thread(until_paused, rows, innermost)
        async with connected(dsn) as db:
            await db.execute(SPOIL, innermost)
        with pytest.raises(RunFailed) as failed:
            await parent.result(timeout=SOON)
        return failed.value.error

    with working(dsn):
        assert "Expected `int`, got `str`" in ask(dsn, question)


# --- cancel


@pytest.mark.parametrize("name", ["waiting", 'say "so" \\', "f\u00fcr \U0001f600"])
def test_run_of_plain_sql_is_cancelled_before_it_begins(dsn: str, name: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):
            insert = (
                "INSERT INTO pg_task (step) VALUES (jsonb_build_object($1::text, jsonb_build_object('Run', 0))::text)"
            )
            id = await db.fetchval(insert + " RETURNING id", name)
            assert await client.run(id).cancel()
            assert not await client.run(id).cancel()
            status = await client.run(id).status()
            assert (status.name, status.state, status.ended_at is not None) == (name, "CANCELLED", True)
            assert await client.run(id).resume()
            assert (await client.run(id).status()).state == "QUEUED"

    run(main())


@pytest.mark.parametrize("step", ["not JSON", '{"a\\x":{"Run":0}}', '{"waiting":{"Running":0}}'])
def test_task_that_is_no_run_is_not_cancelled_as_one(dsn: str, step: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):
            id = await db.fetchval("INSERT INTO pg_task (step) VALUES ($1) RETURNING id", step)
            assert not await client.run(id).cancel()
            assert not await client.run(id).resume()
            assert await db.fetchval("SELECT count(*) FROM pg_task") == 1

    run(main())


def test_run_is_not_cancelled_under_an_older_snapshot(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db), connected(dsn) as other, AsyncExitStack() as stack:
            parent, first, second = (UUID(int=number) for number in range(1, 4))
            for level in ("repeatable_read", "serializable"):
                words = level.replace("_", " ").upper()
                async with db.transaction(isolation=level):
                    assert await db.fetchval("SELECT count(*) FROM pg_task") == 0 or level == "serializable"
                    if level == "repeatable_read":
                        await other.execute(FAMILY, parent, first, second, STEP)
                    with pytest.raises(
                        EnqueueError, match=f"^a run cannot be cancelled in a transaction that is {words}"
                    ):
                        await client.run(parent).cancel(conn=db)
            # Where that is only the default of the database, and ours to say: a child is spawned while we wait.
            name = await db.fetchval("SELECT current_database()")
            await db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
            fresh = await stack.enter_async_context(Client(dsn))
            await other.execute("BEGIN; SELECT FROM pg_task FOR SHARE")
            cancelled = asyncio.create_task(fresh.run(parent).cancel())
            await until_waiting(other)
            add = "INSERT INTO pg_task_runs (id, name, parent) VALUES ($1, 'waiting', $2)"
            await other.execute(add, UUID(int=4), parent)
            await other.execute("INSERT INTO pg_task (id, step) VALUES ($1, $2)", UUID(int=4), STEP)
            await other.execute("COMMIT")
            assert await cancelled
            assert await db.fetchval("SELECT count(*) FROM pg_task") == 0

    run(main())


# --- several at once


@pytest.mark.parametrize("name", ["retry", "resume", "cancel", "cancel tasks"])
def test_deadlock_with_a_parked_child_is_retried(dsn: str, name: str) -> None:
    """A command for several locks the parent, then the child; parking the child locks the child, then the parent."""
    parent, child, other_child = (UUID(int=number) for number in range(1, 4))
    ask: dict[str, Callable[[Any], Awaitable[Any]]] = {
        "retry": lambda db: retry_tasks(db, [parent, child]),
        "resume": lambda db: resume_runs(db, [parent, child]),
        "cancel": lambda db: cancel_runs(db, [parent, child]),
        "cancel tasks": lambda db: cancel_tasks(db, [parent, child], force=True),
    }

    async def main() -> None:
        async with opened(dsn) as (_, db), connected(dsn) as asking, connected(dsn) as parking:
            await db.execute(FAMILY, parent, child, other_child, STEP)
            await db.execute(
                "UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL, wakeup_at = 'infinity', tried = 1"
            )
            await parking.execute("SET deadlock_timeout = '1min'")  # so that it is the other who notices
            await db.execute("BEGIN; SELECT FROM pg_task WHERE id = '00000000-0000-0000-0000-000000000001' FOR UPDATE")
            asked = asyncio.ensure_future(ask[name](asking))
            await until_waiting(db)
            parked = asyncio.create_task(by_hand(parking, child))
            await until_waiting(db, 2)
            await db.execute("COMMIT")
            await asyncio.wait_for(asyncio.gather(asked, parked), 20)
            assert not asking.is_in_transaction()
            left = await db.fetchval("SELECT count(*) FROM pg_task WHERE error IS NULL AND wakeup_at <= now()")
            assert left == (0 if "cancel" in name else 2)

    run(main())


# --- resume


def test_a_key_that_is_taken_while_the_run_is_resumed(dsn: str) -> None:
    """The insert waits for the session that takes it, and the statement itself cannot see it."""

    async def main() -> None:
        async with opened(dsn) as (client, db):
            first = await client.trigger(flows.waiting, 0, key="one")
            await first.cancel()
            for outcome in ("ROLLBACK", "COMMIT"):
                await db.execute("BEGIN; INSERT INTO pg_task (step, key) VALUES ('{}', 'waiting/one')")
                resumed = asyncio.create_task(first.resume())
                await until_waiting(db)
                await db.execute(outcome)
                if outcome == "ROLLBACK":
                    assert await resumed
                    await first.cancel()
                else:
                    with pytest.raises(EnqueueError, match="key 'one' is that of task"):
                        await resumed

    run(main())


def test_key_freed_during_a_resume_is_used(dsn: str) -> None:
    class Between:
        """The task that has the key is cancelled behind the first statement."""

        def __init__(self, db: Any) -> None:
            self.db = db
            self.is_in_transaction = db.is_in_transaction

        async def fetch(self, query: str, *args: Any) -> list[Any]:
            rows: list[Any] = await self.db.fetch(query, *args)
            await self.db.execute("DELETE FROM pg_task WHERE step = '{}'")
            return rows

    async def main() -> None:
        async with opened(dsn) as (client, db):
            first = await client.trigger(flows.waiting, 0, key="one")
            await first.cancel()
            await db.execute("INSERT INTO pg_task (step, key) VALUES ('{}', 'waiting/one')")
            assert await resume_runs(Between(db), [first.id]) == ([first.id], [])

    run(main())


STATES = {
    "scheduled": ("wakeup_at = now() + interval '1 hour'", None, False),
    "due": ("wakeup_at = now() - interval '1 s'", None, False),
    "due again": ("wakeup_at = now() - interval '1 s', tried = 2", "a signal", False),
    "to be tried again": ("wakeup_at = now() + interval '1 hour', tried = 2", None, True),
    "to be tried again by another worker": ("wakeup_at = now() + interval '1 hour'", "a signal", False),
    "paused": ("wakeup_at = 'infinity'", "a signal", True),
    "running": ("locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 minute'", "a signal", False),
    "failed": ("error = 'no', tried = 3", None, True),
}


# --- signal


def test_signal_is_kept_for_a_run_of_plain_sql(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):
            made = await db.fetchval("INSERT INTO pg_task (step) VALUES ($1) RETURNING id", STEP)
            await client.signal(made, "go")
            assert await db.fetch("SELECT run FROM pg_task_signals") == [(made,)]

    run(main())


REFRESH = """
    CREATE FUNCTION refresh() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.updated_at = now(); RETURN NEW; END $$;
    CREATE TRIGGER pg_task_before_update_refresh_updated_at_trigger BEFORE UPDATE ON pg_task
        FOR EACH ROW EXECUTE FUNCTION refresh()
"""


@pytest.mark.parametrize("state", ["scheduled", "to be tried again", "paused", "paused and parked"])
def test_a_signal_wakes_a_run_that_is_paused_and_no_other(dsn: str, state: str) -> None:
    """Also beside the trigger of the Rust crate, which says of each update that the row was written."""

    async def main() -> None:
        async with opened(dsn) as (client, db):
            started = await client.trigger(flows.waiting, 0)
            await db.execute(REFRESH)
            change = STATES[state.removesuffix(" and parked")][0]
            await db.execute(f"UPDATE pg_task SET {change}")
            if state != "scheduled":
                await db.execute("UPDATE pg_task_runs SET waits_on = 'signal no', paused_until = 'infinity'")
            if state == "paused and parked":
                await by_hand(db, started.id)
            is_paused = state.startswith("paused")
            status = await started.status()
            assert status.state == {"paused": "PAUSED", "paused and parked": "ERROR"}.get(state, "QUEUED")
            assert status.waits_on == ("signal no" if state == "paused" else None)
            for number in range(2):
                await started.signal("go", number)
            await db.execute("UPDATE pg_task SET error = NULL")
            assert await db.fetchval(WOKEN, started.id) == is_paused
            assert (await started.status()).state == "QUEUED"

    run(main())


def test_a_signal_that_comes_while_the_run_is_paused_wakes_it(dsn: str) -> None:
    """It waits for the lock of the task, and knows then what was written under it."""

    async def main() -> None:
        async with opened(dsn) as (client, db):
            started = await client.trigger(flows.waiting, 0)
            await db.execute("UPDATE pg_task SET locked_by = id, lock_expires_at = now() + interval '1 hour'")
            seen_at = await db.fetchval("SELECT wakeup_at FROM pg_task")
            async with db.transaction():
                wait = [[seen_at], [None], [0], ["signal go"], [], [], [0], [False]]
                found = await db.fetch(statement("journal/suspend"), [started.id], [started.id], *wait)
                assert [is_suspended for _, is_suspended, _ in found] == [True]
                sent = asyncio.create_task(started.signal("go"))
                await until_waiting(db)
            await sent
            assert await db.fetchval(WOKEN, started.id)

    run(main())


def test_a_signal_to_a_run_that_ends_meanwhile_is_not_kept(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):
            ending = await client.trigger(flows.waiting, 0)
            await db.execute("BEGIN; DELETE FROM pg_task")
            sent = asyncio.create_task(ending.signal("go"))
            await until_waiting(db)
            await db.execute("COMMIT")
            with pytest.raises(RunNotFound):
                await sent
            assert await db.fetchval("SELECT count(*) FROM pg_task_signals") == 0

    run(main())


# --- result


END = "WITH task AS (DELETE FROM pg_task) UPDATE pg_task_runs SET state = 'SUCCESS', output = '1', ended_at = now()"


def test_parked_run_of_plain_sql_has_failed(dsn: str) -> None:
    async def main() -> None:
        async with opened(dsn) as (client, db):
            id = await db.fetchval("INSERT INTO pg_task (step, error) VALUES ($1, 'no') RETURNING id", STEP)
            with pytest.raises(RunFailed, match="no"):
                await client.run(id).result(timeout=2)

    run(main())


def test_results_arrive_without_notifications(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler may take LISTEN and pass nothing on. Two polls at the slow rate would take 4 s."""
    monkeypatch.setattr(run_results, "POLL", 2.0)

    async def main() -> None:
        async with opened(dsn) as (client, db):
            link = None
            for number in range(3):
                since = await db.fetchval("SELECT clock_timestamp()")
                waiting = asyncio.create_task((await client.trigger(flows.child, number)).result(timeout=SOON))
                await until_read(db, since)
                assert client._postgres._results is not None
                link = client._postgres._results._link
                assert link is not None
                await link.connection.execute("UNLISTEN *")
                began = time.monotonic()
                await db.execute(END)
                assert await waiting == 1
                assert number == 0 or time.monotonic() - began < 1.5
            waiting = asyncio.create_task((await client.trigger(flows.child, 3)).result(timeout=SOON))
            assert link is not None
            await link.connection.execute("LISTEN pg_task_ended")
            await db.execute(f"{END}; SELECT pg_notify('pg_task_ended', string_agg(id::text, ',')) FROM pg_task_runs")
            assert await waiting == 1
            assert client._postgres._results
            assert not client._postgres._results._polls

    run(main())


async def until_read(db: Any, since: Any) -> None:
    """The client listens, has looked whether its run has ended since then, and waits."""
    idle = """
        SELECT FROM pg_stat_activity
        WHERE query LIKE '-- Read the results of those of the runs $1%' AND state = 'idle' AND query_start > $1
          AND datname = current_database()"""
    async with asyncio.timeout(20):
        while not await db.fetch(idle, since):
            await db.execute("SELECT pg_stat_clear_snapshot()")
            await asyncio.sleep(0)
