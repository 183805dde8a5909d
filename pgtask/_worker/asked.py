"""What a workflow has asked its context for and not awaited: a forgotten `await`, which would pass for success.

Invariant: what was awaited is held for a bounded time; each look at all that is held doubles the number until the next.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from pgtask.errors import ReplayError

__all__ = ["Asked", "noted"]

Ask = TypeVar("Ask", bound=Callable[..., Coroutine[Any, Any, Any]])

FIRST_LOOK = 100  # held


class Asked:
    """What one run has asked for."""

    def __init__(self) -> None:
        self._held: list[tuple[str, Coroutine[Any, Any, Any]]] = []
        self._look_at = FIRST_LOOK

    def hold(self, what: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._held.append((what, coroutine))
        if len(self._held) >= self._look_at:
            self._held = self._not_begun()
            self._look_at = max(FIRST_LOOK, 2 * len(self._held))

    def check(self) -> None:
        """The workflow has returned. Raises `ReplayError` for what it has not awaited."""
        left = self._not_begun()
        for _, coroutine in left:
            coroutine.close()
        if left:
            raise ReplayError(f"the workflow ends without having awaited {left[0][0]}: write await before it")

    def _not_begun(self) -> list[tuple[str, Coroutine[Any, Any, Any]]]:
        return [one for one in self._held if inspect.getcoroutinestate(one[1]) == inspect.CORO_CREATED]


def noted(ask: Ask) -> Ask:
    """For an `async` method of something that has `asked`."""

    @functools.wraps(ask)
    def note(self: Any, *args: Any, **options: Any) -> Coroutine[Any, Any, Any]:
        coroutine = ask(self, *args, **options)
        name = repr(args[0]) if args and isinstance(args[0], str) else ""
        self.asked.hold(f"ctx.{ask.__name__}({name})", coroutine)
        return coroutine

    return cast(Ask, note)
