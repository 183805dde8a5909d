"""The types of the signals that a workflow waits for, as far as its source shows them.

Invariant: no code of the workflow is called. Signals whose name or type the source computes are not checked here; the
run itself decodes every signal.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from pgtask._json_types import codec_of
from pgtask.errors import ConfigError
from pgtask.workflow import Workflow

__all__ = ["check_signal"]

_PLAIN = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.Subscript,
    ast.Tuple,
    ast.List,
    ast.BinOp,
    ast.BitOr,
)


class _Undecidable(Exception):
    """The source does not show a name or a type."""


def check_signal(flows: Sequence[Workflow[Any, Any]], name: str, payload: str) -> None:
    """Raise `ConfigError` if no version of the workflow that waits for signals of this name could read this one."""
    wrong: ConfigError | None = None
    for flow in flows:
        try:
            types = [wanted for waits_for, wanted in _find_waits(flow.function) if waits_for == name]
            codecs = [codec_of(wanted) for wanted in types]
        except (_Undecidable, TypeError):
            return
        if not codecs:
            return
        for codec, wanted in zip(codecs, types, strict=True):
            try:
                codec.decode(payload)
                return
            except msgspec.DecodeError as error:
                kind = getattr(wanted, "__qualname__", repr(wanted))
                wrong = ConfigError(
                    f"workflow {flow.name} waits for a {kind} as signal {name}: {error}; it was not sent"
                )
    if wrong is not None:
        raise wrong


def _find_waits(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the type of each wait for a signal, in a function and in those that receive its context.
    Raises `_Undecidable`."""
    left, seen = [function], set()
    while left:
        function = inspect.unwrap(left.pop())
        if function in seen:
            continue
        seen.add(function)
        context, calls = _find_calls(function)
        evaluate = _make_evaluator(function)
        for call in calls:
            if isinstance(call.func, ast.Attribute) and call.func.attr == "wait_for_signal":
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                given.update(zip(("name", "type"), call.args, strict=False))
                if "name" not in given or None in given:
                    raise _Undecidable
                yield evaluate(given["name"]), evaluate(given["type"]) if "type" in given else Any
            elif any(isinstance(given, ast.Name) and given.id == context for given in call.args):
                called = _resolve_function(evaluate, call.func)
                if called is not None:
                    left.append(called)


def _find_calls(function: Any) -> tuple[str, list[ast.Call]]:
    """Return the name of its first parameter, and the calls in its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        context = next(iter(inspect.signature(function).parameters))
    except (OSError, TypeError, SyntaxError, ValueError, StopIteration):
        raise _Undecidable from None
    return context, [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _make_evaluator(function: Any) -> Callable[[ast.expr], Any]:
    known = {**getattr(function, "__globals__", {}), **inspect.getclosurevars(function).nonlocals}

    def evaluate(expression: ast.expr) -> Any:
        """Return the value of a plain expression, by the names that the function knows."""
        tree = ast.Expression(expression)
        if not all(isinstance(node, (*_PLAIN, ast.expr_context)) for node in ast.walk(tree)):
            raise _Undecidable
        try:
            return eval(compile(ast.fix_missing_locations(tree), "<signal>", "eval"), known)
        except Exception:
            raise _Undecidable from None

    return evaluate


def _resolve_function(evaluate: Callable[[ast.expr], Any], expression: ast.expr) -> Any:
    """Return the called function if Python has its source; else None."""
    try:
        found = evaluate(expression)
    except _Undecidable:
        return None
    return found if inspect.isfunction(found) else None
