"""The ids of occurrences: the id of a task says which schedule has made it, and for which time.

Theory of operation. An occurrence is a name and a time, so its task has an id that is made of both: a UUID of version 7
with the milliseconds of that time, a mark, and a hash of the name. Inserting it twice conflicts in the primary key, and
the time is read off the id: no column, and no statement. The ids that `first_id` makes never have the first bit of the
mark. The 12 bits in between are 0: they will name the database of a task.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from uuid import UUID

__all__ = ["EPOCH", "occurrence_id", "scheduled_time"]

MARK, MARK_BITS = 0b10_1100_0101_1010_0111, 18
HASH_BITS = 62 - MARK_BITS
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)


def occurrence_id(name: str, time: datetime) -> UUID:
    """Return the id of the task of a schedule for a time, of which the whole seconds count."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    seconds = (time - EPOCH) // _SECOND
    return UUID(
        int=seconds * 1000 << 80
        | 0x7 << 76
        | 0b10 << 62
        | MARK << HASH_BITS
        | int.from_bytes(digest, "big") & ((1 << HASH_BITS) - 1)
    )


def scheduled_time(id: UUID) -> datetime | None:
    """Return the time for which a schedule has made the task with this id; None for the id of another task."""
    number = id.int
    if number >> HASH_BITS & ((1 << 20) - 1) != 0b10 << MARK_BITS | MARK or number >> 76 & 0xF != 0x7:
        return None
    seconds, rest = divmod(number >> 80, 1000)
    return None if rest else EPOCH + timedelta(seconds=seconds)
