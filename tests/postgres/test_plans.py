"""Every hot statement has one right plan, and keeps it: at scale, without statistics, and under dead weight.

The worst case comes true with every bulk enqueue: a worker started on an empty table has planned its statements there,
then hundreds of thousands of rows arrive, and no ANALYZE has run. Costs are counted in buffers (8 KiB pages touched, a
page counted each time), which do not depend on the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from claim_kit import ALL_LEASES
from fix_database import fresh_database, run
from plans import Plan, Session
from sessions import our_session
from trees import Closes

from pgtask._fastpath import Codec, Leases, NewTask, Outcomes
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.migrate import migrate
from pgtask._postgres.store import HOT_SETTINGS, statement
from pgtask._worker.foreign import pattern_of

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


# --- the statements, with the indexes they should use and the buffers they may touch -----------------------------


FOREIGN, ALL = pattern_of(["T"]), ".*"  # matches no row, and every row
ENDLESS = float("inf")
LANES = [("default", 0, 0.0), *((f"q{n}", priority, 0.0) for n in range(4) for priority in range(3))]


CODEC = Codec(Closes, "Tree", "Closes", False)


class Call(NamedTuple):
    statement: str
    args: tuple[Any, ...]
    indexes: set[str]
    most: int


def outcomes(kind: str, rows: list[Any], *, new_tasks: bool = False) -> tuple[Any, ...]:
    leases, _ = Leases().add_claimed([(row["id"], "{}", 0, 1, None) for row in rows], TOKEN, 0.0)
    made = Outcomes()
    for lease in leases:
        if kind == "done":
            made.add_done(lease)
        elif kind == "continued":
            made.add_continued(lease, '{"T":{"Next":null}}')
        else:
            made.add_rescheduled(lease, None, 1, None, 5.0)
        if new_tasks:
            made.add_new_tasks(lease, [NewTask(CODEC, uuid4(), "{}", None, None, "default", 0, None)])
    return made.parameters(1)


def enqueuing(kind: str, rows: list[Any]) -> tuple[Any, ...]:
    """The same outcomes, each with a new task. Without any, what inserts them is empty too."""
    return outcomes(kind, rows, new_tasks=True) if rows else (*outcomes(kind, rows), *[[]] * 8)


def calls(held: list[Any]) -> dict[str, Call]:
    """`held` are the rows that our worker holds: none while the table is empty."""
    ids = [row["id"] for row in held]
    tokens = [TOKEN] * len(ids)
    fresh = [uuid4(), uuid4()]
    never = (None, None)
    two: list[Any] = [None] * 2
    keyed = (fresh, ["{}"] * 2, two, two, ["a"] * 2, [0] * 2, ["key 3", "x"], two, two)
    onto = (*keyed, "after", "revive", None, None, None)
    now: tuple[Any, ...] = (None, None, "default", 0)
    known = ("default", 0, 100, uuid4(), LEASE, 10_000, 0.0)
    return {
        "claim 100": Call("claim", ("default", 0, 100, uuid4(), LEASE, 10_000, 0.0), {READY, PRIMARY}, 2300),
        "claim 1": Call("claim", ("default", 0, 1, uuid4(), LEASE, 10_000, 0.0), {READY, PRIMARY}, 60),
        "claim without suspects": Call(
            "claim_unsuspected", ("default", 0, 100, uuid4(), LEASE, 10_000, 0.0), {READY, PRIMARY}, 2300
        ),
        "claim in an empty lane": Call("claim", ("none", 0, 100, uuid4(), LEASE, 10_000, 0.0), {READY, PRIMARY}, 10),
        "claim_known": Call("claim_known", (*known, FOREIGN, 20_000, True, ENDLESS), {READY, PRIMARY}, 2700),
        "claim_known without suspects": Call(
            "claim_known", (*known, FOREIGN, 20_000, False, ENDLESS), {READY, PRIMARY}, 2700
        ),
        "claim_known where all is foreign": Call(
            "claim_known", (*known, ALL, 200, True, ENDLESS), {READY, PRIMARY}, 250
        ),
        "first_known": Call("first_known", ("default", 0, 0.0, 20_000, FOREIGN, True, ENDLESS), {READY}, 10),
        "first_known where all is foreign": Call(
            "first_known", ("default", 0, 0.0, 200, ALL, False, ENDLESS), {READY}, 250
        ),
        "claim_known before the floor": Call("claim_known", (*known, None, 20_000, True, 1.0), {READY, PRIMARY}, 10),
        "lanes": Call("lanes", lane_parameters(None), {READY}, 150),
        "lanes of queues": Call("lanes", lane_parameters(["default", "q1", "none"]), {READY}, 45),
        "lanes in a portion": Call("lanes", lane_parameters(None, oldest=2.0, youngest=1.0), {READY}, 10_000),
        "lanes from floors": Call("lanes", lane_parameters([], known=LANES), {READY}, 60),
        "expire": Call("expire", (1000, *ALL_LEASES), {LEASED, PRIMARY}, 30),
        "expire from a floor": Call("expire", (1000, 0.0, 1.0, -ENDLESS, 0.0), {LEASED, PRIMARY}, 30),
        "expire in a portion": Call("expire", (1000, ENDLESS, 2.0, 1.0, ENDLESS), {LEASED, PRIMARY}, 30),
        "renew": Call("renew", (ids, tokens, LEASE), {PRIMARY}, 30 * HELD),
        "renew_progress": Call("renew_progress", (ids, tokens, LEASE, ["{}"] * len(ids)), {PRIMARY}, 40 * HELD),
        "release": Call("release", (ids, tokens, []), {PRIMARY}, 24 * HELD),
        "flush done": Call("flush", outcomes("done", held), {PRIMARY}, 8 * HELD),
        "flush continued": Call("flush", outcomes("continued", held), {PRIMARY}, 15 * HELD),
        "flush rescheduled": Call("flush", outcomes("rescheduled", held), {PRIMARY}, 22 * HELD),
        "flush_enqueue done": Call("flush_enqueue", enqueuing("done", held), {PRIMARY}, 30 * HELD),
        "flush_enqueue continued": Call("flush_enqueue", enqueuing("continued", held), {PRIMARY}, 40 * HELD),
        "flush_enqueue rescheduled": Call("flush_enqueue", enqueuing("rescheduled", held), {PRIMARY}, 45 * HELD),
        "enqueue": Call("enqueue", (uuid4(), "{}", *now, *never, None), set(), 40),
        "enqueue with a new key": Call("enqueue", (uuid4(), "{}", *now, *never, "new"), set(), 50),
        "enqueue with a key that is there": Call("enqueue", (uuid4(), "{}", *now, *never, "key 300"), set(), 20),
        "enqueue_onto": Call("enqueue_onto", onto, {"pg_task_key_idx"}, 120),
        "find_free": Call("find_free", ("-infinity", UUID(int=0), 1000), {"pg_task_behind_idx", "pg_task_key_idx"}, 20),
        "promote": Call("promote", (fresh,), {"pg_task_key_idx", PRIMARY}, 20),
        "enqueue_keyed": Call("enqueue_keyed", keyed, set(), 60),
        "find_keys": Call("find_keys", ([f"key {n}" for n in range(3, 3000, 30)],), {KEY}, 600),
        "burst_left": Call("burst_left", (None, None), {LEASED, PARKED}, 20),
        "burst_left of a queue without any": Call("burst_left", (["none"], None), {LEASED, PARKED}, 1_000_000),
        "burst_left of a queue that has some": Call("burst_left", (["default"], None), {LEASED, PARKED}, 60),
        "parked_left": Call("parked_left", (None, 1000), {PARKED}, 1100),
        # Reads every live lease of all workers: it runs only after a reply was lost.
        "claim_recover": Call("claim_recover", (TOKEN,), {LEASED, PRIMARY}, ROWS // 10 + 30 * HELD),
        # The same, after a death.
        "release_orphaned": Call(
            "release_orphaned",
            (UUID(int=0), UUID(int=2**64 - 1), ids[:9], False, "", "", 1.0, None),
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
    yield from fresh_database(cluster, "template0")


@pytest.fixture(scope="module")
def found_plans(database: str) -> dict[str, dict[str, Plan]]:
    """For each moment, the plan of each call."""

    async def explained(session: Session, held: list[Any]) -> dict[str, Plan]:
        return {name: await session.explain(call.statement, *call.args) for name, call in calls(held).items()}

    async def main() -> dict[str, dict[str, Plan]]:
        await migrate(database)
        found: dict[str, dict[str, Plan]] = {}
        async with AsyncExitStack() as stack:
            db, *others = [
                await stack.enter_async_context(our_session(database, **settings))
                for settings in ({}, HOT_SETTINGS, HOT_SETTINGS, POOLED)
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
def test_cost_is_bounded_at_every_moment(found_plans: dict[str, dict[str, Plan]], name: str, moment: str) -> None:
    assert found_plans[moment][name].buffers <= calls([])[name].most


@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if "pooled" not in moment])
@pytest.mark.parametrize("name", CALLS)
def test_plan_is_index_scans_only(found_plans: dict[str, dict[str, Plan]], name: str, moment: str) -> None:
    plan = found_plans[moment][name]
    wrong = {"Seq Scan", "Bitmap Heap Scan", "Sort", "Incremental Sort", "Hash Join", "Merge Join", "Gather"}
    assert not plan.kinds & wrong
    assert plan.indexes == calls([])[name].indexes


@pytest.mark.parametrize("name", CALLS)
def test_worker_fires_no_trigger(found_plans: dict[str, dict[str, Plan]], name: str) -> None:
    """Except for tasks that it parks, and for those of dead workers, whose `updated_at` is set."""
    allowed = {
        "enqueue": {"pg_task_inserted"},
        "enqueue_keyed": {"pg_task_inserted"},
        "enqueue_onto": {"pg_task_inserted", "pg_task_touched"},
        "flush_enqueue": {"pg_task_inserted"},
        "release_orphaned": {"pg_task_touched"},
    }
    assert found_plans["analysed"][name].triggers <= allowed.get(calls([])[name].statement, set())


@pytest.mark.xfail(strict=True, reason="30,000 leases and 30,000 parked tasks of other queues are read one by one")
@pytest.mark.parametrize("moment", MOMENTS)
def test_cost_of_burst_left_for_a_queue_without_any(found_plans: dict[str, dict[str, Plan]], moment: str) -> None:
    assert found_plans[moment]["burst_left of a queue without any"].buffers <= 100


# --- what an update costs --------------------------------------------------------------------------------------


async def counts(db: Any) -> tuple[int, int]:
    """Rows updated, and those of them heap-only, in this transaction."""
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'pg_task'"
    updated, heap_only = await db.fetchrow(query)
    return updated, heap_only


def test_kept_lease_is_a_heap_only_update(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn, **HOT_SETTINGS) as db:
            await db.execute(FILL, 5000, TOKEN, HELD)
            held = await db.fetch("SELECT id FROM pg_task WHERE locked_by = $1", TOKEN)
            async with db.transaction():
                await db.fetch(statement("flush"), *outcomes("continued", held))
                assert await counts(db) == (HELD, HELD)

    run(main())


# --- dead rows -------------------------------------------------------------------------------------------------

FINISHED = 10_000


async def finish(db: Any, n: int) -> None:
    for _ in range(n // HELD):
        held = await db.fetch(statement("claim"), "default", 0, HELD, TOKEN, LEASE, 10_000, 0.0)
        await db.fetch(statement("flush"), *outcomes("done", held))


@pytest.mark.parametrize("foreign", [False, True], ids=["alone", "beside a foreign transaction"])
def test_cost_does_not_grow_with_finished_tasks(dsn: str, foreign: bool) -> None:
    """Before any vacuum. A transaction elsewhere, on any table, keeps dead rows in the index: then a claim must not
    read them, and the statements that do (the polls of lanes and of expired leases) must be rare."""

    async def main() -> dict[str, int]:
        async with our_session(dsn, **HOT_SETTINGS) as db, our_session(dsn) as other:
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
                    ("lanes", lane_parameters(None)),
                    ("expire", (10, *ALL_LEASES)),
                ):
                    found[name] = (await session.explain(name, *args)).buffers
            return found

    found = run(main())
    assert found["claim"] < 500
    assert foreign or max(found.values()) < 500, found
