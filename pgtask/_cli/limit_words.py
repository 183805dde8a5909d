"""What a limit and its keys say, in words: for the command, and for the pages of the console."""

from __future__ import annotations

import msgspec

from pgtask._cli.quantities import format_elapsed, format_rate, relative_time
from pgtask._postgres.limits import LimitKey, LimitRow

__all__ = ["breaker_words", "cost_words", "key_words", "order_words", "rate_words", "state_words"]

MAX_WEIGHTS = 3  # that are named


def rate_words(one: LimitRow) -> str:
    """Return the rate, and what an idle key saves up if that is more than one start: `10/s, burst 5`."""
    if one.rate is None:
        return "-"
    return format_rate(one.rate) + (f", burst {one.burst:.4g}" if one.burst is not None and one.burst > 1 else "")


def cost_words(one: LimitRow) -> str:
    """Return the cost with the field that says it: `1,000 tokens/s, burst 100`."""
    if one.cost_rate is None:
        return "-"
    burst = "" if one.cost_burst is None else f", burst {one.cost_burst:,.4g}"
    number, slash, time = format_rate(one.cost_rate).partition("/")
    of = one.cost_of or "units"
    return f"{number} {of}/{time}{burst}" if slash else f"{number} ({of}){burst}"


def breaker_words(one: LimitRow) -> str:
    """Return when a key pauses, and for how long."""
    if one.failures is None or one.pause is None:
        return "-"
    return f"{one.failures:,} failed: {format_elapsed(one.pause)}"


def order_words(one: LimitRow) -> str:
    """Return in what order keys and their tasks start."""
    words = ["strict order"] if one.is_strict else []
    if one.is_shared:
        weights = {} if one.weights is None else msgspec.json.decode(one.weights, type=dict[str, float])
        named = ", ".join(f"{key} {weight:g}" for key, weight in list(weights.items())[:MAX_WEIGHTS])
        more = ", ..." if len(weights) > MAX_WEIGHTS else ""
        words.append(f"take turns ({named}{more})" if named else "take turns")
    return "; ".join(words) or "-"


def state_words(one: LimitRow) -> str:
    """Return what holds a limit up, and what people have changed."""
    words = []
    if one.paused_until is not None and one.is_paused:
        words.append(f"paused, on {relative_time(one.paused_until, one.seen_at)}")
    if one.concurrency == 0:
        words.append("stopped")
    if one.open_keys:
        words.append(f"{one.open_keys:,} with an open breaker")
    if one.paused_keys > one.open_keys:
        words.append(f"{one.paused_keys - one.open_keys:,} throttled")
    if one.changed:
        words.append(f"{', '.join(one.changed)} changed by {one.changed_by}")
    elif one.is_paused and one.changed_by:
        words.append(f"by {one.changed_by}")
    return "; ".join(words) or "-"


def key_words(limit: LimitRow, one: LimitKey) -> str:
    """Return what holds a key up."""
    is_open = limit.failures is not None and (one.failures or 0) >= limit.failures
    if one.paused_until is not None:
        return "breaker open" if is_open else "throttled"
    if one.blocked_by is not None:
        return "behind a parked task" if one.is_parked else "behind a retry"
    return "probes" if is_open else "-"
