"""Triggers and rules of the user may drop a row, with an error or silently; the caller gets an error in any case."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest
from fix_database import execute, run

from pgtask import Client, Context, Done, Task, WorkflowContext, workflow
from pgtask.errors import DataRefused


class Post(Task):
    pass


class Write(Post):
    text: str = "x"

    async def run(self, ctx: Context) -> Done:
        return Done()


@workflow("write")
async def write(ctx: WorkflowContext, text: str) -> str:
    return text


KEEPER = """
    CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
    CREATE TRIGGER a BEFORE INSERT ON pg_task FOR EACH ROW {when} EXECUTE FUNCTION keep_out()
"""
OTHER = """INSERT INTO pg_task (step) VALUES ('{"Post":{"Write":{"text":"x"}}}')"""
HOLDER = """
    INSERT INTO pg_task (step, key, queue)
    SELECT '{"Post":{"Write":{"text":"x"}}}', key, 'hidden' FROM (VALUES ('Post/k'), ('write/k')) AS held (key)
"""
_LIMITED = f"pgtask_limited_{os.getpid()}"
ROW_SECURITY = f"""
    ALTER TABLE pg_task ENABLE ROW LEVEL SECURITY;
    GRANT ALL ON ALL TABLES IN SCHEMA public TO {_LIMITED};
"""

REFUSALS = {
    "a trigger that returns NULL": KEEPER.format(when=""),
    "a trigger that raises": """
        CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$;
        CREATE TRIGGER a BEFORE INSERT ON pg_task FOR EACH ROW EXECUTE FUNCTION complain()
    """,
    "a unique index": f"CREATE UNIQUE INDEX ON pg_task ((true)); {OTHER}",
    "an exclusion constraint": f"""
        ALTER TABLE pg_task ADD EXCLUDE USING btree ((1) WITH =); {OTHER}
    """,
    "a check": "ALTER TABLE pg_task ADD CHECK (queue = 'other')",
    "row security": ROW_SECURITY + "CREATE POLICY p ON pg_task USING (queue = 'other')",
    "row security that lets one look": ROW_SECURITY
    + "CREATE POLICY p ON pg_task FOR SELECT USING (true); CREATE POLICY q ON pg_task FOR INSERT WITH CHECK (false)",
}
# COPY passes by rules.
RULES = {
    "a rule": "CREATE RULE r AS ON INSERT TO pg_task DO INSTEAD NOTHING",
    "a rule with a condition": "CREATE RULE r AS ON INSERT TO pg_task WHERE NEW.queue <> 'other' DO INSTEAD NOTHING",
}

Call = Callable[[Client, Any], Awaitable[Any]]
INSERTS: dict[str, Call] = {
    "enqueue": lambda client, conn: client.enqueue(Write(), conn=conn),
    "enqueue with a key": lambda client, conn: client.enqueue(Write(), key="new", conn=conn),
    "enqueue_many with keys": lambda client, conn: client.enqueue_many(
        [Write(str(n)) for n in range(3)], key=lambda step: step.text, conn=conn
    ),
    "trigger": lambda client, conn: client.trigger(write, "x", conn=conn),
    "trigger with a key": lambda client, conn: client.trigger(write, "x", key="new", conn=conn),
    "trigger_many": lambda client, conn: client.trigger_many(write, ["x", "y"], conn=conn),
}
COPY: dict[str, Call] = {"enqueue_many": lambda client, conn: client.enqueue_many([Write("y"), Write("z")], conn=conn)}


@pytest.fixture(scope="session")
def limited(cluster: str) -> Iterator[str]:
    """A role to which row security applies."""
    asyncio.run(execute(cluster, f"CREATE ROLE {_LIMITED} LOGIN"))
    yield _LIMITED
    asyncio.run(execute(cluster, f"DROP ROLE {_LIMITED}"))


async def refused(dsn: str, user: str | None, calls: dict[str, Call]) -> None:
    """Each call is refused, on a connection of the client's and on one of the caller's, and leaves nothing."""
    dsn = dsn if user is None else dsn.replace("postgres@", f"{user}@")
    db = await asyncpg.connect(dsn)
    rows = "SELECT (SELECT count(*) FROM pg_task), (SELECT count(*) FROM pg_task_runs)"
    before = await db.fetchrow(rows)
    async with Client(dsn) as client:
        for name, call in calls.items():
            with pytest.raises(DataRefused) as caught:
                await call(client, None)
            assert "\n" not in str(caught.value), name
            assert await db.fetchrow(rows) == before, name
            transaction = db.transaction()
            await transaction.start()
            with pytest.raises(DataRefused):
                await call(client, db)
            await transaction.rollback()
            assert await db.fetchrow(rows) == before, name
    await db.close()


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_row_dropped_by_a_trigger_is_refused(dsn: str, limited: str, refusal: str) -> None:
    asyncio.run(execute(dsn, refusal))
    run(refused(dsn, limited if "SECURITY" in refusal else None, {**INSERTS, **COPY}), timeout=30)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_row_dropped_by_a_rule_is_refused(dsn: str, rule: str) -> None:
    asyncio.run(execute(dsn, rule))
    run(refused(dsn, None, INSERTS), timeout=30)


def test_key_of_a_hidden_task_is_refused(dsn: str, limited: str) -> None:
    """A policy lets the rows in, and hides the one that has the key."""
    policy = ROW_SECURITY + "CREATE POLICY p ON pg_task USING (queue <> 'hidden') WITH CHECK (true)"
    asyncio.run(execute(dsn, f"{policy}; {HOLDER}"))
    calls: dict[str, Call] = {
        "enqueue": lambda client, conn: client.enqueue(Write(), key="k", conn=conn),
        "enqueue_many": lambda client, conn: client.enqueue_many([Write()], key=lambda _: "k", conn=conn),
        "trigger": lambda client, conn: client.trigger(write, "x", key="k", conn=conn),
    }
    run(refused(dsn, limited, calls), timeout=30)


def test_one_dropped_row_refuses_its_whole_batch(dsn: str) -> None:
    asyncio.run(execute(dsn, KEEPER.format(when="WHEN (NEW.step LIKE '%7%')")))
    steps = [Write(str(n)) for n in range(10)]
    calls: dict[str, Call] = {
        "enqueue_many": lambda client, conn: client.enqueue_many(steps, conn=conn),
        "with keys": lambda client, conn: client.enqueue_many(steps, key=lambda step: step.text, conn=conn),
        "trigger_many": lambda client, conn: client.trigger_many(write, [step.text for step in steps], conn=conn),
    }
    run(refused(dsn, None, calls), timeout=30)


def test_dropped_row_does_not_abort_the_callers_transaction(dsn: str) -> None:
    asyncio.run(execute(dsn, REFUSALS["a trigger that returns NULL"]))

    async def main() -> None:
        db = await asyncpg.connect(dsn)
        async with Client(dsn) as client, db.transaction():
            for call in {**INSERTS, **COPY}.values():
                with pytest.raises(DataRefused, match="a trigger, rule or row security policy of yours on pg_task"):
                    await call(client, db)
            assert await db.fetchval("SELECT count(*) FROM pg_task") == 0
        await db.close()

    run(main(), timeout=30)


@pytest.mark.parametrize("key", [None, "k"])
def test_cancelled_run_with_dropped_task_is_not_resumed(dsn: str, key: str | None) -> None:
    async def main() -> None:
        async with Client(dsn) as client:
            started = await client.trigger(write, "x", key=key)
            assert await started.cancel()
            await execute(dsn, REFUSALS["a trigger that returns NULL"])
            with pytest.raises(DataRefused, match=f"run {started.id} cannot be resumed"):
                await started.resume()
            await execute(dsn, "DROP TRIGGER a ON pg_task")
            assert await started.resume()

    run(main(), timeout=30)


# --- a key that something else has
