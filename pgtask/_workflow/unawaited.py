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
        self._held: list[Any] = []
        self._limit = INITIAL_LIMIT

    def hold(self, coroutine: Any) -> None:
        """Remember a call, in the place of the one before if that has ended."""
        held = self._held
        if held and held[-1].cr_frame is None:
            held[-1] = coroutine
            return
        held.append(coroutine)
        if len(held) >= self._limit:
            self._held = self._not_begun()
            self._limit = max(INITIAL_LIMIT, 2 * len(self._held))

    def check_all(self) -> None:
        """Raise `ReplayError` if the workflow, which has returned, has not awaited a call."""
        if not (left := self._not_begun()):
            return
        what = _describe(left[0])
        for coroutine in left:
            coroutine.close()
        raise ReplayError(f"the workflow ends without having awaited {what}: write await before it")

    def _not_begun(self) -> list[Any]:
        return [one for one in self._held if inspect.getcoroutinestate(one) == inspect.CORO_CREATED]


def _describe(coroutine: Any) -> str:
    """Return the call that has made a coroutine which has not begun, with the name that it is given."""
    name = coroutine.cr_frame.f_locals.get("name")
    return f"ctx.{coroutine.__name__}({'' if name is None else repr(name)})"


def tracked(method: MethodT) -> MethodT:
    """Wrap an `async` method so that the `unawaited` calls of its object hold each call."""

    @functools.wraps(method)
    def call_tracked(self: Any, *args: Any, **options: Any) -> Coroutine[Any, Any, Any]:
        coroutine = method(self, *args, **options)
        self.unawaited.hold(coroutine)
        return coroutine

    return cast(MethodT, call_tracked)
