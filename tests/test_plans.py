"""Every hot statement has one right plan, and keeps it: at scale, without statistics, and under dead weight.

The worst case comes true with every bulk enqueue: a worker started on an empty table has planned its statements there,
then hundreds of thousands of rows arrive, and no ANALYZE has run. Costs are counted in buffers (8 KiB pages touched, a
page counted each time), which do not depend on the machine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from conftest import _fresh_database, run

from pgtask._fastpath import Leases, Outcomes
from pgtask._postgres.connection import connect
from pgtask._postgres.migrate import migrate
from pgtask._postgres.store import HOT_SETTINGS, statement

ROWS = 300_000
HELD = 500  # tasks that our worker holds
TOKEN = UUID(int=1)
LEASE = 1e6
READY, LEASED, PARKED = "pg_task_ready_idx", "pg_task_lease_idx", "pg_task_parked_idx"
KEY, PRIMARY = "pg_task_key_idx", "pg_task_pkey"

# A third is due in one lane, some in twelve others; the rest is dead weight: future, parked, or leased elsewhere.
FILL = """
    INSERT INTO pg_task (step, wakeup_at, queue, priority, key, error, locked_by, lock_expires_at)
    SELECT
        '{"T":{"S":{"n":' || n || '}}}',
        now() + make_interval(days => CASE WHEN kind = 'future' THEN 1 ELSE -10 END, secs => n),
        CASE kind WHEN 'lanes' THEN 'q' || n / 10 % 4 WHEN 'elsewhere' THEN 'elsewhere' ELSE 'default' END,
        CASE kind WHEN 'lanes' THEN n / 40 % 3 ELSE 0 END,
        CASE WHEN n % 3 = 0 THEN 'key ' || n END,
        CASE kind WHEN 'parked' THEN 'broken' END,
        CASE kind WHEN 'elsewhere' THEN gen_random_uuid() WHEN 'held' THEN $2 END,
        CASE kind WHEN 'elsewhere' THEN now() + make_interval(secs => 3600 + n)
                  WHEN 'held' THEN now() + make_interval(secs => 3000 + n / 1e6) END
    FROM (
        SELECT n, CASE WHEN n <= $3 THEN 'held'
            ELSE ('{due,due,due,due,future,future,future,parked,elsewhere,lanes}'::text[])[n % 10 + 1] END AS kind
        FROM generate_series(1, $1) AS n
    ) AS numbered
    ORDER BY hashint4(n)
"""


# --- plans ---------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What EXPLAIN (ANALYZE, BUFFERS) says of one execution."""

    nodes: list[dict[str, Any]]
    buffers: int

    @property
    def kinds(self) -> set[str]:
        return {node["Node Type"] for node in self.nodes}

    @property
    def indexes(self) -> set[str]:
        return {node["Index Name"] for node in self.nodes if "Index Name" in node}


def flat(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from flat(child)


def literal(value: Any, kind: str) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return f"ARRAY[{', '.join(literal(item, kind.removesuffix('[]')) for item in value)}]::{kind}"
    return "'{}'::{}".format(str(value).replace("'", "''"), kind)


@asynccontextmanager
async def connected(dsn: str, settings: dict[str, str] | None = None) -> AsyncIterator[Any]:
    db = await connect(dsn, name="plans", settings=settings)
    try:
        yield db
    finally:
        await db.close()


class Session:
    """A connection with the statements prepared by name, so that EXPLAIN EXECUTE shows the plan it has in store."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.kinds: dict[str, list[str]] = {}

    async def prepare(self, names: list[str]) -> None:
        for name in names:
            prepared = await self.db.prepare(statement(name))
            self.kinds[name] = [parameter.name for parameter in prepared.get_parameters()]
            await self.db.execute(f"PREPARE {name.replace('/', '_')} AS {statement(name)}")

    async def explain(self, name: str, *args: Any) -> Plan:
        """Run it, in a transaction that is rolled back."""
        values = ", ".join(map(literal, args, self.kinds[name]))
        query = (
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {name.replace('/', '_')}{f'({values})' if args else ''}"
        )
        transaction = self.db.transaction()
        await transaction.start()
        try:
            (found,) = json.loads(await self.db.fetchval(query))
        finally:
            await transaction.rollback()
        plan = found["Plan"]
        return Plan(list(flat(plan)), plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


# --- the statements, with the indexes they should use and the buffers they may touch -----------------------------


class Call(NamedTuple):
    statement: str
    args: tuple[Any, ...]
    indexes: set[str]
    most: int


def outcomes(kind: str, rows: list[Any]) -> tuple[Any, ...]:
    leases, _ = Leases().claimed([(row["id"], "{}", 0, 1, None) for row in rows], TOKEN, 0.0)
    made = Outcomes()
    for lease in leases:
        if kind == "done":
            made.add_done(lease)
        elif kind == "kept":
            made.add_kept(lease, '{"T":{"Next":null}}')
        else:
            made.add_moved(lease, None, 1, None, 5.0)
    return made.parameters()


def calls(held: list[Any]) -> dict[str, Call]:
    """`held` are the rows that our worker holds: none while the table is empty."""
    ids = [row["id"] for row in held]
    tokens = [TOKEN] * len(ids)
    fresh = [uuid4(), uuid4()]
    now: tuple[Any, ...] = (None, None, "default", 0)
    return {
        "claim 100": Call("claim", ("default", 0, 100, uuid4(), LEASE, 10_000, 0.0), {READY, PRIMARY}, 2300),
        "claim 1": Call("claim", ("default", 0, 1, uuid4(), LEASE, 10_000, 0.0), {READY, PRIMARY}, 60),
        "claim in an empty lane": Call("claim", ("none", 0, 100, uuid4(), LEASE, 10_000, 0.0), {READY, PRIMARY}, 10),
        "lanes": Call("lanes", (), {READY}, 100),
        "lanes_of_queues": Call("lanes_of_queues", (["default", "q1", "none"],), {READY}, 45),
        "expire": Call("expire", (1000,), {LEASED, PRIMARY}, 30),
        "renew": Call("renew", (ids, tokens, LEASE), {PRIMARY}, 30 * HELD),
        "release": Call("release", (ids, tokens), {PRIMARY}, 22 * HELD),
        "flush done": Call("flush", outcomes("done", held), {PRIMARY}, 8 * HELD),
        "flush kept": Call("flush", outcomes("kept", held), {PRIMARY}, 15 * HELD),
        "flush moved": Call("flush", outcomes("moved", held), {PRIMARY}, 22 * HELD),
        "enqueue": Call("enqueue", (uuid4(), "{}", *now, None), set(), 40),
        "enqueue with a new key": Call("enqueue", (uuid4(), "{}", *now, "new"), set(), 50),
        "enqueue with a key that is there": Call("enqueue", (uuid4(), "{}", *now, "key 300"), set(), 20),
        "enqueue_keyed": Call("enqueue_keyed", (fresh, ["{}"] * 2, ["a"] * 2, [0] * 2, ["key 3", "x"]), set(), 60),
        "find_keys": Call("find_keys", ([f"key {n}" for n in range(3, 3000, 30)],), {KEY}, 600),
        "burst_left": Call("burst_left", (None,), {LEASED, PARKED}, 20),
        "burst_left of a queue without any": Call("burst_left", (["none"],), {LEASED, PARKED}, 1_000_000),
        "burst_left of a queue that has some": Call("burst_left", (["default"],), {LEASED, PARKED}, 60),
        "parked_left": Call("parked_left", (None, 1000), {PARKED}, 1100),
        # Reads every live lease of everybody: it runs only after a reply was lost.
        "claim_recover": Call("claim_recover", (TOKEN,), {LEASED, PRIMARY}, ROWS // 10 + 30 * HELD),
        # The same, after a death.
        "handover": Call(
            "handover",
            (UUID(int=0), UUID(int=2**64 - 1), ids[:9], False, "", ""),
            {LEASED, PRIMARY},
            ROWS // 10 + 30 * HELD,
        ),
        "count_due": Call("count_due", (None, 0, 100), {READY, LEASED}, 2000),
    }


MOMENTS = ("planned while empty", "unanalysed", "pooled unanalysed", "analysed", "pooled analysed")
CALLS = tuple(calls([]))
STATEMENTS = sorted({call.statement for call in calls([]).values()})
POOLED = {"plan_cache_mode": "force_custom_plan"}  # unnamed statements are planned each time, for their values


@pytest.fixture(scope="module")
def database(cluster: str) -> Iterator[str]:
    yield from _fresh_database(cluster, "template0")


@pytest.fixture(scope="module")
def plans(database: str) -> dict[str, dict[str, Plan]]:
    """For each moment, the plan of each call."""

    async def explained(session: Session, held: list[Any]) -> dict[str, Plan]:
        return {name: await session.explain(call.statement, *call.args) for name, call in calls(held).items()}

    async def main() -> dict[str, dict[str, Plan]]:
        await migrate(database)
        found: dict[str, dict[str, Plan]] = {}
        async with AsyncExitStack() as stack:
            db, *others = [
                await stack.enter_async_context(connected(database, settings))
                for settings in (None, HOT_SETTINGS, HOT_SETTINGS, POOLED)
            ]
            old, new, pooled = map(Session, others)
            await db.execute("ALTER TABLE pg_task SET (autovacuum_enabled = off)")
            await old.prepare(STATEMENTS)
            await explained(old, [])
            query = "SELECT count(*) FROM pg_prepared_statements WHERE from_sql AND generic_plans > 0"
            assert await old.db.fetchval(query) == len(STATEMENTS), "not all were planned while the table was empty"
            await db.execute(FILL, ROWS, TOKEN, HELD)
            held = await db.fetch("SELECT id FROM pg_task WHERE locked_by = $1", TOKEN)
            await new.prepare(STATEMENTS)
            await pooled.prepare(STATEMENTS)
            for session, moment in zip((old, new, pooled), MOMENTS[:3], strict=True):
                found[moment] = await explained(session, held)
            await db.execute("ANALYZE pg_task")
            for session, moment in zip((new, pooled), MOMENTS[3:], strict=True):
                found[moment] = await explained(session, held)
        return found

    return asyncio.run(main())


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", CALLS)
def test_cost_is_bounded_at_every_moment(plans: dict[str, dict[str, Plan]], name: str, moment: str) -> None:
    assert plans[moment][name].buffers <= calls([])[name].most


@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if "pooled" not in moment])
@pytest.mark.parametrize("name", CALLS)
def test_plan_is_index_scans_only(plans: dict[str, dict[str, Plan]], name: str, moment: str) -> None:
    plan = plans[moment][name]
    wrong = {"Seq Scan", "Bitmap Heap Scan", "Sort", "Incremental Sort", "Hash Join", "Merge Join", "Gather"}
    assert not plan.kinds & wrong
    assert plan.indexes == calls([])[name].indexes


@pytest.mark.xfail(strict=True, reason="30,000 leases and 30,000 parked tasks of other queues are read one by one")
@pytest.mark.parametrize("moment", MOMENTS)
def test_cost_of_burst_left_for_a_queue_without_any(plans: dict[str, dict[str, Plan]], moment: str) -> None:
    assert plans[moment]["burst_left of a queue without any"].buffers <= 100


# --- what an update costs --------------------------------------------------------------------------------------


async def counts(db: Any) -> tuple[int, int]:
    """Rows updated, and those of them heap-only, in this transaction."""
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'pg_task'"
    updated, heap_only = await db.fetchrow(query)
    return updated, heap_only


def test_going_on_under_the_lease_is_a_heap_only_update(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn, HOT_SETTINGS) as db:
            await db.execute(FILL, 5000, TOKEN, HELD)
            held = await db.fetch("SELECT id FROM pg_task WHERE locked_by = $1", TOKEN)
            async with db.transaction():
                await db.fetch(statement("flush"), *outcomes("kept", held))
                assert await counts(db) == (HELD, HELD)

    run(main())


# --- dead rows -------------------------------------------------------------------------------------------------

FINISHED = 10_000


async def finish(db: Any, n: int) -> None:
    for _ in range(n // HELD):
        held = await db.fetch(statement("claim"), "default", 0, HELD, TOKEN, LEASE, 10_000, 0.0)
        await db.fetch(statement("flush"), *outcomes("done", held))


@pytest.mark.parametrize("foreign", [False, True], ids=["alone", "beside a foreign transaction"])
def test_cost_does_not_grow_with_the_tasks_that_were_finished(dsn: str, foreign: bool) -> None:
    """Before any vacuum. A transaction elsewhere, on whatever table, keeps dead rows from being skipped: then a claim
    must not come near them, and what does (the look for lanes and that for ended leases) must not be often."""

    async def main() -> dict[str, int]:
        async with connected(dsn, HOT_SETTINGS) as db, connected(dsn) as other:
            await db.execute("ALTER TABLE pg_task SET (autovacuum_enabled = off)")
            await db.execute(
                "INSERT INTO pg_task (step, wakeup_at) SELECT '{}', now() - make_interval(secs => n)"
                " FROM generate_series(1, $1) AS n",
                FINISHED + HELD,
            )
            session = Session(db)
            await session.prepare(["claim", "lanes", "expire"])
            if foreign:
                await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
            await finish(db, FINISHED)
            floor = await db.fetchval("SELECT extract(epoch FROM min(wakeup_at))::float8 FROM pg_task")
            found: dict[str, int] = {}
            for _ in range(2):  # the first one marks what is dead
                for name, args in (
                    ("claim", ("default", 0, 10, TOKEN, LEASE, 10_000, floor if foreign else 0.0)),
                    ("lanes", ()),
                    ("expire", (10,)),
                ):
                    found[name] = (await session.explain(name, *args)).buffers
            return found

    found = run(main())
    assert found["claim"] < 500
    assert foreign or max(found.values()) < 500, found
