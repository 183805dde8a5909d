"""Event loops for tests of the fast path: uvloop, and asyncio on a clock that jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Literal, TypeVar

import uvloop

__all__ = ["Clock", "run_on"]

T = TypeVar("T")
Clock = Literal["asyncio", "uvloop"]
GUARD = 10_000  # seconds after which a run on a jumping clock is given up: no event is left that could end it


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that moves the clock instead of waiting for a timer."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            if found := super().select(0 if timeout < GUARD / 2 else 10):  # threads are given real time
                return found
            self.now += timeout
            timeout = 0
        return super().select(timeout)


class JumpingLoop(asyncio.SelectorEventLoop):
    """asyncio runs timers of the very same time in any order; here the one that was set first runs first."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        self._timers = 0
        super().__init__(self._clock)

    def call_at(  # type: ignore[override]  # without a TypeVarTuple
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self._timers += 1
        return super().call_at(when + 1e-6 * self._timers, callback, *args, context=context)

    def time(self) -> float:
        return self._clock.now


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": JumpingLoop, "uvloop": uvloop.new_event_loop}


def run_on(clock: Clock, main: Coroutine[Any, Any, T], *, debug: bool = False) -> T:
    """Run `main` to its end. Fails if it leaves stray errors or Tasks."""
    stray: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))
        async with asyncio.timeout(GUARD if clock == "asyncio" else 30):
            result = await main
        for _ in range(20):
            if len(asyncio.all_tasks()) == 1:
                break
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "Tasks are left"
        return result

    with asyncio.Runner(loop_factory=LOOPS[clock], debug=debug) as runner:
        result = runner.run(watched())
    assert not stray, f"unhandled errors: {stray}"
    return result
