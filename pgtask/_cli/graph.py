"""`pgtask graph`: the state machine that the annotations declare, as a Mermaid diagram.

Invariant: the same app gives the same text, in the order in which its tasks, steps and edges are written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pgtask.app import App, StepDefinition
from pgtask.task import Task

__all__ = ["mermaid"]

# What Mermaid's grammar takes for something else at the beginning of a line.
_KEYWORDS = frozenset(("class", "classdef", "click", "default", "direction", "note", "scale", "state", "style"))


def mermaid(app: App) -> str:
    """The diagram: an arrow for each edge, from `[*]` to where a task begins, and to `[*]` where it may be done.

    With several tasks each is a box. A task may be enqueued at any step; the diagram takes for beginnings the steps
    that no other step leads to, and one step of each cycle that nothing else leads to.
    """
    names = _names(app)
    lines = ["stateDiagram-v2"]
    for task in app.tasks:
        steps = [definition for definition in app if definition.task == task]
        inner = list(_aliases(steps, names)) + list(_arrows(app.tasks[task], steps, names))
        if len(app.tasks) == 1:
            lines += [f"    {line}" for line in inner]
        else:
            lines += [f"    state {task} {{", *(f"        {line}" for line in inner), "    }"]
    return "\n".join(lines) + "\n"


def _names(app: App) -> dict[type[Task], str]:
    """Mermaid's names of the steps: their own, unless that means something else in the diagram."""
    taken = Counter([*app.tasks, *(definition.name for definition in app)])
    names = {}
    for definition in app:
        is_clear = taken[definition.name] == 1 and definition.name.lower() not in _KEYWORDS
        names[definition.cls] = definition.name if is_clear else f"{definition.task}__{definition.name}"
    return names


def _aliases(steps: Sequence[StepDefinition], names: dict[type[Task], str]) -> Iterator[str]:
    for definition in steps:
        if names[definition.cls] != definition.name:
            yield f'state "{definition.name}" as {names[definition.cls]}'


def _arrows(task: type[Task], steps: Sequence[StepDefinition], names: dict[type[Task], str]) -> Iterator[str]:
    for start in _beginnings(steps):
        yield f"[*] --> {names[start]}"
    for definition in steps:
        for edge in definition.edges:
            yield f"{names[definition.cls]} --> {names[edge]}"
        if definition.finishes:
            yield f"{names[definition.cls]} --> [*]"


def _beginnings(steps: Sequence[StepDefinition]) -> list[type[Task]]:
    edges = {definition.cls: definition.edges for definition in steps}
    led_to = {edge for cls, ends in edges.items() for edge in ends if edge is not cls}
    starts: list[type[Task]] = []
    reached: set[type[Task]] = set()
    # First those that nothing leads to; what is then still unreached lies behind a cycle.
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
