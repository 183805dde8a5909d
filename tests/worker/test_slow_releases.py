"""The reaper releases the leases of a dead worker though the row of one is slow to write."""

from __future__ import annotations

import asyncio
import logging
from uuid import UUID, uuid4

import pytest
from fix_database import run
from sessions import connected

from pgtask._postgres.store import Link
from pgtask._supervisor import reaper

SLOW = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep(600); RETURN NEW; END $$;
    CREATE TRIGGER slow BEFORE UPDATE ON pg_task FOR EACH ROW WHEN (OLD.key IN ('7', '23')) EXECUTE FUNCTION slow()
"""

LEASED = """
    INSERT INTO pg_task (step, key, claims, locked_by, lock_expires_at)
    SELECT '{}', n, 1, $1, now() + interval '60 s' FROM generate_series(1, 300) AS n
    RETURNING id
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pooled", [False, True])
def test_rows_that_are_slow_to_release_hold_up_no_other(
    dsn: str, caplog: pytest.LogCaptureFixture, pooled: bool
) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            token = uuid4()
            ids: list[UUID] = [row[0] for row in await db.fetch(LEASED, token)]
            await db.execute(SLOW)
            link = Link(dsn, "pgtask reaper", pooled=pooled, settings={"statement_timeout": "500ms"})
            dead = reaper.DeadWorker(token.bytes[:8], 1, [ids[0].bytes], "killed by signal 9")
            release = reaper._Release(link, dead, pooled=pooled)
            while not await release.advance():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await link.close()
            left = await db.fetch("SELECT key FROM pg_task WHERE locked_by IS NOT NULL ORDER BY id")
            assert [row[0] for row in left] == ["7", "23"]
            assert await db.fetchval("SELECT claims FROM pg_task WHERE id = $1", ids[0]) == 1, "its death counts"
            assert await db.fetchval("SELECT sum(claims) FROM pg_task") == 3

    with caplog.at_level(logging.INFO):
        run(main())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pgtask.reaper")]
    named = [line for line in said if line.startswith("database.slow") and "task=" in line]
    assert len(named) == 2
    assert "tasks=298 executing=1" in said[-1]
