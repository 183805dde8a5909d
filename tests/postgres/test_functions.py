"""`pgtask_enqueue`, `pgtask_signal` and `pgtask_cancel` in SQL: privileges, schemas, transactions, runs."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from client_kit import count
from client_kit import play as play_client
from crate import CRATE_1_0
from grown import TABLES, be_small, grow
from post import Sweep, Write
from schema_kit import notified, play, with_path
from sessions import connected

from pgtask import Client, WorkflowContext, workflow
from pgtask._postgres.migrate import migrate

HELLO = """SELECT pgtask_enqueue('Greeter.SayHello', '{"name": "you"}', key => $1)"""
READ = """
    SELECT sum(seq_tup_read)::integer, sum(coalesce(idx_tup_fetch, 0))::integer
    FROM pg_stat_xact_user_tables
    WHERE relname = ANY ($1)"""


@workflow("trip")
async def trip(ctx: WorkflowContext) -> None: ...


def refuses(words: str) -> Any:
    return pytest.raises(asyncpg.InvalidParameterValueError, match=words)


# --- enqueue


def test_key_of_a_task_gives_its_id(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await db.fetchval(HELLO, "one")
        assert await db.fetchval(HELLO, "one") == first
        assert await client.enqueue(Write("x"), key="one") != UUID(int=first.int), "another task"
        assert await db.fetchval(HELLO, None) != await db.fetchval(HELLO, None)
        assert await count(db) == 4
        run = await client.trigger(trip, key="one")
        assert await db.fetchval("SELECT pgtask_enqueue('trip.Run', key => 'one')") == run.id

    play_client(dsn, scenario)


def test_run_that_sql_has_enqueued_is_a_run(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        id = await db.fetchval("SELECT pgtask_enqueue('trip.Run', queue => 'slow', at => '2099-01-01 00:00+00')")
        (status,) = await client.runs(trip)
        assert (status.id, status.state, status.input) == (UUID(int=id.int), "QUEUED", "null")

    play_client(dsn, scenario)


def test_enqueue_in_sql_is_part_of_the_transaction_and_notifies(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        undone = db.transaction()
        await undone.start()
        await db.fetchval(HELLO, None)
        await undone.rollback()
        assert await db.fetchval("SELECT count(*) FROM pg_task") == 0
        assert await notified(dsn, lambda: db.fetchval(HELLO, None)) == 1

    play(dsn, scenario)


def test_row_that_a_trigger_keeps_out_is_refused(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
        await db.execute("CREATE TRIGGER skip BEFORE INSERT ON pg_task FOR EACH ROW EXECUTE FUNCTION skip()")
        for key in (None, "one"):
            with refuses("was not inserted.*: a trigger, rule or row security policy of yours on pg_task keeps it out"):
                await db.fetchval(HELLO, key)

    play(dsn, scenario)


# --- signal and cancel


def test_signal_in_sql_is_one_of_a_client(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        run = await client.trigger(trip)
        await db.execute("UPDATE pg_task SET wakeup_at = 'infinity'")
        await db.execute("UPDATE pg_task_runs SET waits_on = 'signal go', paused_until = 'infinity'")
        await db.fetchval("SELECT pgtask_signal($1, 'go')", run.id)
        await db.fetchval("""SELECT pgtask_signal($1, 'go', '{"b": 1.0, "a": "é"}')""", run.id)
        payloads = [row[0] for row in await db.fetch("SELECT payload FROM pg_task_signals ORDER BY id")]
        assert payloads == ["null", '{"b": 1.0, "a": "é"}']
        assert await db.fetchval("SELECT wakeup_at <= now() FROM pg_task")
        plain = await client.enqueue(Write("x"))
        for id, name, words in [
            (uuid4(), "go", "has ended, or never was; signal go was not sent"),
            (plain, "go", f"task {plain} is not the run of a workflow; signal go was not sent"),
            (run.id, "", "signal '' must be named by 1 to 255 printable characters"),
            (run.id, "x" * 256, "must be named by 1 to 255 printable characters"),
            (run.id, "a\nb", "printable"),
            (run.id, None, "signal NULL must be named"),
            (None, "go", "run NULL has ended"),
        ]:
            with refuses(words):
                await db.fetchval("SELECT pgtask_signal($1, $2)", id, name)
        with refuses("signal go: its value cannot be stored as JSON"):
            await db.fetchval("SELECT pgtask_signal($1, 'go', $2)", run.id, '"\\ud800"')
        assert await db.fetchval("SELECT count(*) FROM pg_task_signals") == 2

    play_client(dsn, scenario)


def test_cancel_in_sql_ends_a_run_with_its_children(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        parent, child, grandchild, other = [(await client.trigger(trip)).id for _ in range(4)]
        for run, under in ((child, parent), (grandchild, child)):
            await db.execute("UPDATE pg_task_runs SET parent = $2 WHERE id = $1", run, under)
        await db.execute(
            "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = 'infinity' WHERE id = $1", parent
        )
        assert await db.fetchval("SELECT pgtask_cancel($1)", parent)
        assert {one.id for one in await client.runs(state="CANCELLED")} == {parent, child, grandchild}
        assert not await db.fetchval("SELECT pgtask_cancel($1)", parent)
        unbegun = await db.fetchval("SELECT pgtask_enqueue('trip.Run')")
        assert await db.fetchval("SELECT pgtask_cancel($1)", unbegun)
        assert (await client.run(UUID(int=unbegun.int)).status()).state == "CANCELLED"
        async with db.transaction(isolation="repeatable_read"):
            with refuses("a run cannot be cancelled in a transaction that is REPEATABLE READ"):
                await db.fetchval("SELECT pgtask_cancel($1)", other)

    play_client(dsn, scenario)


def test_cancel_in_sql_removes_a_task_that_no_worker_holds(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids = [await client.enqueue(Sweep()) for _ in range(3)]
        lease = "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + $2::interval WHERE id = $1"
        await db.execute(lease.replace("$2", "'1 h'"), ids[1])
        await db.execute(lease.replace("$2", "'-1 h'"), ids[2])
        assert [await db.fetchval("SELECT pgtask_cancel($1)", id) for id in ids] == [True, False, True]
        assert not await db.fetchval("SELECT pgtask_cancel($1)", ids[0])
        assert not await db.fetchval("SELECT pgtask_cancel(NULL)")
        assert await count(db) == 1

    play_client(dsn, scenario)


# --- where they live


def test_functions_find_the_table_from_every_search_path(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute('CREATE SCHEMA "Two words"; CREATE SCHEMA other')
        await migrate(with_path(empty_dsn, '"Two%20words"'))
        await db.execute(
            "SET search_path = other; CREATE TEMPORARY TABLE pg_task (a int); CREATE TABLE other.pg_task ()"
        )
        id = await db.fetchval("""SELECT "Two words".pgtask_enqueue('trip.Run', key => 'one')""")
        assert await db.fetchval("""SELECT "Two words".pgtask_enqueue('trip.Run', key => 'one')""") == id
        await db.fetchval("""SELECT "Two words".pgtask_signal($1, 'go')""", id)
        assert await db.fetchval("""SELECT "Two words".pgtask_cancel($1)""", id)
        assert await db.fetchval("SHOW search_path") == "other"

    play(empty_dsn, scenario)


def test_functions_are_there_on_a_kept_table(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute(CRATE_1_0)
        await migrate(empty_dsn, keep_pg_task=True)
        id = await db.fetchval(HELLO, "one")
        assert await db.fetchval("SELECT pgtask_cancel($1)", id)

    play(empty_dsn, scenario)


def test_functions_need_the_rights_on_the_tables_only(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        role = f"writer_{uuid4().hex}"
        await db.execute(f"CREATE ROLE {role}")
        try:
            await db.execute(f"SET ROLE {role}")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await db.fetchval(HELLO, None)
            await db.execute(f"RESET ROLE; GRANT INSERT ON pg_task TO {role}; SET ROLE {role}")
            id = await db.fetchval(HELLO, None)
            await db.execute(f"RESET ROLE; GRANT SELECT, DELETE ON pg_task TO {role}; SET ROLE {role}")
            assert await db.fetchval(HELLO, "one") is not None
            assert await db.fetchval("SELECT pgtask_cancel($1)", id)
        finally:
            await db.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")

    play(dsn, scenario)


@pytest.mark.parametrize(
    "call", ["pgtask_enqueue('flow.Run', key => 'key ' || $2::numeric)", "pgtask_signal($1, 'go')", "pgtask_cancel($1)"]
)
def test_functions_scan_no_table(dsn: str, call: str) -> None:
    """Planned on a small table, with statistics, then used on a large one."""

    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn, server_settings={"plan_cache_mode": "force_generic_plan"}) as conn:
            types = "SELECT $1::uuid IS NULL, $2::numeric IS NULL, " + call

            async def use(run: UUID) -> None:
                await conn.fetch(types, run, run.int)

            await be_small(db, 1)
            rolled_back = conn.transaction()
            await rolled_back.start()
            await use(UUID(int=1))
            await rolled_back.rollback()
            _, (run, *_) = await grow(db, 3000)
            async with conn.transaction():
                before = await conn.fetchrow(READ, TABLES)
                await use(run)
                after = await conn.fetchrow(READ, TABLES)
            assert after[0] - before[0] == 0
            assert 0 < after[1] - before[1] < 1500

    play_client(dsn, scenario)
