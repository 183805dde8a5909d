"""The statistics of `pgtask stats`: bounded counts per lane, the size of the table, and its oldest transaction.

Invariant: the cost does not grow with the table. No number is counted further than `COUNT_LIMIT`, and with many lanes
less far, so that a report reads about a million index entries at most.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.pauses import Pause, read_pauses
from pgtask._postgres.store import statement
from pgtask._postgres.tasks import plain_values, transaction

__all__ = ["COUNT_LIMIT", "LaneCount", "OpenTransaction", "Statistics", "gather_statistics"]

COUNT_LIMIT = 100_000
_TOTAL_LIMIT = 1_000_000
_MIN_LIMIT = 1_000


class LaneCount(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks of one lane, a queue and a priority: how many are `ready`, `scheduled`, `leased` and `parked`, and how
    many leases have expired. `at_least` names the numbers that were not counted to their end. `oldest_due` is the time
    at which the first ready task fell due, `next_due` that of the first scheduled one."""

    queue: str
    priority: int
    ready: int = 0
    scheduled: int = 0
    leased: int = 0
    parked: int = 0
    expired_leases: int = 0
    at_least: tuple[str, ...] = ()
    oldest_due: datetime | None = None
    next_due: datetime | None = None


class OpenTransaction(msgspec.Struct, frozen=True, kw_only=True):
    """The oldest open transaction of the database, which keeps vacuum from removing dead rows. `pid` is None if it is a
    prepared one."""

    pid: int | None
    name: str
    state: str | None
    began_at: datetime


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics as of `seen_at`, by the clock of the server. `rows` is the planner's estimate, None before the
    first vacuum; `vacuumed_at` is None if there was none."""

    lanes: tuple[LaneCount, ...]
    rows: int | None
    dead_rows: int
    table_bytes: int
    index_bytes: int
    vacuumed_at: datetime | None
    oldest_transaction: OpenTransaction | None
    seen_at: datetime
    pauses: tuple[Pause, ...] = ()


async def gather_statistics(connection: Any) -> Statistics:
    """Read all statistics in one snapshot."""
    async with transaction(connection, readonly=True):
        lanes = await _count_lanes(connection)
        pauses = tuple(await read_pauses(connection))
        size = await connection.fetchrow(statement("table_size"))
        holder = await connection.fetchrow(statement("oldest_transaction"))
    oldest = None if holder is None else OpenTransaction(**plain_values(holder))
    return Statistics(lanes=lanes, pauses=pauses, oldest_transaction=oldest, **plain_values(size))


async def _count_lanes(connection: Any) -> tuple[LaneCount, ...]:
    found = await connection.fetch(statement("lanes"), *lane_parameters(None))
    lanes = [(queue, priority) for queue, priority, *_ in found if queue is not None]
    limit = max(_MIN_LIMIT, min(COUNT_LIMIT, _TOTAL_LIMIT // max(1, len(lanes))))
    queues, priorities = [queue for queue, _ in lanes], [priority for _, priority in lanes]
    waiting = await connection.fetch(statement("count_lanes"), queues, priorities, limit)
    counts: dict[tuple[str, int], dict[str, Any]] = {
        (row["queue"], row["priority"]): {**plain_values(row), "at_least": []} for row in waiting
    }
    for count in counts.values():
        count["at_least"] += [name for name in ("ready", "scheduled") if count[name] == limit]
    held = await connection.fetch(statement("count_held"), COUNT_LIMIT)
    for row in held:
        lane = {"queue": row["queue"], "priority": row["priority"]}
        count = counts.setdefault((row["queue"], row["priority"]), {**lane, "at_least": []})
        count |= {"leased": row["leased"], "parked": row["parked"], "expired_leases": row["expired"]}
    for name in ("leased", "parked"):
        if sum(row[name] for row in held) == COUNT_LIMIT:
            for count in counts.values():
                count["at_least"].append(name)
    lanes_counted = [LaneCount(**{**count, "at_least": tuple(count["at_least"])}) for count in counts.values()]
    return tuple(sorted(lanes_counted, key=lambda count: (count.queue, -count.priority)))
