"""portions: items for one statement, which get fewer at a time while the server cancels that as too slow.

Invariant: an item that is too slow alone is named, once, and holds up the others for a few statements only: the parts
of a portion that was too slow go behind all others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from pgtask.errors import StatementTimeout

__all__ = ["Portions"]

ItemT = TypeVar("ItemT")

PARTS = 10  # of a portion that was too slow


class Portions(Generic[ItemT]):
    """Items that are still to be sent; all at once at first."""

    def __init__(self, items: Sequence[ItemT] = ()) -> None:
        self._waiting = deque([items] if items else [])

    def __bool__(self) -> bool:
        return bool(self._waiting)

    async def send_next(self, send: Callable[[Sequence[ItemT]], Awaitable[None]]) -> ItemT | None:
        """Send the next portion; return its only item if that alone is too slow.

        Raises the errors of `send` but `StatementTimeout`; then the portion is not sent again."""
        portion = self._waiting.popleft()
        try:
            await send(portion)
        except StatementTimeout:
            if len(portion) == 1:
                return portion[0]
            self._waiting.extend(portion[part::PARTS] for part in range(min(PARTS, len(portion))))
        return None
