"""No statement of a worker, its journal or a consumer waits for a row that it can skip: it tells what it has left out.

Another session locks the rows of one family in turn; the statement is about that family and a free one. A session with
our settings reports a wait as an error after half a second; one without them, as behind a pooler, waits for long.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import pytest
from claim_kit import ALL_LEASES
from fix_database import run
from sessions import connected, our_session

from pgtask._postgres.store import HOT_SETTINGS, statement
from pgtask._worker.foreign import pattern_of

pytestmark = pytest.mark.one_database("TRUNCATE pg_task_runs, pg_task_checkpoints, pg_task_signals")

NET = {"statement_timeout": "10s"}  # a statement that takes so long has waited
SESSIONS = {"direct": {**HOT_SETTINGS, **NET}, "pooled": NET}
TOKEN = UUID(int=1 << 64)
PAST = datetime(2026, 1, 1, tzinfo=UTC)


class Family(NamedTuple):
    """A run that is leased; its parent, which waits for it; a child that is due, and one whose lease has expired."""

    parent: UUID
    run: UUID
    due: UUID
    expired: UUID


LOCKED, FREE = (Family(*(UUID(int=first + at) for at in range(4))) for first in (10, 20))

FILL = (
    """
    INSERT INTO pg_task_runs (id, name, parent, awaited, waits_for, paused_until) VALUES
        ($1, 'flow', NULL, false, 1, 'infinity'), ($2, 'flow', $1, true, 0, NULL),
        ($3, 'flow', $2, false, 0, NULL), ($4, 'flow', $2, false, 0, NULL)""",
    """
    INSERT INTO pg_task (id, step, wakeup_at, locked_by, lock_expires_at, claims)
    SELECT id, '{"flow":{"Run":null}}', coalesce(wakeup_at, $6), token, ends_at::timestamptz, claims
    FROM (VALUES
        ($1::uuid, 'infinity'::timestamptz, NULL, NULL, 0), ($2, NULL, $5::uuid, '2126-01-01', 2),
        ($3, NULL, NULL, NULL, 0), ($4, NULL, $5, '2026-01-01', 0)
    ) AS task (id, wakeup_at, token, ends_at, claims)""",
    """
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, error, due_at, tried) VALUES
        ($1, 1, '1', 'step', 'again', 'no', $2, 1), ($1, 2, '2', 'signal', 'go', NULL, '2126-01-01', 0)""",
    "INSERT INTO pg_task_signals (run, name, payload) VALUES ($1, 'go', '1')",
)


async def fill(db: Any, family: Family) -> None:
    arguments: list[tuple[Any, ...]] = [family, (*family, TOKEN, PAST), (family.run, PAST), (family.run,)]
    for query, args in zip(FILL, arguments, strict=True):
        await db.execute(query, *args)


LOCKS = {
    "task": f"pg_task WHERE id = '{LOCKED.run}'",
    "record": f"pg_task_runs WHERE id = '{LOCKED.run}'",
    "checkpoint": f"pg_task_checkpoints WHERE run = '{LOCKED.run}'",
    "signal": f"pg_task_signals WHERE run = '{LOCKED.run}'",
    "parent's task": f"pg_task WHERE id = '{LOCKED.parent}'",
    "parent's record": f"pg_task_runs WHERE id = '{LOCKED.parent}'",
    "child's task": f"pg_task WHERE id = '{LOCKED.due}'",
    "child's record": f"pg_task_runs WHERE id = '{LOCKED.due}'",
    "other child's task": f"pg_task WHERE id = '{LOCKED.expired}'",
    "other child's record": f"pg_task_runs WHERE id = '{LOCKED.expired}'",
}


def locking(name: str) -> str:
    return f"SELECT FROM {LOCKS[name]} FOR UPDATE"


# --- the statements ----------------------------------------------------------------------------------------------


def ids(rows: list[Any]) -> set[UUID]:
    return {row[0] for row in rows}


def held(rows: list[Any]) -> set[UUID]:
    return set(RUNS if rows[0][0] is None else rows[0][0])


class Case(NamedTuple):
    """A statement about both families, the locks that leave one of them out, and the tasks that an answer names."""

    name: str
    args: tuple[Any, ...]
    left_out: set[str]
    answer: Callable[[list[Any]], set[UUID]] = ids


def both(value: Any) -> list[Any]:
    return [value] * 2


RUNS = [LOCKED.run, FREE.run]
LEASES = (RUNS, both(TOKEN))
NULL = both(None)
CLAIM = ("default", 0, 100, UUID(int=2), 60.0, 10_000, 0.0)


def checkpoint(number: int, *, tried: int = 0, version: int | None = None) -> tuple[Any, ...]:
    texts = (both("7"), both("step"), both("again"), both("1"), NULL)
    return (*LEASES, both(number), *texts, NULL, both(tried), both(0.1), both(version))


def carried(number: int, *, tried: int = 1) -> tuple[Any, ...]:
    return (RUNS, *checkpoint(number, tried=tried)[2:-1])


def spawn(version: int | None) -> tuple[Any, ...]:
    made = (RUNS, [UUID(int=30), UUID(int=31)], both("flow"), both("{}"), both("default"), both(0))
    return (*LEASES, both(version), *made, both(7), both("7"), both("kids"), both("1"))


def take(number: int, version: int | None) -> tuple[Any, ...]:
    return (*LEASES, both("go"), both(number), both("7"), NULL, both(version))


def suspend(*children: list[UUID]) -> tuple[Any, ...]:
    pairs = [(runs, child) for kids in children for runs, child in zip(RUNS, kids, strict=True)]
    of_run, kids = [run for run, _ in pairs], [child for _, child in pairs]
    return (*LEASES, both(PAST), NULL, both(0), both("c"), of_run, kids, both(len(children)), both(False))


TASK, RECORD = {"task"}, {"task", "record"}
END = RECORD | {"parent's task", "parent's record"}
DUE, EXPIRED = [LOCKED.due, FREE.due], [LOCKED.expired, FREE.expired]

SKIPPING = {
    "load": Case("journal/load", (RUNS, []), set()),
    "collect": Case("journal/collect", (RUNS,), set()),
    "ours": Case("journal/ours", LEASES, set()),
    "adopt": Case("journal/adopt", (*LEASES, both("flow")), RECORD, held),
    "record": Case("journal/record", checkpoint(7), TASK, held),
    "record the first": Case("journal/record", checkpoint(7, version=1), RECORD, held),
    "record another try": Case("journal/record", checkpoint(1, tried=1), TASK | {"checkpoint"}, held),
    "spawn": Case("journal/spawn", spawn(None), TASK, held),
    "spawn first": Case("journal/spawn", spawn(1), RECORD, held),
    "take": Case("journal/take", take(7, None), TASK | {"signal"}),
    "take for a checkpoint": Case("journal/take", take(2, 1), RECORD | {"signal", "checkpoint"}),
    "suspend": Case("journal/suspend", suspend(), RECORD),
    "suspend for a child": Case("journal/suspend", suspend(DUE), RECORD | {"child's record"}),
    "suspend for the last of two": Case("journal/suspend", suspend(DUE, EXPIRED), RECORD),
    "end": Case("journal/end", (*LEASES, NULL, both("1"), both(0), both(1), *[[]] * 12), END, held),
    "end and forget": Case(
        "journal/end",
        (*LEASES, both("no"), NULL, both(1), both(1), RUNS, both(1), *[[]] * 10),
        END | {"checkpoint"},
        held,
    ),
    "end that carries a try": Case(
        "journal/end", (*LEASES, NULL, both("1"), both(0), both(1), [], [], *carried(1)), END | {"checkpoint"}, held
    ),
    "end that carries a checkpoint": Case(
        "journal/end", (*LEASES, NULL, both("1"), both(0), both(1), [], [], *carried(7, tried=0)), END, held
    ),
    "claim": Case("claim", CLAIM, {"child's task"}),
    "claim without suspects": Case("claim_unsuspected", CLAIM, {"child's task"}),
    "claim what is known": Case(
        "claim_known", (*CLAIM, pattern_of(["flow"]), 100, True, float("inf")), {"child's task"}
    ),
    "claimed": Case("claimed", (RUNS, TOKEN), set()),
    "renew": Case("renew", (*LEASES, 60.0), TASK, lambda rows: {row[0] for row in rows if row[1]}),
    "renew with progress": Case(
        "renew_progress", (*LEASES, 60.0, both("{}")), TASK, lambda rows: {row[0] for row in rows if row[1]}
    ),
    "release": Case("release", (*LEASES, []), TASK, lambda rows: set(RUNS if rows[0][2] is None else rows[0][2])),
    "release what is orphaned": Case(
        "release_orphaned",
        (TOKEN, TOKEN, [*RUNS, *EXPIRED], False, "killed", "nobody", None, None),
        TASK | {"other child's task"},
        lambda rows: set(rows[0][3]),
    ),
    "locked": Case("locked", (RUNS,), TASK, lambda rows: set(RUNS) - ids(rows)),
}


@pytest.mark.parametrize("settings", SESSIONS)
@pytest.mark.parametrize("name", SKIPPING)
def test_locked_row_is_skipped_and_told(dsn: str, name: str, settings: str) -> None:
    case = SKIPPING[name]

    async def main() -> None:
        async with connected(dsn) as db, our_session(dsn, **SESSIONS[settings]) as ours:
            for family in (LOCKED, FREE):
                await fill(db, family)

            async def answer() -> set[UUID]:
                transaction = ours.transaction()
                await transaction.start()
                try:
                    return case.answer(await ours.fetch(statement(case.name), *case.args))
                finally:
                    await transaction.rollback()

            without = await answer()
            assert len(without & set(LOCKED)) == len(without & set(FREE)) > 0
            for lock in LOCKS:
                async with db.transaction():
                    await db.execute(locking(lock))
                    told = await answer()
                left_out = without - told
                assert left_out <= set(LOCKED), lock
                assert bool(left_out) == (lock in case.left_out), lock
            assert await answer() == without

    run(main())


def test_recovery_of_a_claim_skips_a_locked_row(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, our_session(dsn, **SESSIONS["pooled"]) as ours:
            for family in (LOCKED, FREE):
                await fill(db, family)
            async with db.transaction():
                await db.execute(locking("task"))
                assert await ours.fetchrow(statement("claim_recover"), TOKEN) == (1, 1)
            assert await ours.fetchrow(statement("claim_recover"), TOKEN) == (1, 0)
            assert await ours.fetchrow(statement("claim_recover"), TOKEN) == (0, 0)

    run(main())


def test_expired_lease_of_a_locked_row_is_skipped(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, our_session(dsn, **SESSIONS["pooled"]) as ours:
            await fill(db, LOCKED)
            await fill(db, FREE)
            async with db.transaction():
                await db.execute(locking("other child's task"))
                assert (await ours.fetchrow(statement("expire"), 100, *ALL_LEASES))[0] == 1
            assert (await ours.fetchrow(statement("expire"), 100, *ALL_LEASES))[0] == 1

    run(main())


# --- the outcomes of tasks: these are written without a look at the locks before ----------------------------------


def flush(**outcomes: tuple[Any, ...]) -> tuple[Any, ...]:
    none: dict[str, tuple[Any, ...]] = {"done": ([],) * 2, "continued": ([],) * 3, "rescheduled": ([],) * 9}
    done, continued, rescheduled = (none | outcomes).values()
    return (*done, *continued, 1, *rescheduled, False)


def rescheduled(error: str | None) -> tuple[Any, ...]:
    return flush(rescheduled=(*LEASES, NULL, both(1), both(error), both(1.0), NULL, NULL, NULL))


FAST = {"record", "parent's task", "parent's record"}

WAITING = {
    "done": ("flush", flush(done=LEASES), TASK, set()),
    "archived": ("archive", LEASES, TASK, set()),
    "continued": ("flush", flush(continued=(*LEASES, both("{}"))), TASK, set()),
    "tried again": ("flush", rescheduled(None), TASK, set()),
    "parked": ("flush", rescheduled("no"), TASK, FAST),
}


@pytest.mark.parametrize("name", WAITING)
def test_outcome_of_a_locked_row_is_reported_soon(dsn: str, name: str) -> None:
    """After half a second; and at once for a row that a trigger writes, such as that of the parent."""
    query, args, waited_for, refused = WAITING[name]

    async def main() -> None:
        async with connected(dsn) as db, our_session(dsn, **SESSIONS["direct"]) as ours:
            for family in (LOCKED, FREE):
                await fill(db, family)
            for lock in LOCKS:
                transaction = ours.transaction()
                await transaction.start()
                said = None
                async with db.transaction():
                    await db.execute(locking(lock))
                    try:
                        await ours.fetch(statement(query), *args)
                    except asyncpg.LockNotAvailableError as error:
                        said = str(error)
                await transaction.rollback()
                assert (said is None) == (lock not in waited_for | refused), lock
                assert said is None or ("could not obtain lock on row" in said) == (lock in refused), lock

    run(main())


def test_session_of_a_person_waits_for_the_parent_of_a_run(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db, connected(dsn) as other:
            await fill(db, LOCKED)
            await other.execute("SET lock_timeout = '50ms'")
            async with db.transaction():
                await db.execute(locking("parent's task"))
                with pytest.raises(asyncpg.LockNotAvailableError, match="lock timeout"):
                    await other.execute("UPDATE pg_task SET error = 'no' WHERE id = $1", LOCKED.run)

    run(main())
