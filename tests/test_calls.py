"""How the steps of workflows are called: what a timeout counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from conftest import run

from pgtask._worker.calls import Calls
from pgtask.errors import StepTimeout
from pgtask.policy import Policy

SHORT = Policy(timeout=timedelta(seconds=0.1))


@asynccontextmanager
async def one_thread() -> AsyncIterator[Calls]:
    with ThreadPoolExecutor(1) as threads:
        yield Calls(None, threads, most_bytes=1)  # type: ignore[arg-type]  # of the dispatcher nothing is asked here


def call(calls: Calls, function: Any, *args: Any) -> Any:
    return calls.call("s", function, args, SHORT, is_async=asyncio.iscoroutinefunction(function))


def test_the_wait_for_a_free_thread_is_not_part_of_the_timeout() -> None:
    async def main() -> None:
        async with one_thread() as calls:
            is_free = threading.Event()
            busy = asyncio.create_task(calls.call("busy", is_free.wait, (), Policy(), is_async=False))
            waits = asyncio.create_task(call(calls, abs, -3))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waits), 0.5)  # five times its timeout
            is_free.set()
            assert await waits == 3
            assert await busy

    run(main())


def test_a_thread_that_runs_too_long_is_given_up() -> None:
    async def main() -> None:
        async with one_thread() as calls:
            is_over = threading.Event()
            with pytest.raises(StepTimeout, match=r"step s ran longer than its timeout of 0\.1 s"):
                await call(calls, is_over.wait)
            is_over.set()

    run(main())


def test_a_step_that_is_cancelled_while_it_waits_for_a_thread_does_not_begin() -> None:
    async def main() -> None:
        begun: list[int] = []
        async with one_thread() as calls:
            is_free = threading.Event()
            busy = asyncio.create_task(call(calls, is_free.wait))
            waits = asyncio.create_task(call(calls, begun.append, 1))
            await asyncio.sleep(0)
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
            with pytest.raises(StepTimeout):
                await busy
            is_free.set()
        assert begun == []

    run(main())


def test_a_thread_that_begins_after_its_step_was_cancelled_disturbs_nobody() -> None:
    class Late(Executor):
        """Has begun, and gets to the function later."""

        def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
            self.go_on = partial(function, *args)
            begun: Future[Any] = Future()
            begun.set_running_or_notify_cancel()
            return begun

    async def main() -> None:
        threads = Late()
        waits = asyncio.create_task(call(Calls(None, threads, most_bytes=1), abs, -3))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert threads.go_on() == 3
        await asyncio.sleep(0)

    run(main())


def test_a_timeout_of_its_own_is_not_taken_for_ours() -> None:
    async def impatient() -> None:
        raise TimeoutError("mine")

    async def main() -> None:
        async with one_thread() as calls:
            with pytest.raises(TimeoutError, match="mine"):
                await call(calls, impatient)

    run(main())
