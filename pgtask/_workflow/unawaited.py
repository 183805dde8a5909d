"""The calls of a context that a workflow has not awaited: a forgotten `await` would pass for success.

Invariant: awaited calls are held for a bounded time; each look at all that is held doubles the number until the next.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from pgtask.errors import ReplayError

__all__ = ["UnawaitedCalls", "tracked"]

MethodT = TypeVar("MethodT", bound=Callable[..., Coroutine[Any, Any, Any]])

INITIAL_LIMIT = 100  # calls held before the first look


class UnawaitedCalls:
    """The calls of one run."""

    def __init__(self) -> None:
        self._held: list[tuple[str, Coroutine[Any, Any, Any]]] = []
        self._limit = INITIAL_LIMIT

    def hold(self, what: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Remember a call, named as `what` in an error."""
        self._held.append((what, coroutine))
        if len(self._held) >= self._limit:
            self._held = self._not_begun()
            self._limit = max(INITIAL_LIMIT, 2 * len(self._held))

    def check_all(self) -> None:
        """Raise `ReplayError` if the workflow, which has returned, has not awaited a call."""
        left = self._not_begun()
        for _, coroutine in left:
            coroutine.close()
        if left:
            raise ReplayError(f"the workflow ends without having awaited {left[0][0]}: write await before it")

    def _not_begun(self) -> list[tuple[str, Coroutine[Any, Any, Any]]]:
        return [one for one in self._held if inspect.getcoroutinestate(one[1]) == inspect.CORO_CREATED]


def tracked(method: MethodT) -> MethodT:
    """Wrap an `async` method so that the `unawaited` calls of its object hold each call."""

    @functools.wraps(method)
    def call_tracked(self: Any, *args: Any, **options: Any) -> Coroutine[Any, Any, Any]:
        coroutine = method(self, *args, **options)
        name = repr(args[0]) if args and isinstance(args[0], str) else ""
        self.unawaited.hold(f"ctx.{method.__name__}({name})", coroutine)
        return coroutine

    return cast(MethodT, call_tracked)
