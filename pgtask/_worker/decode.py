"""decode: the dispatch table of an app, and the handling of steps and tasks that the app does not have.

Invariants: a bad row never harms the rest of its batch; an unknown step never uses up a try, and is parked only with
`--unknown park`. `Table` in `_fastpath` decodes each row; the code here runs once per worker, or once per unknown name.
"""

from __future__ import annotations

from pgtask._fastpath import Table
from pgtask._log import EventLog
from pgtask.app import App

__all__ = ["PUT_BACK_DELAY", "UnknownSteps", "build_table"]

log = EventLog("pgtask.decode")

PUT_BACK_DELAY = 30.0
"""Seconds until a task with an unknown step is due again. The usual cause is a rolling deploy. A burst adds its
horizon, or it would wait for the tasks that it has just put back."""
MAX_WARNED = 1000
"""Unknown names that one worker warns of."""


def build_table(app: App) -> Table:
    """Build the dispatch table of an app."""
    return Table(app)


class UnknownSteps:
    """The rules for unknown steps and for tasks of other apps, with one warning for each name."""

    def __init__(self, *, park: bool, delay: float = PUT_BACK_DELAY) -> None:
        self._park = park
        self._delay = delay
        self._warned: set[str] = set()
        self.put_back = 0

    def delay_for(self, name: str) -> float | None:
        """Return the seconds until the next try of an unknown step, or None to park its task."""
        if self._warns_first_time(name):
            action = "parked" if self._park else f"put back for {self._delay:g} s"
            hint = "workers of another version have it, or its code is gone"
            log.warning("step.unknown", step=name[:200], action=action, hint=hint)
        if self._park:
            return None
        self.put_back += 1
        return self._delay

    def is_foreign(self, family: str) -> bool:
        """Return whether tasks of an unknown name are left to other apps. They are not if unknown steps are parked."""
        if self._park:
            return False
        if self._warns_first_time(family):
            hint = "give each app queues (--queue) or a table of its own; a task that no app has waits without end"
            log.warning("task.foreign", task=family[:200], action="left to other apps", hint=hint)
        return True

    def _warns_first_time(self, name: str) -> bool:
        """Return whether to warn of a name: once, and of a bounded number of names."""
        if name in self._warned or len(self._warned) >= MAX_WARNED:
            return False
        self._warned.add(name)
        return True
