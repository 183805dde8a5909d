"""The return annotation of a step: its outcomes, and the steps that may follow it; and names that annotations lack.

Invariant: an annotation that cannot be read is a `DefinitionError` that names the step.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from pgtask.errors import DefinitionError
from pgtask.outcome import OUTCOMES, Next, Outcome
from pgtask.task import Task

__all__ = [
    "annotation_text",
    "batch_members",
    "edges_among",
    "is_of_annotation",
    "read_annotations",
    "return_annotation",
    "return_members",
    "union_members",
]

_LISTS = (list, tuple, Sequence)


def return_members(label: str, run: Callable[..., Any], family: dict[str, type[Task]]) -> Sequence[Any]:
    """Return the outcomes that the return annotation of `run` names, in its order. Raises `DefinitionError`."""
    annotation = return_annotation(label, run, family)
    members = union_members(annotation)
    if not all(_is_outcome(member) for member in members):
        raise DefinitionError(
            f"step {label}: run() is annotated -> {annotation_text(annotation)}; "
            "annotate it with outcomes, as in -> Next[SomeStep] | Done"
        )
    return members


def batch_members(label: str, run: Callable[..., Any], family: dict[str, type[Task]]) -> Sequence[Any]:
    """Return the outcomes that the return annotation of a `run_batch` names: one for all steps, or a list of them with
    exceptions among them. Raises `DefinitionError`."""
    annotation = return_annotation(label, run, family)
    members = []
    for part in union_members(annotation):
        if typing.get_origin(part) in _LISTS:
            inner = [member for element in typing.get_args(part) for member in union_members(element)]
            members += [member for member in inner if not _is_exception(member) and member is not Ellipsis]
        else:
            members.append(part)
    if not members or not all(_is_outcome(member) for member in members):
        raise DefinitionError(
            f"step {label}: run_batch() is annotated -> {annotation_text(annotation)}; "
            "annotate it with an outcome for all steps, or a list of outcomes, as in -> list[Next[SomeStep] | Fail]"
        )
    return list(dict.fromkeys(members))


def _is_exception(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, BaseException)


def edges_among(label: str, members: Sequence[Any], family: dict[str, type[Task]]) -> tuple[type[Task], ...]:
    """Return the steps that `Next[...]` names among the members of an annotation. Raises `DefinitionError`."""
    edges: list[type[Task]] = []
    for member in members:
        if typing.get_origin(member) is not Next:
            continue
        for step in union_members(typing.get_args(member)[0]):
            name = step.__forward_arg__ if isinstance(step, typing.ForwardRef) else getattr(step, "__name__", "")
            known = family.get(name)
            if known is None or not (known is step or isinstance(step, typing.ForwardRef)):
                raise DefinitionError(
                    f"step {label}: the edge Next[{annotation_text(step)}] does not lead to a step of the same task "
                    f"({', '.join(family)})"
                )
            edges.append(known)
    return tuple(dict.fromkeys(edges))


def _is_outcome(member: Any) -> bool:
    """Return whether `member` is an outcome as `Outcome` has it: the class, or `Next` of something."""
    origin = typing.get_origin(member)
    for outcome in typing.get_args(Outcome):
        generic = typing.get_origin(outcome)
        if member is outcome if generic is None else origin is generic:
            return True
    return False


def return_annotation(label: str, run: Callable[..., Any], family: dict[str, type[Task]]) -> Any:
    """Return the annotation of what `run` returns; a text is evaluated. Raises `DefinitionError`."""
    annotations = read_annotations(run)
    if "return" not in annotations:
        raise DefinitionError(
            f"step {label}: {run.__name__}() has no return annotation; add one, as in -> Next[SomeStep] | Done"
        )
    annotation = annotations["return"]
    if not isinstance(annotation, str):
        return annotation
    # Classes made inside a function are not in the globals; an edge can name only the family and the outcomes.
    known = {**{outcome.__name__: outcome for outcome in OUTCOMES}, "Outcome": Outcome, **family}
    # A decorator from another module copies the text of the annotation.
    scope = {**known, **run.__globals__, **inspect.unwrap(run).__globals__, **family}
    try:
        return eval(annotation, scope)
    except Exception as error:
        raise DefinitionError(f"step {label}: the annotation -> {annotation} cannot be read: {error}") from error


def read_annotations(run: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function as they are written: those that name what is defined later too."""
    try:
        from annotationlib import Format, get_annotations  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return dict(run.__annotations__)
    found: dict[str, Any] = get_annotations(run, format=Format.FORWARDREF)  # Python 3.14: names that only checkers know
    return found


def union_members(annotation: Any) -> Sequence[Any]:
    """Return the members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in union_members(part)]
    return [annotation]


def annotation_text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def is_of_annotation(error: NameError) -> bool:
    """Tell if the missing name stands in an annotation of the line that raised the error.

    Python evaluates the annotations of a class or function at its definition; the name may be defined later, or only
    for type checkers.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except (SyntaxError, ValueError):
        return False
    annotations = [part for node in ast.walk(tree) for part in _annotation_parts(node) if part is not None]
    return any(
        isinstance(name, ast.Name) and name.id == error.name and name.lineno == line
        for annotation in annotations
        for name in ast.walk(annotation)
    )


def _annotation_parts(node: ast.AST) -> list[ast.expr | None]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return [node.returns]
        case ast.arg() | ast.AnnAssign():
            return [node.annotation]
    return []
