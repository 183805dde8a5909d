"""What the journal reads at a time has so many bytes, however large the results of steps and runs are."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from fix_database import run
from sessions import connected
from writers import journaling

from pgtask._postgres.store import Link
from pgtask._postgres.times import allow_far_times
from pgtask._workflow.entries import CollectResults, LoadHistory
from pgtask._workflow.values import RunResult

MEGABYTE = 1_000_000
MAX_READ = 16 * 1024 * 1024 + 2 * MEGABYTE

RUNS = """
    INSERT INTO pg_task_runs (id, name, state, version, output, started_at, ended_at)
    SELECT ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid, 'large', 'SUCCESS', 1, repeat('1', $2),
        now(), now()
    FROM generate_series(1, $1) AS n RETURNING id
"""

CHECKPOINTS = """
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result)
    SELECT id, n, n::text, 'step', 'step ' || n, repeat('1', $2)
    FROM pg_task_runs, generate_series(1, $1) AS n
"""


class WeighedLink(Link):
    """Notes the characters of each answer."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, "journal", on_open=allow_far_times)
        self.read: list[int] = []

    async def once(self, name: str, *args: Any, **options: Any) -> list[Any]:
        rows = await super().once(name, *args, **options)
        self.read.append(sum(len(value) for row in rows for value in row if isinstance(value, str)))
        return rows


def test_histories_with_large_results_are_read_in_portions(dsn: str) -> None:
    async def main() -> None:
        link = WeighedLink(dsn)
        async with connected(dsn) as db, journaling(dsn, link) as journal:
            ids: list[UUID] = [row[0] for row in await db.fetch(RUNS, 3, 1)]
            await db.execute(CHECKPOINTS, 20, MEGABYTE)
            histories = await asyncio.gather(*(journal.submit(LoadHistory(id)) for id in ids))
            for history in histories:
                assert [checkpoint.number for checkpoint in history.checkpoints] == list(range(1, 21))
                assert {len(checkpoint.result or "") for checkpoint in history.checkpoints} == {MEGABYTE}
                assert (history.is_known, history.version, history.state) == (True, 1, "SUCCESS")
            assert max(link.read) < MAX_READ

    run(main())


def test_large_results_of_children_are_read_in_portions(dsn: str) -> None:
    async def main() -> None:
        link = WeighedLink(dsn)
        async with connected(dsn) as db, journaling(dsn, link) as journal:
            ids: list[UUID] = [row[0] for row in await db.fetch(RUNS, 40, MEGABYTE)]
            first, second = await asyncio.gather(
                journal.submit(CollectResults(ids)), journal.submit(CollectResults(ids[::2]))
            )
            assert list(first) == ids
            assert set(second) == set(ids[::2])
            assert set(first.values()) == {RunResult("SUCCESS", "1" * MEGABYTE, None)}
            assert max(link.read) < MAX_READ

    run(main())
