"""The statements that a worker and a client send often, for tables that grow after the statements were planned.

Rows are counted, not time: it does not depend on the machine.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from plans import Session

from pgtask._postgres.transactions import planned_by_index

MANY = 50  # tasks of a batch
SIZES = (0, 1, 5, 10, 300)  # rows while the statements are planned
TABLES = ("pg_task", "pg_task_runs", "pg_task_checkpoints", "pg_task_signals")
TOKEN = UUID(int=1)
LEASE = 1e6
LAST = UUID(int=2**128 - 1)

# Every tenth row is waiting, every tenth is parked, the others are under leases; all are runs, each with a parent.
FILL = (
    """
    INSERT INTO pg_task (id, step, key, error, locked_by, lock_expires_at)
    SELECT
        lpad(to_hex(n), 32, '0')::uuid,
        '{"flow":{"Run":null}}',
        'flow/key ' || n,
        CASE WHEN n % 10 = 0 THEN 'broken' END,
        CASE WHEN n % 10 > 1 THEN coalesce($3::uuid, gen_random_uuid()) END,
        CASE WHEN n % 10 > 1 THEN now() + interval '1 hour' END
    FROM generate_series($1::integer, $2::integer) AS n
    ORDER BY hashint4(n)""",
    """
    INSERT INTO pg_task_runs (id, name, parent, version, awaited)
    SELECT lpad(to_hex(n), 32, '0')::uuid, 'flow', lpad(to_hex(n - 20), 32, '0')::uuid, 1, true
    FROM generate_series($1::integer, $2::integer) AS n""",
    """
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result)
    SELECT lpad(to_hex(n), 32, '0')::uuid, number, number::text, 'step', 'step', '1'
    FROM generate_series($1::integer, $2::integer) AS n, generate_series(1, 2) AS number""",
    """
    INSERT INTO pg_task_signals (run, name, payload)
    SELECT lpad(to_hex(n), 32, '0')::uuid, 'go', '1'
    FROM generate_series($1::integer, $2::integer) AS n""",
)


async def be_small(db: Any, rows: int) -> None:
    """Fill the tables with so many rows, as autovacuum has seen them last."""
    await db.execute("; ".join(f"ALTER TABLE {table} SET (autovacuum_enabled = off)" for table in TABLES))
    await fill(db, 1, rows)
    await db.execute("VACUUM ANALYZE")


async def grow(db: Any, others: int, held: int = MANY) -> tuple[list[UUID], list[UUID]]:
    """Add the tasks of others, and those that our worker holds. Return the ids of these, and of some others."""
    await fill(db, 10_001, 10_000 + others)
    await fill(db, 50_000_001, 50_000_000 + 2 * held, TOKEN)
    rows = await db.fetch("SELECT id FROM pg_task WHERE locked_by = $1 LIMIT $2", TOKEN, held)
    return [row[0] for row in rows], [UUID(int=10_000 + n) for n in range(1, MANY + 1)]


async def fill_tasks(db: Any, first: int, last: int, token: UUID | None = None) -> None:
    """Add tasks with these numbers; the leased ones under `token` (none: each under another)."""
    await db.execute(FILL[0], first, last, token)


async def fill(db: Any, first: int, last: int, token: UUID | None = None) -> None:
    """Add runs with these numbers: their tasks, as `fill_tasks` does, and all that belongs to them."""
    await fill_tasks(db, first, last, token)
    for query in FILL[1:]:
        await db.execute(query, first, last)


class Call(NamedTuple):
    args: tuple[Any, ...]
    most: int
    """Rows that it may read."""


def of_worker(held: list[UUID]) -> dict[str, Call]:
    """The statements of a worker, on the tasks that it holds."""
    lease = (held, [TOKEN] * len(held))
    none: list[None] = [None] * len(held)
    no_lease: tuple[Any, ...] = ([], [])
    done = (*lease, *no_lease, [], 1, *no_lease, *[[]] * 7, False)
    continued = (*no_lease, *lease, ["{}"] * len(held), 1, *no_lease, *[[]] * 7, False)
    rescheduled = (*no_lease, *no_lease, [], 1, *lease, *[none] * 7, False)
    claim = ("default", 0, MANY, uuid4(), LEASE, 10_000, 0.0)
    fresh = [uuid4() for _ in held]
    queues = ["default"] * len(held)
    new = (held, fresh, ["{}"] * len(held), none, none, queues, [0] * len(held), [str(id) for id in fresh])
    return {
        "flush done": Call(done, 10 * MANY),
        "flush continued": Call(continued, 10 * MANY),
        "flush rescheduled": Call(rescheduled, 10 * MANY),
        "archive": Call(lease, 10 * MANY),
        "archive_as": Call((*lease, ["{}"] * len(held)), 10 * MANY),
        "flush_enqueue done": Call((*done, *new), 20 * MANY),
        "flush_enqueue continued": Call((*continued, *new), 20 * MANY),
        "flush_enqueue rescheduled": Call((*rescheduled, *new), 20 * MANY),
        "archive_enqueue": Call((*done, *new), 20 * MANY),
        "renew": Call((*lease, LEASE), 15 * MANY),
        "renew_locked": Call((held[0] if held else TOKEN, TOKEN, LEASE, 50), 10),
        "release": Call((*lease, []), 10 * MANY),
        "locked": Call((held,), 10 * MANY),
        "claim": Call(claim, 10 * MANY),
        "claim_unsuspected": Call(claim, 10 * MANY),
        "claim_known": Call((*claim, "{", MANY, True, float("inf")), 10 * MANY),
        "claimed": Call((held, TOKEN), 10 * MANY),
        "step": Call((held[0] if held else TOKEN,), 10),
    }


def of_recovery(held: list[UUID]) -> dict[str, Call]:
    """The statements that release the leases of a claim, or of a worker: they read the leases of all others, once."""
    orphaned = (UUID(int=0), TOKEN, held[:9], False, "", "", 1.0, None)
    return {"claim_recover": Call((TOKEN,), 10 * MANY), "release_orphaned": Call(orphaned, 15 * MANY)}


def of_client(some: list[UUID]) -> dict[str, Call]:
    """The statements of a client, on tasks of every kind."""
    one = some[0] if some else TOKEN
    fresh = [UUID(int=2**100 + n) for n in range(len(some))]
    keys = [f"flow/key {id.int}" for id in some]
    none: list[Any] = [None] * len(some)
    new = (fresh, ["{}"] * len(some), none, none, ["a"] * len(some), [0] * len(some), keys, none, none)
    key = keys[0] if keys else "none"
    return {
        "enqueue": Call((uuid4(), "{}", None, None, "default", 0, None, None, key), 10),
        "enqueue_keyed": Call(new, 10 * MANY),
        "enqueue_onto": Call(
            (*new, "after", "keep", None, None, None), 8 * MANY**2
        ),  # it compares the keys of its batch
        "find_free": Call(("-infinity", UUID(int=0), 1000), 10),
        "promote": Call((fresh,), 10 * MANY),
        "find_keys": Call((keys,), 10 * MANY),
        "describe": Call((some, None), 10 * MANY),
        "retry": Call((some,), 20 * MANY),
        "cancel": Call((some, True), 20 * MANY),
        "runs/status": Call((some,), 20 * MANY),
        "runs/result": Call((some,), 20 * MANY),
        "runs/list": Call((LAST, MANY), 10 * MANY),
        "runs/list_named": Call((LAST, MANY, "flow"), 10 * MANY),
        "runs/list_unbegun": Call((LAST, MANY, None, MANY), 10 * MANY),
        "runs/checkpoints": Call((one, None), 10),
        "runs/children": Call((some,), 20 * MANY),
        "runs/signal": Call((one, "go", "1"), 20),
        "runs/cancel": Call((some, True), 40 * MANY),
        "runs/resume": Call((some,), 40 * MANY),
        "runs/taken_keys": Call((some,), 20 * MANY),
    }


class Sender:
    """A session that sends statements with the plans that it keeps; that of a caller in a transaction of the caller."""

    def __init__(self, db: Any) -> None:
        self._session = Session(db)
        self.is_callers = False

    async def prepare(self, calls: dict[str, Call]) -> None:
        """Plan each statement now, and for good."""
        await self._session.prepare(sorted({name.partition(" ")[0] for name in calls}))
        for name, call in calls.items():
            await self.rows_read(name, call)

    async def rows_read(self, name: str, call: Call) -> int:
        async with AsyncExitStack() as stack:
            if self.is_callers:
                await stack.enter_async_context(self._session.db.transaction())
                await stack.enter_async_context(planned_by_index(self._session.db))
            return (await self._session.explain(name.partition(" ")[0], *call.args)).rows

    async def excess(self, calls: dict[str, Call], *, more: int = 0) -> dict[str, tuple[int, int]]:
        """Run the calls, and return those that read more rows than they may, with both numbers."""
        found = {}
        for name, call in calls.items():
            rows = await self.rows_read(name, call)
            if rows > call.most + more:
                found[name] = rows, call.most + more
        return found
