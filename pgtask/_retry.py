"""The decision about a failed try: repeat it, and after how long. For the steps of tasks and of workflows alike.

Invariants: only the exception that the step raised counts, not its causes; `Throttled` never costs a try.
"""

from __future__ import annotations

from datetime import timedelta

from pgtask._delays import MAX_DELAY
from pgtask.policy import Policy
from pgtask.workflow import Permanent, Throttled, Transient

__all__ = ["seconds_before_retry", "throttled_seconds"]


def throttled_seconds(error: BaseException) -> float | None:
    """Return the seconds for which a step that has raised `Throttled` is put off, at no cost; None for other errors.
    Ask this first: `seconds_before_retry` is about errors that cost a try."""
    if not isinstance(error, Throttled):
        return None
    requested = _requested_delay(error)
    return _bounded(Throttled.retry_after.total_seconds() if requested is None else requested)


def seconds_before_retry(policy: Policy, error: BaseException, tried: int) -> float | None:
    """Return the seconds to wait before the next try, or None if the last try was the final one. `tried` tries (1 or
    more) have failed, the last one with `error`."""
    if isinstance(error, Permanent) or tried > policy.retry_limit:
        return None
    requested = _requested_delay(error) if isinstance(error, Transient) else None
    return _bounded(policy.delay_before_retry(tried) if requested is None else requested)


def _bounded(delay: float) -> float:
    return min(max(delay, 0.0), MAX_DELAY.total_seconds())


def _requested_delay(error: Transient | Throttled) -> float | None:
    """Return the seconds of `retry_after`, or None. A subclass may set it without the check that its class makes, so a
    value that is not a timedelta counts as none."""
    try:
        after = error.retry_after
        return after.total_seconds() if isinstance(after, timedelta) else None
    except Exception:
        return None
