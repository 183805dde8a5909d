"""Exponential backoff: delays that double from an initial one to a maximum.

Invariants: no delay exceeds the maximum; the arithmetic does not overflow, however many tries have failed.
"""

from __future__ import annotations

__all__ = ["Backoff", "exponential_delay"]

MAX_EXPONENT = 900  # 2.0 ** 1024 overflows; long before that, a delay has met its maximum


def exponential_delay(initial: float, maximum: float, tries: int) -> float:
    """Return the delay after `tries` (1 or more) have failed: `initial`, doubled for each further one."""
    return min(initial * 2.0 ** min(tries - 1, MAX_EXPONENT), maximum)


class Backoff:
    """A delay in seconds that doubles from `initial` to `maximum` each time it is taken."""

    __slots__ = ("_tries", "initial", "maximum")

    def __init__(self, initial: float, maximum: float) -> None:
        self.initial, self.maximum = initial, maximum
        self._tries = 0

    @property
    def is_reset(self) -> bool:
        """Return whether no delay was taken since the last reset."""
        return not self._tries

    def next(self) -> float:
        """Return the delay, and double the next one."""
        self._tries += 1
        return exponential_delay(self.initial, self.maximum, self._tries)

    def reset(self) -> None:
        """Begin at `initial` again."""
        self._tries = 0
