"""The statements about runs keep the right plan: prepared on empty tables, run on full ones without statistics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from fix_database import run
from plans import Session
from sessions import our_session

from pgtask._postgres.store import HOT_SETTINGS, statement

RUNS = 30_000
CHECKPOINTS = 5  # of each run
HELD = 200  # runs that our worker holds
TOKEN = UUID(int=1)
PARENT = UUID(int=7)

FILL = (
    """
    INSERT INTO pg_task (id, step, locked_by, lock_expires_at)
    SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, '{"flow":{"Run":null}}',
        CASE WHEN n <= $2 THEN $3::uuid END, CASE WHEN n <= $2 THEN now() + interval '1 hour' END
    FROM generate_series(1, $1) AS n ORDER BY hashint4(n)""",
    """
    INSERT INTO pg_task_runs (id, name, parent, version, awaited)
    SELECT id, 'flow', $1, 1, true FROM pg_task""",
    "INSERT INTO pg_task_runs (id, name) VALUES ($1, 'parent')",
    """
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result)
    SELECT id, n, n::text, 'step', 'step ' || n, '1' FROM pg_task, generate_series(1, $1) AS n""",
    "INSERT INTO pg_task_signals (run, name, payload) SELECT id, 'go', '1' FROM pg_task",
)
NAMES = ("load", "record", "spawn", "take", "suspend", "end", "ours", "collect", "adopt")


def same(value: Any) -> list[Any]:
    return [value] * HELD


def calls(held: list[UUID], fresh: list[UUID]) -> dict[str, tuple[Any, ...]]:
    lease = (held, same(TOKEN))
    none = same(None)
    record = (same(6), same("6"), same("step"), same("s"), same("1"), none, none, same(0), same(0.1), none)
    children = (held, fresh, same("flow"), same("{}"), same("default"), same(0))
    suspend = (none, none, same(0), same("children"), held, held, same(1), same(False))
    return {
        "load": (held, []),
        "record": (*lease, *record),
        "spawn": (*lease, none, *children, same(7), same("7"), same("kids"), same("1")),
        "take": (*lease, same("go"), same(8), same("8"), none, none),
        "suspend": (*lease, *suspend),
        "end": (*lease, none, same("1"), same(0), same(1), held, same(1), held, *record[:-1]),
        "ours": lease,
        "collect": (held,),
        "adopt": (*lease, same("flow")),
    }


@pytest.mark.timeout(100)
def test_journal_reads_by_indexes_at_bounded_cost(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn) as db, our_session(dsn, **HOT_SETTINGS) as hot:
            session = Session(hot)
            await session.prepare([f"journal/{name}" for name in NAMES])
            arguments: list[tuple[Any, ...]] = [(RUNS, HELD, TOKEN), (PARENT,), (PARENT,), (CHECKPOINTS,), ()]
            for query, args in zip(FILL, arguments, strict=True):
                await db.execute(query, *args)
            held = [row[0] for row in await db.fetch("SELECT id FROM pg_task WHERE locked_by = $1", TOKEN)]
            fresh = [UUID(int=2**100 + number) for number in range(HELD)]
            for name, args in calls(held, fresh).items():
                plan = await session.explain(f"journal/{name}", *args)
                scanned = {node.get("Relation Name") for node in plan.nodes if node["Node Type"] == "Seq Scan"}
                assert not scanned, f"{name} scans {scanned}"
                assert plan.buffers < 60 * HELD, f"{name} touches {plan.buffers} buffers for {HELD} runs"

    run(main())


QUESTIONS: dict[str, Callable[[list[UUID]], tuple[Any, ...]]] = {
    "status": lambda runs: (runs,),
    "result": lambda runs: (runs,),
    "list": lambda runs: (UUID(int=2**128 - 1), 100),
    "list_named": lambda runs: (UUID(int=2**128 - 1), 100, "flow"),
    "checkpoints": lambda runs: (runs[0], None),
    "signal": lambda runs: (runs[0], "go", "1"),
    "resume": lambda runs: (runs[:1],),
}


@pytest.mark.timeout(100)
def test_queries_of_runs_cost_what_they_return(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn) as db:
            arguments: list[tuple[Any, ...]] = [(RUNS, HELD, TOKEN), (PARENT,), (PARENT,), (CHECKPOINTS,), ()]
            for query, args in zip(FILL, arguments, strict=True):
                await db.execute(query, *args)
            await db.execute("ANALYZE")
            session = Session(db)
            await session.prepare([f"runs/{name}" for name in QUESTIONS])
            runs = [row[0] for row in await db.fetch("SELECT id FROM pg_task LIMIT 100")]
            for name, ask in QUESTIONS.items():
                plan = await session.explain(f"runs/{name}", *ask(runs))
                assert plan.buffers < 3000, f"{name} touches {plan.buffers} buffers"

    run(main())


def test_trigger_of_parked_runs_wakes_parents_as_end_sql_does() -> None:
    """A migration cannot include a file of `sql/shared`: the rule for waking a parent is compared."""

    def plain(text: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"\b(task|run|parent)\.|--.*", "", text))

    trigger = plain(statement("migrations/010_parked_runs"))
    shared = plain(statement("shared/ended"))
    rule = re.search(r"SET wakeup_at = CASE .*? END(?= FROM parent)", shared)
    assert rule is not None
    assert rule[0] in trigger
    assert "AND (locked_by IS NOT NULL OR wakeup_at = paused_until)" in shared
    assert "AND (locked_by IS NOT NULL OR wakeup_at = paused)" in trigger
    assert "UPDATE pg_task_runs SET waits_for = waits_for - 1" in trigger
    assert "IF left_to <= 0 THEN" in trigger
    assert "AND waits_for <= 0" in shared


def test_statements_share_the_fence_and_the_end_of_a_run() -> None:
    fenced = ("adopt", "record", "spawn", "take")
    for text, names in {
        "locked_by IS NOT DISTINCT FROM entry.token\n        FOR NO KEY UPDATE SKIP LOCKED": [
            f"journal/{name}" for name in (*fenced, "suspend")
        ],
        "SET version = coalesce(run.version, excluded.version),\n        started_at": [
            f"journal/{name}" for name in fenced[1:]
        ],
        "SELECT pg_notify('pg_task_ended'": ["journal/end", "runs/cancel"],
    }.items():
        assert all(statement(name).count(text) == 1 for name in names), text
