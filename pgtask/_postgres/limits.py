"""The limits as rows: what code declares, what people change, and how they stand.

Invariants: a rule that people have changed stays as they set it until they take it back; whatever changes a limit
leaves a row of who did it, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from pgtask._postgres.actions import begin_action, note_action
from pgtask._postgres.store import statement
from pgtask.limits import Limit, Rate

__all__ = [
    "COUNTED",
    "LimitChange",
    "LimitKey",
    "LimitRow",
    "change_limit",
    "declaration",
    "read_keys",
    "read_limits",
]

COUNTED = 10_000
"""How far tasks of a limit are counted."""
MAX_KEYS, MAX_LOOKED = 50, 300  # keys of a limit that are shown, and that are looked at for that
_KEEP: Any = msgspec.UNSET


class LimitRow(msgspec.Struct, frozen=True):
    """A row of pg_task_limits, as of `seen_at`. Rates are a second. `running` and `waiting` count tasks, `paused_keys`
    the keys with a pause of their own, `open_keys` those of them that a breaker pauses; all of them only so far as
    `read_limits` says."""

    name: str
    concurrency: int | None
    rate: float | None
    burst: float | None
    cost_rate: float | None
    cost_burst: float | None
    cost_of: str | None
    failures: int | None
    pause: float | None
    is_shared: bool
    weights: str | None
    is_strict: bool
    paused_until: datetime | None
    changed: list[str]
    changed_by: str | None
    updated_at: datetime
    running: int
    waiting: int
    paused_keys: int
    open_keys: int
    seen_at: datetime

    @property
    def is_paused(self) -> bool:
        return self.paused_until is not None and self.paused_until > self.seen_at


class LimitKey(msgspec.Struct, frozen=True):
    """A key of a limit: `failures` are failed tries in a row, `next_at` is when its rate or cost is even again. In
    strict order the task `blocked_by` holds up those behind it: it `is_parked`, or waits for its retry."""

    key: str
    running: int
    waiting: int
    failures: int | None
    paused_until: datetime | None
    next_at: datetime | None
    blocked_by: UUID | None
    is_parked: bool | None


class LimitChange(msgspec.Struct, frozen=True):
    """A change of a limit at run time. What is not given stays; None lifts a rule, or ends a pause (seconds)."""

    concurrency: int | None = _KEEP
    rate: Rate | None = _KEEP
    cost: Rate | None = _KEEP
    pause: float | None = _KEEP
    resets: bool = False

    def parameters(self) -> tuple[Any, ...]:
        """Return the parameters of limits/change.sql behind the first two."""
        return (
            *_given(self.concurrency),
            *_given_rate(self.rate),
            *_given_rate(self.cost),
            *_given(self.pause),
            self.resets,
        )


def _given(value: Any) -> tuple[Any, bool]:
    return (None, False) if value is _KEEP else (value, True)


def _given_rate(rate: Rate | None) -> tuple[float | None, float | None, bool]:
    if rate is _KEEP:
        return None, None, False
    return (None, None, True) if rate is None else (rate.per_second, rate.saved, True)


async def read_limits(connection: Any, name: str | None = None, *, counted: int = COUNTED) -> list[LimitRow]:
    """Return all limits by name, or the one of that name. Tasks and keys are counted no further than `counted`."""
    return [LimitRow(*row) for row in await connection.fetch(statement("limits/list"), name, counted)]


async def read_keys(connection: Any, name: str, *, counted: int = COUNTED) -> tuple[list[LimitKey], bool]:
    """Return some keys of a limit that run, wait, pause or have failed, those that hold up most first; and whether
    there are more of them."""
    rows = await connection.fetch(statement("limits/keys"), name, MAX_KEYS, MAX_LOOKED, counted)
    return [LimitKey(*row[:-1]) for row in map(tuple, rows)], bool(rows) and rows[0][-1] > len(rows)


async def change_limit(connection: Any, name: str, change: LimitChange, what: str, by: str) -> bool:
    """Change a limit in the name of `by`; `what` says it in words. Return whether there is such a limit."""
    async with connection.transaction():
        if not await connection.fetch(statement("limits/change"), name, by, *change.parameters()):
            return False
        number = await begin_action(connection, by, "limit", what)
        await note_action(connection, number, 0, "done")
    return True


def declaration(limits: Iterable[Limit]) -> tuple[list[Any], ...]:
    """Return the parameters of limits/declare.sql."""
    return tuple(list(column) for column in zip(*map(_row, limits), strict=True))


def _row(limit: Limit) -> tuple[Any, ...]:
    rate, cost, breaker = limit.rate, limit.cost, limit.breaker
    return (
        limit.name,
        limit.concurrency,
        None if rate is None else rate.per_second,
        None if rate is None else rate.saved,
        None if cost is None else cost.per_second,
        None if cost is None else cost.saved,
        None if cost is None else cost.of,
        None if breaker is None else breaker.failures,
        None if breaker is None else breaker.pause.total_seconds(),
        bool(limit.share),
        None if isinstance(limit.share, bool) else msgspec.json.encode(dict(limit.share)).decode(),
        limit.order == "strict",
    )
