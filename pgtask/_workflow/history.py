"""The history of one run: the calls of a replayed workflow matched against the checkpoints of its journal.

Invariants: a checkpoint is given to the call at its place, by its kind and name, or a `ReplayError` names both sides; a
name of a step, sleep or spawn is used once in a run. Nothing here awaits.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pgtask._workflow.values import Checkpoint, History
from pgtask.errors import ReplayError

__all__ = ["REMEDY", "RunHistory"]

REMEDY = (
    "raise the version of the workflow; if it has not, it depends on what differs in each replay: "
    "use ctx.random(), ctx.uuid() and ctx.now() for chance and time, and a step for what it reads"
)
"""The advice in an error of a replay that does not match its history."""

_REPEATABLE = ("signal", "value", "children")  # kinds of which a name may be used again and again


class RunHistory:
    """The checkpoints of one run by place, and the numbers of those that it will record.

    `version` is the version of the workflow under which the run began; `failed_before` counts the failed tries outside
    of steps since the run last got a result (those of a step are in its checkpoint).
    """

    def __init__(self, history: History, *, newest: int, failed_before: int) -> None:
        checkpoints = history.checkpoints
        self.version = newest if history.version is None else history.version
        self.failed_before = failed_before
        self._unsaid_version = self.version if history.version is None else None
        self._by_place = {checkpoint.place: checkpoint for checkpoint in checkpoints}
        self._place_of = {(c.kind, c.name): c.place for c in checkpoints if c.kind not in _REPEATABLE}
        self._left = dict(self._by_place)
        self._used: set[tuple[str, str]] = set()
        self._last = max((checkpoint.number for checkpoint in checkpoints), default=0)

    def look_up(self, place: str, kind: str, name: str) -> Checkpoint | None:
        """Return the checkpoint at a place, None if there is none. Raises `ReplayError`."""
        if kind not in _REPEATABLE:
            if (kind, name) in self._used:
                raise ReplayError(
                    f"{kind} {name!r} is asked for twice in one run; give each a name of its own, "
                    f"as in f'{name}/{{item}}'"
                )
            self._used.add((kind, name))
        found = self._by_place.get(place)
        if found is None:
            elsewhere = self._place_of.get((kind, name)) if self._place_of else None
            if elsewhere is not None:
                raise ReplayError(
                    f"the workflow asks for {kind} {name!r} at place {place}, and the journal has it at {elsewhere}; "
                    f"its order has changed: {REMEDY}"
                )
            return None
        if (found.kind, found.name) != (kind, name):
            raise ReplayError(
                f"the workflow asks for {kind} {name!r} at place {place}, where the journal has {found.kind} "
                f"{found.name!r}; its code has changed: {REMEDY}"
            )
        self._left.pop(place, None)
        return found

    def check_end(self) -> None:
        """Raise `ReplayError` if the workflow, which has returned, has not reached a checkpoint."""
        for checkpoint in self._left.values():
            raise ReplayError(
                f"the workflow ends without {checkpoint.kind} {checkpoint.name!r}, which the journal has at place "
                f"{checkpoint.place}; its code has changed: {REMEDY}"
            )

    @property
    def unreached(self) -> Sequence[Checkpoint]:
        """The checkpoints that no call has asked for."""
        return list(self._left.values())

    # --- recording

    def number(
        self,
        place: str,
        kind: str,
        name: str,
        result: str | None = None,
        *,
        due_at: datetime | None = None,
        seconds: float = 0.0,
    ) -> Checkpoint:
        """Make a checkpoint that has the next number."""
        self._last += 1
        return Checkpoint(self._last, place, kind, name, result, None, due_at, 0, seconds)

    def take_version(self) -> int | None:
        """Return the version for the first entry of the run, which tells the journal; None for later entries."""
        version, self._unsaid_version = self._unsaid_version, None
        return version
