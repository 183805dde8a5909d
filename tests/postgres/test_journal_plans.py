"""The statements of the journal find their rows by id, whatever the tables held when they were planned.

The normal state of an idle queue is small and vacuumed. A plan that was made then must not read whole tables or indexes
when they have grown.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from fix_database import run
from plans import Plan, Session
from sessions import our_session

from pgtask._postgres.store import HOT_SETTINGS

RUNS = 4_000
HELD = 100  # runs that our worker holds
TOKEN, PARENT, OTHER = UUID(int=1), UUID(int=7), UUID(int=9)
TABLES = ("pg_task", "pg_task_runs", "pg_task_checkpoints", "pg_task_signals")
LEASED = "SELECT id FROM pg_task WHERE locked_by = $1 ORDER BY id"

FILL = (
    """
    INSERT INTO pg_task (id, step, locked_by, lock_expires_at)
    SELECT ('00000000-0000-7000-8000-' || lpad(to_hex($1 * 10000 + n), 12, '0'))::uuid, '{"flow":{"Run":null}}',
        CASE WHEN n <= $3 THEN $4::uuid ELSE $5 END, now() + interval '1 hour'
    FROM generate_series(1, $2) AS n ORDER BY hashint4(n)""",
    """
    INSERT INTO pg_task_runs (id, name, parent, version, awaited)
    SELECT id, 'flow', $1, 1, true FROM pg_task WHERE id NOT IN (SELECT id FROM pg_task_runs)""",
    """
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, error, due_at, tried)
    SELECT id, n, n::text, 'step', 'step ' || n, 'no', now(), 1 FROM pg_task_runs, generate_series(1, 3) AS n
    ON CONFLICT DO NOTHING""",
    "INSERT INTO pg_task_signals (run, name, payload) SELECT id, 'go', '1' FROM pg_task_runs",
)


async def fill(db: Any, number: int, first: int) -> None:
    queries: list[tuple[Any, ...]] = [(first, number, HELD, TOKEN if first else OTHER, OTHER), (PARENT,), (), ()]
    for query, args in zip(FILL, queries, strict=True):
        await db.execute(query, *args)


def calls(held: list[UUID]) -> dict[str, tuple[Any, ...]]:
    def same(value: Any) -> list[Any]:
        return [value] * len(held)

    lease, null = (held, same(TOKEN)), same(None)
    texts = (same("1"), same("step"), same("s"), same("1"), null)
    children = (held, [UUID(int=2**100 + at) for at in range(len(held))], same("flow"), same("{}"), same("q"), same(0))
    return {
        "load": (held, []),
        "collect": (held,),
        "ours": lease,
        "adopt": (*lease, same("flow")),
        "record": (*lease, same(1), *texts, null, same(1), same(0.1), same(1)),
        "spawn": (*lease, same(1), *children, same(7), same("7"), same("kids"), same("1")),
        "take": (*lease, same("go"), same(8), same("8"), null, same(1)),
        "suspend": (*lease, null, null, same(0), same("children"), held, held, same(1), same(False)),
        "end": (*lease, same("no"), null, same(0), same(1), held, same(1), *[[]] * 10),
    }


async def explain(session: Session, held: list[UUID]) -> dict[str, Plan]:
    return {name: await session.explain(f"journal/{name}", *args) for name, args in calls(held).items()}


def rows_read(plan: Plan) -> int:
    """The rows that all nodes have read, also those that a filter has removed."""
    removed = ("Rows Removed by Filter", "Rows Removed by Join Filter", "Rows Removed by Index Recheck")
    read = 0.0
    for node in plan.nodes:
        read += (node["Actual Rows"] + sum(node.get(key, 0) for key in removed)) * node["Actual Loops"]
    return round(read)


@pytest.mark.parametrize("rows", [0, 1, 5, 10, 300])
def test_plan_made_on_a_small_table_reads_by_id(dsn: str, rows: int) -> None:
    async def main() -> None:
        async with (
            our_session(dsn) as db,
            our_session(dsn, **HOT_SETTINGS) as then,
            our_session(dsn, **HOT_SETTINGS) as now,
        ):
            for table in TABLES:
                await db.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
            await fill(db, rows, 0)
            for table in TABLES:
                await db.execute(f"VACUUM ANALYZE {table}")
            old, new = Session(then), Session(now)
            names = [f"journal/{name}" for name in calls([])]
            await old.prepare(names)
            await explain(old, [])
            await fill(db, RUNS, 1)
            held = [row[0] for row in await db.fetch(LEASED, TOKEN)]
            before = await explain(old, held)
            await db.execute("ANALYZE")
            await new.prepare(names)
            after = await explain(new, held)
            for name in before:
                assert rows_read(before[name]) <= 1.5 * rows_read(after[name]), name
                assert before[name].buffers <= 1.5 * after[name].buffers + 100, name
                assert rows_read(after[name]) < 100 * HELD, name

    run(main())
