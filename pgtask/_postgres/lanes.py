"""lanes: the parameters of the statement that finds the lanes, lanes.sql."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["lane_parameters"]

Known = tuple[str, int, float]


def lane_parameters(
    queues: Sequence[str] | None,
    *,
    oldest: float = float("inf"),
    youngest: float = float("-inf"),
    known: Sequence[Known] = (),
    age: float = 0.0,
) -> tuple[Any, ...]:
    """Return the parameters of a search of `queues` (None: all) for lanes with tasks that fell due from `oldest` to
    `youngest` seconds ago, by default at any time; and of the `known` lanes (queue, priority, floor), each from its
    floor on, or from `age` seconds ago if that is earlier."""
    names, priorities, floors = ([lane[at] for lane in known] for at in range(3))
    return oldest, youngest, None if queues is None else list(queues), names, priorities, floors, age
