"""The tokens of leases: which worker has claimed the tasks, and when by its clock.

Invariant: no two tokens are equal: a worker process has 8 bytes of its own, and each of its tokens another time.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

__all__ = ["claimed_at", "lease_token"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_last = 0


def lease_token(worker: bytes) -> UUID:
    """Make the token of a claim: the 8 bytes of the worker, then the time in microseconds, which always increases."""
    global _last
    _last = max(time.time_ns() // 1000, _last + 1)
    return UUID(bytes=worker + _last.to_bytes(8, "big"))


def claimed_at(token: UUID, *, after: datetime, before: datetime) -> datetime | None:
    """Return the time of a claim by its token. None unless it lies between these times, give or take a minute: then no
    worker has made it."""
    try:
        at = _EPOCH + timedelta(microseconds=token.int & ((1 << 64) - 1))
    except OverflowError:
        return None
    slack = timedelta(minutes=1)
    return at if after - slack <= at <= before + slack else None
