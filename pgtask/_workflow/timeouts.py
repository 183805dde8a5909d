"""Timeouts and cancellations in the code of a workflow around something of `ctx`: found, and refused.

A replay is faster than the first run, and a suspension longer. So such a timeout would decide otherwise in a replay.
Invariant: nothing here changes the objects that it inspects.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pgtask.errors import ReplayError

__all__ = ["cut_off_error", "find_timeout", "forgotten_timeout_error"]

_WAIT = "use wait_for_signal(..., timeout=...)"
_REMEDIES = {
    "step": "use policy=Policy(timeout=...)",
    "signal": _WAIT,
    "sleep": f"{_WAIT}, which a signal ends before its time",
    "children": f"{_WAIT}, and have the children send one",
}
_OTHERWISE = "use policy=Policy(timeout=...) for steps and timeout=... for waits"


def cut_off_error(kind: str, name: str, tasks: Iterable[asyncio.Task[Any]]) -> ReplayError:
    """Make the error for a call of a kind and a name that was cancelled in one of the tasks."""
    what = f"{kind} {name!r}" if name else kind
    by = "asyncio.timeout" if any(map(_is_timed_out, tasks)) else "a cancellation in the workflow"
    return ReplayError(f"{what} was cut off by {by}; {_REMEDIES.get(kind, _OTHERWISE)}")


def forgotten_timeout_error(what: str) -> ReplayError:
    """Make the error for a suspension under a timeout of the workflow's own."""
    return ReplayError(
        f"the workflow waits for {what} inside asyncio.timeout, which does not count while a run pauses; "
        "use wait_for_signal(..., timeout=...), or policy=Policy(timeout=...) for a step"
    )


def _is_timed_out(task: asyncio.Task[Any]) -> bool:
    """True if an `asyncio.timeout` of the task has expired. Looks at all objects, for an error message."""
    return any(isinstance(one, asyncio.Timeout) and one.expired() for one in gc.get_referrers(task))


async def find_timeout(coroutines: Callable[[], Iterable[Any]]) -> bool:
    """True if one of the coroutines is in an `asyncio.timeout`. Looks between two tasks of the loop: only a suspended
    coroutine can be inspected."""
    has_some: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def inspect_all() -> None:
        if not has_some.done():
            has_some.set_result(any(map(_has_timeout, coroutines())))

    asyncio.get_running_loop().call_soon(inspect_all)
    return await has_some


def _has_timeout(coroutine: Any) -> bool:
    """True if a suspended coroutine, or one that it awaits, is in an `async with asyncio.timeout(...)`.

    The frame refers to the context manager: to itself, or to the bound method that will leave it.
    """
    for link in _await_chain(coroutine):
        for one in gc.get_referents(link):
            owner = getattr(one, "__self__", one) if inspect.ismethod(one) else one
            if isinstance(owner, asyncio.Timeout) and owner.when() is not None:
                return True
    return False


def _await_chain(coroutine: Any) -> Iterator[Any]:
    """A coroutine, the object that it awaits, the object that this one awaits, and so on."""
    link = coroutine
    while link is not None:
        yield link
        following = next(
            (found for name in ("cr_await", "ag_await", "gi_yieldfrom") if (found := getattr(link, name, None))), None
        )
        if following is None and not _has_frame(link):  # a thing in between, such as the result of `__anext__`
            following = next(filter(_has_frame, gc.get_referents(link)), None)
        link = following


def _has_frame(thing: Any) -> bool:
    return inspect.iscoroutine(thing) or inspect.isasyncgen(thing) or inspect.isgenerator(thing)
