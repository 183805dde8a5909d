"""The errors of a lifespan that are visible without calling it."""

from __future__ import annotations

import inspect
from contextlib import AsyncContextDecorator
from typing import Any

__all__ = ["lifespan_error"]


def lifespan_error(lifespan: Any) -> str | None:
    """Return the reason why a call of `lifespan` cannot give an async context manager; None if it may."""
    if isinstance(lifespan, AsyncContextDecorator) or (hasattr(lifespan, "__aenter__") and not callable(lifespan)):
        return "it is what that function returns: pass the function, without calling it"
    if not callable(lifespan):
        return "it is not a function"
    if isinstance(lifespan, type) and not hasattr(lifespan, "__aenter__"):
        return f"the class {lifespan.__name__} is not an async context manager"
    if inspect.isasyncgenfunction(lifespan) or inspect.iscoroutinefunction(lifespan):
        return "it lacks the decorator" + ("" if inspect.isasyncgenfunction(lifespan) else ", or the yield")
    if inspect.isgeneratorfunction(inspect.unwrap(lifespan)):
        return "it is not async"
    try:
        signature = inspect.signature(lifespan)
    except (TypeError, ValueError):  # compiled code may have none
        return None
    try:
        signature.bind()
    except TypeError:
        return f"it must not need arguments, and takes {signature}"
    return None
