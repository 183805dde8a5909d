"""The writes of a worker are fenced by pairs of id and token, also when the token changes while they wait."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest
from fix_database import run
from sessions import our_session, until_waiting

from pgtask._postgres.store import HOT_SETTINGS, statement

pytestmark = pytest.mark.one_database
OURS, THEIRS = UUID(int=1), UUID(int=2)
NOTHING: tuple[Any, ...] = ([], [])
FILL = """
    INSERT INTO pg_task (id, step, locked_by, lock_expires_at)
    SELECT id, '{}', token, now() + interval '1 hour' FROM unnest($1::uuid[], $2::uuid[]) AS task (id, token)"""


def writes(ids: list[UUID], tokens: list[UUID]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Each write of these leases: the statement, and its parameters."""
    lease, none = (ids, tokens), [None] * len(ids)
    done = (*lease, *NOTHING, [], 1, *NOTHING, *[[]] * 7, False)
    continued = (*NOTHING, *lease, ["{}"] * len(ids), 1, *NOTHING, *[[]] * 7, False)
    rescheduled = (*NOTHING, *NOTHING, [], 1, *lease, *[none] * 7, False)
    new = [ids, [uuid4() for _ in ids], ["{}"] * len(ids), none, none, ["default"] * len(ids), [0] * len(ids), none]
    return {
        "done": ("flush", done),
        "continued": ("flush", continued),
        "rescheduled": ("flush", rescheduled),
        "archived": ("archive", lease),
        "archived as another step": ("archive_as", (*lease, ["{}"] * len(ids))),
        "done, enqueues": ("flush_enqueue", (*done, *new)),
        "continued, enqueues": ("flush_enqueue", (*continued, *new)),
        "rescheduled, enqueues": ("flush_enqueue", (*rescheduled, *new)),
        "archived, enqueues": ("archive_enqueue", (*done, *new)),
        "renewed": ("renew", (*lease, 60.0)),
        "renewed with progress": ("renew_progress", (*lease, 60.0, ["{}"] * len(ids))),
        "released": ("release", (*lease, [])),
    }


WAITLESS = ("renewed", "renewed with progress", "released")


@pytest.mark.parametrize("how", [name for name in writes([], []) if name not in WAITLESS])
def test_write_that_waited_leaves_a_lost_lease_alone(dsn: str, how: str) -> None:
    """The others wait for no row."""
    task = UUID(int=7)

    async def main() -> None:
        async with our_session(dsn, **HOT_SETTINGS) as worker, our_session(dsn) as db:
            await db.execute(FILL, [task], [OURS])
            async with db.transaction():
                await db.execute("UPDATE pg_task SET locked_by = $1", THEIRS)
                name, args = writes([task], [OURS])[how]
                writing = asyncio.create_task(worker.fetch(statement(name), *args))
                await until_waiting(db)
            assert [] in list((await writing)[0].values())
            assert await db.fetch("SELECT locked_by, step FROM pg_task") == [(THEIRS, "{}")]

    run(main())


@pytest.mark.parametrize("how", writes([], []))
def test_write_takes_the_token_of_each_task(dsn: str, how: str) -> None:
    """Both tokens are in the batch, but each is that of the other task."""
    ids = [UUID(int=7), UUID(int=8), UUID(int=9)]

    async def main() -> None:
        async with our_session(dsn, **HOT_SETTINGS) as worker:
            await worker.execute(FILL, ids, [OURS, THEIRS, OURS])
            query = "SELECT ctid, * FROM pg_task ORDER BY id"
            before = await worker.fetch(query)
            name, args = writes(ids, [THEIRS, OURS, OURS])[how]
            await worker.fetch(statement(name), *args)
            after = await worker.fetch(query)
            assert before[:2] == after[:2]
            assert before[2:] != after[2:]
            assert len(after) <= 3 + how.endswith("enqueues"), "a new task of an outcome that was not written"

    run(main())
