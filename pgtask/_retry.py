"""The decision about a failed try: repeat it, and after how long. For the steps of tasks and of workflows alike.

Invariant: only the exception that the step raised counts, not its causes.
"""

from __future__ import annotations

from datetime import timedelta

from pgtask._delays import MAX_DELAY
from pgtask.policy import Policy
from pgtask.workflow import Permanent, Transient

__all__ = ["seconds_before_retry"]


def seconds_before_retry(policy: Policy, error: BaseException, tried: int) -> float | None:
    """Return the seconds to wait before the next try, or None if the last try was the final one. `tried` tries (1 or
    more) have failed, the last one with `error`."""
    if isinstance(error, Permanent) or tried > policy.retry_limit:
        return None
    requested = _requested_delay(error) if isinstance(error, Transient) else None
    delay = policy.delay_before_retry(tried) if requested is None else requested
    return min(max(delay, 0.0), MAX_DELAY.total_seconds())


def _requested_delay(error: Transient) -> float | None:
    """Return the seconds of `retry_after`, or None. A subclass may set it without the check that `Transient` makes, so
    a value that is not a timedelta counts as none."""
    try:
        after = error.retry_after
        return after.total_seconds() if isinstance(after, timedelta) else None
    except Exception:
        return None
