"""What would break, folded by its cause.

Invariant: the memory is bounded, with any number of rows: a cause keeps one example, and the number of causes has a
limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal
from uuid import UUID

import msgspec

from pgtask._check.remedies import OTHER_CAUSES

__all__ = ["Break", "Cause", "Causes", "Kind"]

Kind = Literal[
    "unknown", "payload", "envelope", "size", "version", "input", "replay", "result", "raises", "unchecked", "other"
]
"""The way in which a task breaks:

- `unknown`: no app has its task or step. `payload`, `envelope`, `size`: a worker cannot decode its step.
- `version`: no function is of the version of the run. `input`, `result`: a workflow cannot decode its input, or the
  recorded result of a step. `replay`: it asks for other things than the run has recorded. `raises`: its code raises.
- `unchecked`: its code needs more than a check has, so that only a worker can tell.
- `other`: there are too many causes to tell them apart.
"""

MAX_CAUSES = 200
MAX_RECENT = 10_000
_VARIES = re.compile(r"\b[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}\b|\d+")  # ids and numbers
_VALUE = re.compile(r"(Invalid (?:enum value|literal)[^'\"]*)(?:'.*?'|\".*?\")")


class Break(msgspec.Struct, frozen=True):
    """The reason why one task breaks: `error` is what a worker would leave in the row, without its advice. `remedy`
    returns the advice."""

    kind: Kind
    what: str
    error: str
    remedy: Callable[[], str]


class Cause(msgspec.Struct):
    """A reason why tasks break, with the break of an example.

    `count` of them; `parked` of these are parked, and `known` are parked for this very reason: they are broken
    already, and no new break."""

    kind: Kind
    what: str
    error: str
    remedy: str
    example: UUID
    count: int = 0
    parked: int = 0
    known: int = 0

    @property
    def is_new(self) -> bool:
        return self.count > self.known


class Causes:
    """All causes that a check has found."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str, str], Cause] = {}
        self._recent: dict[tuple[str, str, str], Cause] = {}  # by the whole text

    def add(self, broken: Break, task: UUID, parked_for: str | None) -> None:
        """Count a task that breaks; `parked_for` is the error of a parked one."""
        whole = (broken.kind, broken.what, broken.error)
        cause = self._recent.get(whole)
        if cause is None:
            if len(self._recent) >= MAX_RECENT:
                self._recent.clear()
            cause = self._recent[whole] = self._find(broken, task)
        cause.count += 1
        if parked_for is not None:
            cause.parked += 1
            cause.known += _fold(_first_line(broken.error)) in _fold(_first_line(parked_for))

    def _find(self, broken: Break, task: UUID) -> Cause:
        """Return the cause of a break, a new one with this task as its example."""
        key = (broken.kind, _fold(broken.what), _fold(broken.error))
        if key not in self._by_key and len(self._by_key) >= MAX_CAUSES:
            broken = Break("other", "", f"more than {MAX_CAUSES} causes", lambda: OTHER_CAUSES)
            key = (broken.kind, "", "")
        cause = self._by_key.get(key)
        if cause is None:
            cause = self._by_key[key] = Cause(broken.kind, broken.what, broken.error, broken.remedy(), task)
        return cause

    def found(self) -> list[Cause]:
        """Return the causes, those of most tasks first."""
        return sorted(self._by_key.values(), key=lambda one: (not one.is_new, -one.count, one.what))


def _fold(text: str) -> str:
    """Return a text without what differs from task to task: ids, numbers, refused values."""
    return _VARIES.sub("#", _VALUE.sub(r"\1#", text))


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
