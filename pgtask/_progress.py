"""The progress of a step, as it reports it: so much of so much.

Invariant: the numbers can be shown: whole, not negative, and no more is done than there is.
"""

from __future__ import annotations

import msgspec

__all__ = ["Progress"]

MAX_COUNT = 2**63 - 1


class Progress(msgspec.Struct, frozen=True):
    """What a step has done, of a total that it may not know. Raises `ValueError` naming the argument."""

    done: int
    total: int | None = None

    def __post_init__(self) -> None:
        _check_count("done", self.done)
        if self.total is not None:
            _check_count("total", self.total)
            if self.total < self.done:
                raise ValueError(f"ctx.progress(total={self.total}) must be {self.done}, as done is, or more; or None")

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.done:,}"
        percent = f" ({100 * self.done // self.total}%)" if self.total else ""
        return f"{self.done:,} of {self.total:,}{percent}"


def _check_count(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
        raise ValueError(f"ctx.progress({name}={count!r:.80}) must be a whole number, from 0 to {MAX_COUNT}")
