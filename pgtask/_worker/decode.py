"""decode: from the envelope in a row to the step it holds, and what to do with a step that this app does not have.

Invariants: one bad row never harms the rest of its batch; an unknown step is never burnt unless the operator said so.
The work on each row is `Table` in `_fastpath`; here is what is done once per worker, or once per unknown name.
"""

from __future__ import annotations

import logging

from pgtask._events import log_event
from pgtask._fastpath import Table
from pgtask.app import App

__all__ = ["PUT_BACK_DELAY", "UnknownSteps", "table_of"]

log = logging.getLogger("pgtask.decode")

PUT_BACK_DELAY = 30.0
"""Seconds after which a task with an unknown step is looked at again; a rolling deploy is the usual cause. A burst
adds its horizon, or it would wait for what it has just put back."""


def table_of(app: App) -> Table:
    """The dispatch table of an app."""
    return Table(app)


class UnknownSteps:
    """Decides on unknown steps, and warns once for each name."""

    def __init__(self, *, park: bool, delay: float = PUT_BACK_DELAY) -> None:
        self._park = park
        self._delay = delay
        self._warned: set[str] = set()
        self.put_back = 0

    def delay(self, name: str) -> float | None:
        """Seconds after which to try again, or None to park the task."""
        if name not in self._warned and len(self._warned) < 1000:
            self._warned.add(name)
            action = "parked" if self._park else f"put back for {self._delay:g} s"
            log_event(log, logging.WARNING, "step.unknown", step=name[:200], action=action)
        if self._park:
            return None
        self.put_back += 1
        return self._delay
