"""An entry of the journal that is sent again, and arrives late, changes nothing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from fix_database import run
from sessions import connected

from pgtask._postgres.store import statement

pytestmark = pytest.mark.one_database("TRUNCATE pg_task_runs, pg_task_checkpoints, pg_task_signals")

TOKEN, RUN, PARENT, CHILD = UUID(int=1), UUID(int=7), UUID(int=8), UUID(int=9)
PAST, FUTURE = datetime(2026, 1, 1, tzinfo=UTC), datetime(2126, 1, 1, tzinfo=UTC)
LEASE = ([RUN], [TOKEN])
NEXT = [2]  # the version of an entry
TABLES = ("pg_task", "pg_task_runs", "pg_task_checkpoints", "pg_task_signals")
NOTHING: list[Any] = []


class Entry(NamedTuple):
    """A statement of the journal, and what has changed since it was sent first, if anything."""

    name: str
    args: tuple[Any, ...]
    since: str = "SELECT"


def step(number: int, *, error: str | None = None, due_at: datetime | None = None, tried: int = 0) -> tuple[Any, ...]:
    """The columns of a checkpoint, behind its run."""
    result = None if error else "1"
    return ([number], [str(number)], ["step"], ["a"], [result], [error], [due_at], [tried], [0.5])


def end(error: str | None, output: str | None, *checkpoint: Any) -> tuple[Any, ...]:
    return (*LEASE, [error], [output], [1], NEXT, NOTHING, NOTHING, *(checkpoint or [NOTHING] * 10))


SPAWN = (*LEASE, NEXT, [RUN], [CHILD], ["kid"], ["{}"], ["default"], [0], [1], ["1"], ["kids"], ["1"])
CHILD_ENDS = f"UPDATE pg_task SET error = 'no' WHERE id = '{CHILD}'"
ONE_MORE = f"INSERT INTO pg_task_signals (run, name, payload) VALUES ('{RUN}', 'go', '2')"
CLAIMED_AGAIN = (
    f"UPDATE pg_task SET locked_by = '{UUID(int=2)}', lock_expires_at = 'infinity', claims = 2 WHERE id = '{RUN}'"
)

ENTRIES = {
    "record": Entry("journal/record", (*LEASE, *step(1), NEXT)),
    "record, late": Entry("journal/record", (*LEASE, *step(1), NEXT), CLAIMED_AGAIN),
    "record a step put off": Entry("journal/record", (*LEASE, *step(1, error="no", due_at=FUTURE, tried=1), NEXT)),
    "record a step put off, which was put off again": Entry(
        "journal/record",
        (*LEASE, *step(1, error="no", due_at=PAST, tried=0), NEXT),
        f"UPDATE pg_task_checkpoints SET due_at = '{FUTURE}'",
    ),
    "spawn": Entry("journal/spawn", SPAWN),
    "spawn, and the child has ended": Entry("journal/spawn", SPAWN, CHILD_ENDS),
    "take": Entry("journal/take", (*LEASE, ["go"], [1], ["1"], [None], NEXT), ONE_MORE),
    "take at a time that is over": Entry("journal/take", (*LEASE, ["none"], [1], ["1"], [PAST], NEXT)),
    "take nothing yet": Entry("journal/take", (*LEASE, ["none"], [1], ["1"], [FUTURE], NEXT)),
    "suspend": Entry(
        "journal/suspend", (*LEASE, [PAST], [FUTURE], [1], ["signal go"], NOTHING, NOTHING, [0], [False]), CLAIMED_AGAIN
    ),
    "end": Entry("journal/end", end(None, "1")),
    "end that parks": Entry("journal/end", end("no", None), "UPDATE pg_task SET error = NULL, wakeup_at = 'infinity'"),
    "end that carries": Entry("journal/end", end(None, "1", [RUN], *step(1))),
    "adopt": Entry("journal/adopt", (*LEASE, ["flow"])),
}


async def contents(db: Any) -> dict[str, list[Any]]:
    return {table: await db.fetch(f"SELECT * FROM {table} AS row ORDER BY row::text") for table in TABLES}


@pytest.mark.parametrize("has_begun", [False, True], ids=["first", "begun"])
@pytest.mark.parametrize("name", ENTRIES)
def test_entry_late_after_a_success_changes_nothing(dsn: str, name: str, has_begun: bool) -> None:
    """`begun`: under another version, before the entry was sent first."""
    entry = ENTRIES[name]

    async def main() -> None:
        async with connected(dsn) as db:
            await db.execute(
                "INSERT INTO pg_task_runs (id, name, parent, awaited, waits_for, paused_until, version, started_at)"
                " VALUES ($1, 'flow', NULL, false, 1, 'infinity', 1, $3), ($2, 'flow', $1, true, 0, NULL, $4, $5)",
                PARENT, RUN, PAST, *((1, PAST) if has_begun else (None, None)),
            )  # fmt: skip
            await db.execute(
                "INSERT INTO pg_task (id, step, wakeup_at, locked_by, lock_expires_at, claims)"
                " VALUES ($1, '{}', 'infinity', NULL, NULL, 0), ($2, '{}', $3, $4, 'infinity', 2)",
                PARENT, RUN, PAST, TOKEN,
            )  # fmt: skip
            await db.execute("INSERT INTO pg_task_signals (run, name, payload) VALUES ($1, 'go', '1')", RUN)
            new = await contents(db)
            await db.fetch(statement(entry.name), *entry.args)
            if name != "adopt":  # which corrects records only
                assert await contents(db) != new
            await db.execute(entry.since)
            before = await contents(db)
            await db.fetch(statement(entry.name), *entry.args)
            after = await contents(db)
            assert after == before
            if has_begun:
                (record,) = [row for row in after["pg_task_runs"] if row["id"] == RUN]
                assert (record["version"], record["started_at"]) == (1, PAST)

    run(main())
