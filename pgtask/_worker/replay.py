"""What a replayed workflow asks for, held against what its run has recorded.

Invariants: a checkpoint is given to who asks for it at its place, by its kind and name, or there is a `ReplayError`
that names both sides; a name of a step, sleep or spawn is asked for once in a run. Nothing here awaits.

A *place* is where in the workflow something is asked for: `3` is the third thing, `3.0.2` the second thing in the first
branch of a gather that is the third thing. It does not depend on which branch was faster.
"""

from __future__ import annotations

from pgtask._worker.entries import Checkpoint
from pgtask.errors import ReplayError

__all__ = ["Branch", "Replay"]

_ANY_NUMBER = ("signal", "value", "children")  # kinds that may be asked for under one name again and again


class Branch:
    """A strand of a workflow in which things are asked for one after the other.

    `place` is that of the last of them; `step` is the name of the step that is being called, if one is.
    """

    __slots__ = ("_asked", "_errors", "_failures", "_prefix", "place", "step")

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._asked = 0
        self._errors: list[BaseException] = []
        self._failures: list[int] = []
        self.place = ""
        self.step: str | None = None

    def next_place(self) -> str:
        self._asked += 1
        self.place = f"{self._prefix}{self._asked}"
        if self._errors:
            self._errors, self._failures = [], []
        return self.place

    def fail(self, errors: list[BaseException], failures: list[int]) -> None:
        """What was asked for last has these errors, which follow from the checkpoints of these numbers."""
        self._errors, self._failures = errors, failures

    def failures_behind(self, error: BaseException) -> list[int]:
        """The numbers of the checkpoints that an error which leaves the branch follows from, as long as nothing was
        asked for since: after that they are part of what has happened."""
        return self._failures if any(one is error for one in self._errors) else []


class Replay:
    """The journal of one run, by place."""

    def __init__(self, checkpoints: list[Checkpoint]) -> None:
        self._by_place = {checkpoint.place: checkpoint for checkpoint in checkpoints}
        self._place_of = {(c.kind, c.name): c.place for c in checkpoints if c.kind not in _ANY_NUMBER}
        self._left = dict(self._by_place)
        self._asked: set[tuple[str, str]] = set()
        self._last = max((checkpoint.number for checkpoint in checkpoints), default=0)

    def next_number(self) -> int:
        """The number of a new checkpoint."""
        self._last += 1
        return self._last

    def find(self, place: str, kind: str, name: str) -> Checkpoint | None:
        """What is recorded at a place, None if nothing is. Raises `ReplayError`."""
        if kind not in _ANY_NUMBER:
            if (kind, name) in self._asked:
                raise ReplayError(
                    f"{kind} {name!r} is asked for twice in one run; give each a name of its own, "
                    f"as in f'{name}/{{item}}'"
                )
            self._asked.add((kind, name))
        found = self._by_place.get(place)
        if found is None:
            elsewhere = self._place_of.get((kind, name)) if self._place_of else None
            if elsewhere is not None:
                raise ReplayError(
                    f"the workflow asks for {kind} {name!r} at place {place}, and the journal has it at {elsewhere}; "
                    "its order has changed: raise the version of the workflow"
                )
            return None
        if (found.kind, found.name) != (kind, name):
            raise ReplayError(
                f"the workflow asks for {kind} {name!r} at place {place}, where the journal has {found.kind} "
                f"{found.name!r}; its code has changed: raise the version of the workflow"
            )
        self._left.pop(place, None)
        return found

    def check_end(self) -> None:
        """The workflow has returned: raises `ReplayError` for what was recorded and not asked for."""
        for checkpoint in self._left.values():
            raise ReplayError(
                f"the workflow ends without {checkpoint.kind} {checkpoint.name!r}, which the journal has at place "
                f"{checkpoint.place}; its code has changed: raise the version of the workflow"
            )
