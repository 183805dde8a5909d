"""The limits as rows: what code declares, what people change, and how it stands.

Invariant: a column that people have changed stays as they set it until they reset it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from pgtask.limits import Limit

__all__ = ["declaration"]


def declaration(limits: Iterable[Limit]) -> tuple[list[Any], ...]:
    """Return the parameters of declare_limits.sql."""
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
