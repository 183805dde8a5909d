"""How a person names a task: by its id, or by as many of its first digits as no other task has.

Invariant: a name stands for one task or for none; where it fits several, they are listed and none is taken.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec

from pgtask._postgres.tasks import find_ids
from pgtask.errors import ConfigError

__all__ = ["NO_SUCH_TASK", "TaskName"]

SHORTEST_PREFIX = 8
NO_SUCH_TASK = "there is no such task: it is finished, was cancelled or never was"


class TaskName(msgspec.Struct, frozen=True):
    """What was typed, and the ids it may stand for: from `first` to `last`."""

    text: str
    first: UUID
    last: UUID

    @classmethod
    def parse(cls, text: str) -> TaskName:
        """Raises `ConfigError` for what cannot name a task."""
        digits = text.replace("-", "").lower()
        try:
            if not SHORTEST_PREFIX <= len(digits) <= 32:
                raise ValueError
            return cls(text, UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f")))
        except ValueError:
            raise ConfigError(f"{text} is not an id, nor the first {SHORTEST_PREFIX} or more digits of one") from None

    async def find(self, connection: Any) -> UUID | str:
        """The id of the task, whether or not it is there if all digits were given; or why it cannot be said."""
        if self.first == self.last:
            return self.first
        ids = await find_ids(connection, self.first, self.last, limit=4)
        if len(ids) > 1:
            return f"more than one task begins so: {', '.join(map(str, ids[:3]))}{', ...' if len(ids) > 3 else ''}"
        return UUID(int=ids[0].int) if ids else NO_SUCH_TASK
