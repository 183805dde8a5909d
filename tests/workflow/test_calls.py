"""Calls of the steps of workflows: the time that a timeout counts."""

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
from fix_database import run

from pgtask._workflow.steps import StepRunner
from pgtask.errors import StepTimeout
from pgtask.policy import Policy

SHORT = Policy(timeout=timedelta(seconds=0.1))


def runner_over(threads: Any) -> StepRunner:
    nothing: Any = None  # of the dispatcher nothing is asked here
    return StepRunner(nothing, threads, max_bytes=1, end_if_copy=lambda error: None)


@asynccontextmanager
async def one_thread() -> AsyncIterator[StepRunner]:
    with ThreadPoolExecutor(1) as threads:
        yield runner_over(threads)


def call(runner: StepRunner, function: Any, *args: Any) -> Any:
    return runner.call_step("s", function, args, SHORT, is_async=asyncio.iscoroutinefunction(function))


def test_the_wait_for_a_free_thread_is_not_part_of_the_timeout() -> None:
    async def main() -> None:
        async with one_thread() as runner:
            is_free = threading.Event()
            busy = asyncio.create_task(runner.call_step("busy", is_free.wait, (), Policy(), is_async=False))
            waits = asyncio.create_task(call(runner, abs, -3))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waits), 0.5)  # five times its timeout
            is_free.set()
            assert await waits == 3
            assert await busy

    run(main())


def test_a_thread_that_runs_too_long_is_given_up() -> None:
    async def main() -> None:
        async with one_thread() as runner:
            is_over = threading.Event()
            with pytest.raises(StepTimeout, match=r"step s ran longer than its timeout of 0\.1 s"):
                await call(runner, is_over.wait)
            is_over.set()

    run(main())


def test_step_cancelled_while_waiting_for_a_thread_never_begins() -> None:
    async def main() -> None:
        begun: list[int] = []
        async with one_thread() as runner:
            is_free = threading.Event()
            busy = asyncio.create_task(call(runner, is_free.wait))
            waits = asyncio.create_task(call(runner, begun.append, 1))
            await asyncio.sleep(0)
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
            with pytest.raises(StepTimeout):
                await busy
            is_free.set()
        assert begun == []

    run(main())


def test_thread_that_begins_after_a_cancel_is_ignored() -> None:
    class Late(Executor):
        """Has begun, and gets to the function later."""

        def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
            self.go_on = partial(function, *args)
            begun: Future[Any] = Future()
            begun.set_running_or_notify_cancel()
            return begun

    async def main() -> None:
        threads = Late()
        waits = asyncio.create_task(call(runner_over(threads), abs, -3))
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
        async with one_thread() as runner:
            with pytest.raises(TimeoutError, match="mine"):
                await call(runner, impatient)

    run(main())
