"""An outage of the database, as all workers report it: a repeated log line, once for all of them.

Invariant: one line at a time, however many workers wait; the pauses between the lines double up to a minute.
"""

from __future__ import annotations

from pgtask._log import EventLog

__all__ = ["Outage"]

log = EventLog("pgtask.supervisor")

INITIAL_PAUSE = 5.0  # seconds from the start of the outage to the first line; each worker logs its own line before
MAX_PAUSE = 60.0


class Outage:
    """The last report of each worker, by its pid, about its database."""

    def __init__(self) -> None:
        self._errors: dict[int, str] = {}
        self._since = 0.0
        self._next_line = 0.0

    @property
    def next_line(self) -> float | None:
        """The time of the next line (monotonic seconds); None while no worker waits."""
        return self._next_line if self._errors else None

    def report(self, pid: int, error: str | None, now: float) -> None:
        """Note that a worker waits for the database because of `error`; None: it does not wait, or is gone."""
        if error is None:
            self._errors.pop(pid, None)
            return
        if not self._errors:
            self._since, self._next_line = now, now + INITIAL_PAUSE
        self._errors[pid] = error

    def log_if_due(self, now: float, *, hint: str) -> None:
        if not self._errors or now < self._next_line:
            return
        seconds = now - self._since
        self._next_line = now + min(seconds, MAX_PAUSE)
        error = next(iter(self._errors.values()))
        workers = len(self._errors)
        log.warning("database.waiting", seconds=round(seconds), workers=workers, error=error, hint=hint)
