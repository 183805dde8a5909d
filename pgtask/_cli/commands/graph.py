"""`pgtask graph`: the state machine that the annotations declare, as a Mermaid diagram.

Invariant: an app always gives the same text, in the order in which its tasks, steps and edges are written.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence

from pgtask._cli.database import load_configured_app
from pgtask._cli.options import add_traceback
from pgtask._cli.output import write_lines
from pgtask._cli.parser import Parser
from pgtask._observe.web.chart import find_beginnings
from pgtask.app import App, StepDefinition
from pgtask.policy import DEFAULT_QUEUE
from pgtask.task import Task

__all__ = ["HELP", "SUMMARY", "add_arguments", "mermaid", "run"]

SUMMARY = "print the app's state machine as Mermaid"
HELP = """\
Print the state machine of the app's tasks as a Mermaid diagram, from the annotations, without a database. A step
that may fail for good leads to "parked".
"""

# Words that have a meaning of their own at the beginning of a line of Mermaid.
_KEYWORDS = frozenset(("class", "classdef", "click", "default", "direction", "note", "scale", "state", "style"))


def add_arguments(parser: Parser) -> None:
    parser.add_argument("app", nargs="?", metavar="APP", help="the app, as module:attribute (default: PGTASK_APP)")
    add_traceback(parser)


def run(args: argparse.Namespace) -> int:
    write_lines([mermaid(load_configured_app(args.app))], end="")
    return 0


def mermaid(app: App) -> str:
    """Return the diagram: an arrow for each edge, from `[*]` to each beginning of a task, to `[*]` from each step that
    may be done, and to `parked` from each step that may fail for good. A step of another queue than `default` names
    its queue.

    With several tasks each is a box. A task may be enqueued at any step; the diagram takes for beginnings the steps
    that no other step leads to, and one step of each cycle that no other step leads to. Annotations do not show the
    steps of a workflow: it is one state with the name of the workflow. So is the task that `@task` makes.
    """
    names = _name_states(app)
    lines = ["stateDiagram-v2"]
    for task in app.tasks:
        steps = [definition for definition in app if definition.task == task]
        is_single = task in app.workflows or task in app.functions
        inner = [*_alias_lines(app, steps, names), *_arrow_lines(steps, names)]
        if fails := [names[step.cls] for step in steps if step.fails]:
            # A state of its own in each box: states of Mermaid have one name in the whole diagram.
            parked = "parked" if len(app.tasks) == 1 else f"{names[steps[0].cls]}__parked"
            if parked != "parked":
                inner.insert(0, f'state "parked" as {parked}')
            inner += [f"{name} --> {parked}: Fail" for name in fails]
        if len(app.tasks) == 1 or is_single:
            lines += [f"    {line}" for line in inner]
        else:
            lines += [f"    state {_box_name(task)} {{", *(f"        {line}" for line in inner), "    }"]
    return "\n".join(lines) + "\n"


def _name_states(app: App) -> dict[type[Task], str]:
    """Return Mermaid's names of the steps: their own, unless that has another meaning in the diagram."""
    taken = Counter([*app.tasks, *(definition.name for definition in app), "parked"])
    names = {}
    for number, definition in enumerate(app):
        if definition.task in app.workflows or definition.task in app.functions:  # its name may hold any character
            names[definition.cls] = f"{'workflow' if definition.task in app.workflows else 'task'}{number}"
            continue
        is_clear = taken[definition.name] == 1 and definition.name.lower() not in _KEYWORDS
        names[definition.cls] = definition.name if is_clear else f"{definition.task}__{definition.name}"
    return names


def _box_name(task: str) -> str:
    return f'"{task}" as {task}__task' if task.lower() in _KEYWORDS else task


def _alias_lines(app: App, steps: Sequence[StepDefinition], names: dict[type[Task], str]) -> Iterator[str]:
    """Yield a line for each state that is shown by another text than its name."""
    for definition in steps:
        shown = definition.name
        if definition.task in app.workflows:
            shown = f"workflow {_strip_quotes(definition.task)}"
        elif definition.task in app.functions:
            shown = _strip_quotes(definition.task)
        if definition.policy.queue != DEFAULT_QUEUE:
            shown += f" (queue {_strip_quotes(definition.policy.queue)})"
        if names[definition.cls] != shown:
            yield f'state "{shown}" as {names[definition.cls]}'


def _strip_quotes(text: str) -> str:
    """Replace the characters that would end a name in quotes, or a line."""
    return "".join(char if char.isalnum() or char in " _-.:/" else "_" for char in text)


def _arrow_lines(steps: Sequence[StepDefinition], names: dict[type[Task], str]) -> Iterator[str]:
    for start in find_beginnings(steps):
        yield f"[*] --> {names[start]}"
    for definition in steps:
        for edge in definition.edges:
            yield f"{names[definition.cls]} --> {names[edge]}"
        if definition.finishes:
            yield f"{names[definition.cls]} --> [*]"
