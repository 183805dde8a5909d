"""What the return annotation of a step says: its outcomes, and the steps it may go on to.

Invariant: what cannot be read is a `DefinitionError` that names the step.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from pgtask.errors import DefinitionError
from pgtask.outcome import Done, Fail, Next
from pgtask.task import Task

__all__ = ["edges_among", "return_members", "shown"]


def return_members(label: str, run: Callable[..., Any], family: dict[str, type[Task]]) -> Sequence[Any]:
    """The outcomes that the return annotation of `run` names, in its order."""
    annotation = _return_annotation(label, run, family)
    members = _members(annotation)
    if not all(member is Done or member is Fail or typing.get_origin(member) is Next for member in members):
        raise DefinitionError(
            f"step {label}: run() is annotated -> {shown(annotation)}; "
            "annotate it with outcomes, as in -> Next[SomeStep] | Done"
        )
    return members


def edges_among(label: str, members: Sequence[Any], family: dict[str, type[Task]]) -> tuple[type[Task], ...]:
    """The steps that `Next[...]` names among the members of an annotation."""
    edges: list[type[Task]] = []
    for member in members:
        if typing.get_origin(member) is not Next:
            continue
        for step in _members(typing.get_args(member)[0]):
            name = step.__forward_arg__ if isinstance(step, typing.ForwardRef) else getattr(step, "__name__", "")
            known = family.get(name)
            if known is None or not (known is step or isinstance(step, typing.ForwardRef)):
                raise DefinitionError(
                    f"step {label}: the edge Next[{shown(step)}] does not lead to a step of the same task "
                    f"({', '.join(family)})"
                )
            edges.append(known)
    return tuple(dict.fromkeys(edges))


def _return_annotation(label: str, run: Callable[..., Any], family: dict[str, type[Task]]) -> Any:
    annotations = _annotations(run)
    if "return" not in annotations:
        raise DefinitionError(f"step {label}: run() has no return annotation; add one, as in -> Next[SomeStep] | Done")
    annotation = annotations["return"]
    if not isinstance(annotation, str):
        return annotation
    # Classes made inside a function are not in the globals; the family and the outcomes are all an edge can name.
    known = {"Next": Next, "Done": Done, "Fail": Fail, "Outcome": Next | Done | Fail, **family}
    scope = {**known, **run.__globals__, **family}
    try:
        return eval(annotation, scope)
    except Exception as error:
        raise DefinitionError(f"step {label}: the annotation -> {annotation} cannot be read: {error}") from error


def _annotations(run: Callable[..., Any]) -> dict[str, Any]:
    try:
        from annotationlib import Format, get_annotations  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return dict(run.__annotations__)
    found: dict[str, Any] = get_annotations(run, format=Format.FORWARDREF)  # Python 3.14: names only known to checkers
    return found


def _members(annotation: Any) -> Sequence[Any]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
