"""The state machine as a drawing: places of the steps in columns, and the lines between them.

Invariant: a column holds the steps that the same number of edges, and no fewer, leads to from a beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pgtask.app import App, StepDefinition
from pgtask.task import Task

__all__ = ["BOX_HEIGHT", "BOX_WIDTH", "MachineBox", "MachineChart", "MachineLine", "draw_machines", "find_beginnings"]

BOX_WIDTH, BOX_HEIGHT = 225, 58
_GAP_X, _GAP_Y, _MARGIN_LEFT, _MARGIN_RIGHT = 104, 44, 44, 70
_MARGIN, _BOW = 12, 46  # above and below the boxes; for bows above them


class MachineBox(msgspec.Struct, frozen=True):
    """A step at its place. `ends` says that it may be done, `fails` that it may be parked by its own answer."""

    task: str
    step: str
    queue: str
    x: int
    y: int
    starts: bool
    ends: bool
    fails: bool


class MachineLine(msgspec.Struct, frozen=True):
    """An edge from a step to the `next` one: its path in the language of SVG, and the place of its numbers: of the
    first line, of which `anchor` is the middle or an end, and how far below it the second one is."""

    step: str
    next: str
    path: str
    x: int
    y: int
    anchor: str
    below: int


class MachineChart(msgspec.Struct, frozen=True):
    """The drawing of one task: boxes and lines."""

    name: str
    kind: str
    boxes: list[MachineBox]
    lines: list[MachineLine]
    width: int
    height: int


def draw_machines(app: App) -> list[MachineChart]:
    """Return a drawing of each task of the app, in its order."""
    charts = []
    for task in app.tasks:
        kind = "workflow" if task in app.workflows else "function" if task in app.functions else "task"
        charts.append(_draw(task, kind, [definition for definition in app if definition.task == task]))
    return charts


def _draw(task: str, kind: str, steps: Sequence[StepDefinition]) -> MachineChart:
    starts = find_beginnings(steps)
    places: dict[type[Task], tuple[int, int]] = {}
    columns = _rank(steps, starts)
    top = _MARGIN + (_BOW if _has_bows(steps, columns) else 0)
    for column, members in enumerate(columns):
        for row, cls in enumerate(members):
            places[cls] = (_MARGIN_LEFT + column * (BOX_WIDTH + _GAP_X), top + row * (BOX_HEIGHT + _GAP_Y))
    boxes = [
        MachineBox(one.task, one.name, one.policy.queue, *places[one.cls], one.cls in starts, one.finishes, one.fails)
        for one in steps
    ]
    names = {one.cls: one.name for one in steps}
    lines = [
        MachineLine(one.name, names[end], *_line(places[one.cls], places[end])) for one in steps for end in one.edges
    ]
    rows = max(map(len, columns), default=1)
    width = _MARGIN_LEFT + _MARGIN_RIGHT + len(columns) * BOX_WIDTH + (len(columns) - 1) * _GAP_X
    height = top + rows * BOX_HEIGHT + (rows - 1) * _GAP_Y + _MARGIN
    return MachineChart(task, kind, boxes, lines, width, height)


def _has_bows(steps: Sequence[StepDefinition], columns: Sequence[Sequence[type[Task]]]) -> bool:
    """Return whether an edge leads back, or to its own step."""
    at = {cls: column for column, members in enumerate(columns) for cls in members}
    return any(at[end] < at[one.cls] or end is one.cls for one in steps for end in one.edges)


def _rank(steps: Sequence[StepDefinition], starts: Sequence[type[Task]]) -> list[list[type[Task]]]:
    edges = {definition.cls: definition.edges for definition in steps}
    columns, placed = [list(starts)], set(starts)
    while columns[-1]:
        following = dict.fromkeys(end for cls in columns[-1] for end in edges[cls] if end not in placed)
        placed.update(following)
        columns.append(list(following))
    return columns[:-1]


def _line(start: tuple[int, int], end: tuple[int, int]) -> tuple[str, int, int, str, int]:
    """Return the path from one box to another, to the right, or in a bow above if it leads back; and the place of its
    numbers, as `MachineLine` has it."""
    x1, y1, x2, y2 = *start, *end
    middle = BOX_HEIGHT // 2
    if x2 > x1:
        from_x, from_y, to_y = x1 + BOX_WIDTH, y1 + middle, y2 + middle
        half = (from_x + x2) // 2
        path = f"M{from_x} {from_y} C{half} {from_y} {half} {to_y} {x2 - 3} {to_y}"
        return path, half, (from_y + to_y) // 2 - 5, "middle", 18
    if start == end:
        x = x1 + BOX_WIDTH // 2
        path = f"M{x - 24} {y1} C{x - 24} {y1 - 28} {x + 24} {y1 - 28} {x + 24} {y1 - 3}"
        return path, x + 33, y1 - 20, "start", 14
    if x1 == x2:
        edge = x1 - 26
        path = f"M{x1} {y1 + middle} C{edge} {y1 + middle} {edge} {y2 + middle} {x2 - 3} {y2 + middle}"
        return path, x1 - 8, y2 + middle + 16, "end", 14
    from_x, to_x = x1 + BOX_WIDTH // 2 - 40, x2 + BOX_WIDTH // 2 + 40
    path = f"M{from_x} {y1} C{from_x} {y1 - 34} {to_x} {y2 - 34} {to_x} {y2 - 3}"
    return path, (from_x + to_x) // 2, (y1 + y2) // 2 - 31, "middle", 18


def find_beginnings(steps: Sequence[StepDefinition]) -> list[type[Task]]:
    """Return the steps that no other step leads to, and one step of each cycle that no other step leads to."""
    edges = {definition.cls: definition.edges for definition in steps}
    led_to = {edge for cls, ends in edges.items() for edge in ends if edge is not cls}
    starts: list[type[Task]] = []
    reached: set[type[Task]] = set()
    # First the steps that no other leads to; the steps that these do not reach lie behind a cycle.
    for candidates in ([cls for cls in edges if cls not in led_to], list(edges)):
        for cls in candidates:
            if cls in reached:
                continue
            starts.append(cls)
            waiting = [cls]
            while waiting:
                step = waiting.pop()
                if step not in reached:
                    reached.add(step)
                    waiting += edges[step]
    return starts
