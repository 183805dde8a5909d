"""The bound of delays.

Invariant: the present plus a delay that passes here is a time, in Python and in Postgres.
"""

from __future__ import annotations

from datetime import timedelta

__all__ = ["MAX_DELAY", "check_delay"]

MAX_DELAY = timedelta(days=365_000)


def check_delay(delay: object, what: str = "delay {!r} must be") -> timedelta:
    """Return `delay` if it is a timedelta within the bound. Raises `ValueError`: `what`, with the value in it, then the
    rule."""
    if not isinstance(delay, timedelta) or delay < timedelta(0):
        raise ValueError(f"{what.format(delay)} a timedelta, zero or more")
    if delay > MAX_DELAY:
        raise ValueError(f"{what.format(delay)} a timedelta, zero or more, at most {MAX_DELAY.days} days")
    return delay
