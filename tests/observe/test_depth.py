"""The depth of the queues in SQL: what the functions say of tables of every shape, and what they cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_kit import play, with_path

from pgtask._postgres.migrate import migrate

pytestmark = pytest.mark.one_database

INSERT = """
    INSERT INTO pg_task (step, queue, priority, wakeup_at, limit_key, limit_at, locked_by, lock_expires_at, error)
    SELECT '{}', queue, priority,
        CASE WHEN kind IN ('limited', 'endless') THEN 'infinity' ELSE now() + make_interval(secs => wakes) END,
        CASE WHEN kind = 'limited' THEN 'host a' END, CASE WHEN kind = 'limited' THEN now() - interval '1 s' END,
        CASE WHEN kind LIKE 'leased%' THEN gen_random_uuid() END,
        CASE kind WHEN 'leased' THEN now() + interval '1 hour' WHEN 'leased long ago' THEN now() - interval '1 s' END,
        CASE kind WHEN 'parked' THEN 'an error' END
    FROM unnest($1::text[], $2::smallint[], $3::text[], $4::float8[]) AS new (queue, priority, kind, wakes)
"""
STATE = {"limited": "limited", "endless": "scheduled", "leased": "leased", "leased long ago": "due", "parked": "parked"}
ROW = st.tuples(
    st.sampled_from(["a", "b", "B c'"]),
    st.sampled_from([-1, 0, 7]),
    st.sampled_from(["waiting", "limited", "endless", "leased", "leased long ago", "parked"]),
    st.floats(1, 1000) | st.floats(-1000, -1),
)


def expected(rows: list[tuple[str, int, str, float]], only: str | None) -> tuple[dict[Any, int], dict[str, float]]:
    """Return by brute force the tasks by queue and state, and the age of the oldest that is due, by queue."""
    counts: Counter[tuple[str, str]] = Counter()
    ages: dict[str, float] = {}
    for queue, _, kind, wakes in rows:
        if only in (None, queue):
            state = STATE.get(kind) or ("due" if wakes < 0 else "scheduled")
            counts[queue, state] += 1
            if state == "due":
                ages[queue] = max(ages.get(queue, 0.0), -wakes)
    return dict(counts), ages


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROW, max_size=40), only=st.sampled_from([None, "a", "B c'", "no such"]))
def test_they_say_what_brute_force_finds(dsn: str, rows: list[Any], only: str | None) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("DELETE FROM pg_task")
        async with db.transaction():
            await db.execute(INSERT, *(map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])))
            found = await db.fetch("SELECT * FROM pgtask_depth($1)", only)
            backlog, oldest = await db.fetchrow("SELECT pgtask_backlog($1), pgtask_oldest_due($1)", only)
        counts, ages = expected(rows, only)
        assert {(row["queue"], row["state"]): row["tasks"] for row in found} == counts
        assert not any(row["is_estimate"] for row in found)
        due = {row["queue"]: row["oldest_due"] for row in found if row["state"] == "due"}
        assert due == pytest.approx(ages, abs=5)
        assert backlog == sum(tasks for (_, state), tasks in counts.items() if state in ("due", "limited", "leased"))
        assert oldest == pytest.approx(max(ages.values(), default=0.0), abs=5)

    play(dsn, scenario)


FILL = """
    INSERT INTO pg_task (step, queue, priority, wakeup_at, error)
    SELECT '{}', CASE n % 10 WHEN 0 THEN 'small' ELSE 'large' END, n % 3,
        now() + (CASE WHEN kind = 'scheduled' THEN 1 ELSE -1 END) * (1000 + n) * interval '1 s',
        CASE WHEN kind = 'parked' THEN 'an error' END
    FROM unnest(ARRAY['due', 'parked', 'scheduled'], $1::integer[]) AS wanted (kind, count)
    CROSS JOIN LATERAL generate_series(1, count) AS n
"""
READ = """
    SELECT sum(seq_tup_read)::integer AS scanned, sum(idx_tup_fetch)::integer AS fetched
    FROM pg_stat_xact_user_tables WHERE relname = 'pg_task'
"""


@pytest.fixture(scope="module")
def grown(module_dsn: str) -> str:
    """A database with some 100,000 tasks of each kind."""

    async def scenario(db: Any) -> None:
        await db.execute("DELETE FROM pg_task; SET synchronous_commit = off")
        await db.execute(FILL, [150_000, 50_000, 50_000])
        await db.execute("ANALYZE pg_task")

    play(module_dsn, scenario)
    return module_dsn


class TestLargeTables:
    def test_estimates_are_near_and_said_to_be_so(self, grown: str) -> None:
        async def scenario(db: Any) -> None:
            rows = await db.fetch("SELECT * FROM pgtask_depth()")
            found = {(row["queue"], row["state"]): row["tasks"] for row in rows}
            wanted = {
                ("large", "due"): 135_000,
                ("small", "due"): 15_000,
                ("large", "parked"): 45_000,
                ("small", "parked"): 5_000,
                ("large", "scheduled"): 45_000,
                ("small", "scheduled"): 5_000,
            }
            assert found == pytest.approx(wanted, rel=0.25)
            assert all(row["is_estimate"] for row in rows)
            assert await db.fetchval("SELECT pgtask_backlog()") == pytest.approx(150_000, rel=0.1)
            assert await db.fetchval("SELECT pgtask_oldest_due()") == pytest.approx(151_000, abs=60)

        play(grown, scenario)

    @pytest.mark.parametrize(
        ("call", "most"), [("pgtask_oldest_due()", 50), ("pgtask_depth()", 9000), ("pgtask_backlog('small')", 9000)]
    )
    def test_they_read_no_more_of_a_large_table(self, grown: str, call: str, most: int) -> None:
        async def scenario(db: Any) -> None:
            async with db.transaction():
                await db.fetch(f"SELECT * FROM {call}")
                read = await db.fetchrow(READ)
            assert read["scanned"] == 0
            assert read["fetched"] <= most

        play(grown, scenario)


def test_they_work_for_a_reader_anywhere(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("INSERT INTO pg_task (step) VALUES ('{}')")
        async with db.transaction():
            await db.execute("CREATE ROLE pgtask_test_reader; GRANT SELECT ON pg_task TO pgtask_test_reader")
            await db.execute("CREATE TEMP TABLE pg_task (id integer) ON COMMIT DROP")
            await db.execute("SET LOCAL ROLE pgtask_test_reader; SET LOCAL transaction_read_only = on")
            assert await db.fetchval("SELECT pgtask_backlog()") == 1
            assert await db.fetchval("SELECT pgtask_oldest_due()") > 0
            assert await db.fetchval("SELECT tasks FROM pgtask_depth('default')") == 1
            raise asyncpg.InterfaceError("roll back")

    with pytest.raises(asyncpg.InterfaceError, match="roll back"):
        play(dsn, scenario)


@pytest.mark.parametrize("lost", ["pgtask_backlog(text)", "pgtask_oldest_due(text)"])
def test_migrate_repairs_them(empty_dsn: str, lost: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("CREATE SCHEMA one")
        await migrate(with_path(empty_dsn, "one"))
        await db.execute(f"SET search_path = one; DROP FUNCTION {lost}")
        assert lost in (await migrate(with_path(empty_dsn, "one")))[-1]
        await db.execute("ALTER SCHEMA one RENAME TO two; SET search_path = two")
        await migrate(with_path(empty_dsn, "two"))
        assert await db.fetchval("SELECT pgtask_backlog()") == 0

    play(empty_dsn, scenario)
