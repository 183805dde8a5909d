"""Health: whether a fleet lives, and whether it is ready, from its pages.

Liveness is the progress of the supervisor alone, since a restart of the fleet helps neither the database nor a slow
step; the supervisor replaces its workers by itself.
"""

from __future__ import annotations

from pgtask._observe.pages import Snapshot, WorkerState

__all__ = ["find_dead", "find_unready"]

MAX_SILENCE = 10.0  # seconds without a turn of the supervisor's loop, which has one each second


def find_dead(snapshot: Snapshot, now: float) -> dict[str, str]:
    """Return what says that the supervisor makes no progress `now` (monotonic seconds), by check."""
    silence = now - snapshot.heard
    return {"supervisor": f"silent for {silence:.1f} s"} if silence > MAX_SILENCE else {}


def find_unready(snapshot: Snapshot, now: float, database: str | None) -> dict[str, str]:
    """Return why the fleet cannot take tasks, by check; `database` is the reason why that does not answer."""
    failures = find_dead(snapshot, now)
    if database is not None:
        failures["database"] = database
    if snapshot.is_stopping:
        failures["supervisor"] = "it stops"
    ready = [worker for worker in snapshot.workers if worker.is_ready]
    if not ready:
        failures["workers"] = f"none of {snapshot.wanted} is ready"
    return failures | _find_failing(ready)


def _find_failing(workers: list[WorkerState]) -> dict[str, str]:
    checks = {
        "connection": ("is_connected", "has no connection to claim with"),
        "listen": ("is_listening", "does not listen"),
        "renewal": ("is_renewing", "cannot renew its leases"),
    }
    failures = {}
    for check, (name, words) in checks.items():
        if failing := [worker.number for worker in workers if not getattr(worker, name)]:
            failures[check] = f"worker {failing[0]} {words}" + (f", and {len(failing) - 1} more" if failing[1:] else "")
    return failures
