"""The threads of plain steps: a call whose thread the system refuses does not fail, and computing calls take turns."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
from fix_database import run

from pgtask._worker import threads as module
from pgtask._worker.threads import CallKind, StepThreads


@contextmanager
def threads(max_threads: int) -> Iterator[StepThreads]:
    made = StepThreads(max_threads)
    try:
        yield made
    finally:
        made.shutdown(cancel_futures=True)


async def results(*futures: Future[Any]) -> list[Any]:
    return await asyncio.gather(*map(asyncio.wrap_future, futures))


class System:
    """A system that gives `gives` threads to steps, and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gives: int, error: BaseException) -> None:
        self.gives, self.asked = gives, 0
        start = threading.Thread.start

        def scarce(thread: threading.Thread) -> None:
            if thread.name.startswith("pgtask-step"):
                self.asked += 1
                if self.gives <= 0:
                    raise error
                self.gives -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", scarce)


ERRORS = [RuntimeError("can't start new thread"), MemoryError(), OSError(11, "Resource temporarily unavailable")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_call_without_a_thread_runs_in_an_existing_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    system = System(monkeypatch, 2, error)
    calls: list[int] = []

    async def main() -> None:
        with threads(10) as pool:
            begun, go = threading.Barrier(3), threading.Event()

            def call(number: int) -> int:
                if number < 2:
                    begun.wait(20)
                    go.wait(20)
                calls.append(number)
                return number

            first = [pool.submit(call, number) for number in range(2)]
            await asyncio.to_thread(begun.wait, 20)
            assert not pool.has_room()
            rest = [pool.submit(call, number) for number in range(2, 8)]
            go.set()
            assert await results(*first, *rest) == list(range(8))
            assert pool.has_room()

    run(main())
    assert sorted(calls) == list(range(8))
    assert caplog.text.count("threads.scarce") == 1
    assert system.asked <= 4, "each call asks the system again"


def test_calls_without_any_thread_wait_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREAD_RETRY", 0.01)
    system = System(monkeypatch, 0, ERRORS[0])

    async def main() -> None:
        with threads(10) as pool:
            assert not pool.has_room()
            futures = [pool.submit(abs, -number) for number in range(3)]
            while system.asked < 4:
                await asyncio.wait(map(asyncio.wrap_future, futures), timeout=0.01)
            system.gives = 1
            assert await results(*futures) == [0, 1, 2]

    run(main())


def test_exception_of_call_does_not_end_its_thread() -> None:
    async def main() -> None:
        with threads(1) as pool:
            failed, good = pool.submit(int, "x"), pool.submit(int, "1")
            with pytest.raises(ValueError, match="invalid literal"):
                await asyncio.wrap_future(failed)
            assert await asyncio.wrap_future(good) == 1
            assert await results(*(pool.submit(threading.current_thread) for _ in range(3)))

    run(main())


def test_shutdown_cancels_waiting_calls_and_takes_none() -> None:
    async def main() -> None:
        begun, go = threading.Event(), threading.Event()
        with threads(1) as pool:

            def runs() -> bool:
                begun.set()
                return go.wait(20)

            running, waiting = pool.submit(runs), pool.submit(int)
            await asyncio.to_thread(begun.wait, 20)
            pool.shutdown(cancel_futures=True)
            assert waiting.cancelled()
            with pytest.raises(RuntimeError):
                pool.submit(int)
            go.set()
            assert await asyncio.wrap_future(running)

    run(main())


# --- threads that are woken


def test_short_calls_share_few_threads() -> None:
    async def main() -> None:
        with threads(100) as pool:
            for _ in range(10):
                used = await results(*(pool.submit(threading.get_ident) for _ in range(100)))
            assert len(set(used)) <= 10

    run(main())


def test_calls_that_wait_for_each_other_all_run() -> None:
    """All but the first come while a thread is busy."""

    async def main() -> None:
        with threads(50) as pool:
            await results(*(pool.submit(int) for _ in range(100)))
            for _ in range(3):
                gate = threading.Barrier(50)
                await results(*(pool.submit(gate.wait, 20) for _ in range(50)))

    run(main())


@pytest.mark.parametrize("computes", [False, True])
def test_long_call_holds_up_no_other(computes: bool) -> None:
    async def main() -> None:
        with threads(2) as pool:
            for _ in range(5):
                go = threading.Event()

                def long(go: threading.Event = go) -> bool:
                    until = time.monotonic() + 20
                    while computes and not go.is_set() and time.monotonic() < until:
                        pass
                    return go.wait(0 if computes else 20)

                assert await results(pool.submit(long), pool.submit(int), pool.submit(go.set)) == [True, 0, None]

    run(main())


# --- calls that run side by side -----------------------------------------------------------------------------------


def computes(go: threading.Event) -> None:
    until = time.monotonic() + 20
    while not go.is_set() and time.monotonic() < until:
        pass


def waits(go: threading.Event) -> None:
    go.wait(20)


async def sample(kind: CallKind, seconds: float, until: Callable[[], bool]) -> None:
    """Sample as a dispatcher does while more calls of a kind wait."""
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        due = time.monotonic() + 0.01
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.01)
        kind.sample(late=time.monotonic() - due if kind.max_running == 1 else 0.0)


@pytest.mark.parametrize("ways", ["the schedule", "clocks", "the process"])
def test_waiting_calls_fill_slots_and_computing_calls_do_not(monkeypatch: pytest.MonkeyPatch, ways: str) -> None:
    """Use each of the ways in which a system tells whether a thread computes."""
    if ways == "the schedule" and not module._has_schedule:
        pytest.skip("only Linux tells for how long a thread has waited for a core")
    if ways != "the schedule":
        monkeypatch.setattr(module, "_has_schedule", False)
    if ways == "the process":
        monkeypatch.setattr(module, "_clock_of", None)

    async def allowed(function: Callable[[threading.Event], None], seconds: float) -> int:
        kind, go = CallKind(16), threading.Event()
        with threads(16) as pool:
            assert kind.has_room()
            calls = [kind.begin_call()]
            futures = [pool.submit(calls[0].run_timed, function, go)]
            assert not kind.has_room(), "another call may begin before the first is sampled"
            await sample(kind, seconds, lambda: kind.max_running == 16)
            go.set()
            await results(*futures)
            kind.end_call(calls[0])
        return kind.max_running

    assert run(allowed(waits, 20)) == 16
    if ways == "the schedule":  # the others cannot tell a computing call from one that waits for a core
        assert run(allowed(computes, 0.3)) < 16


def test_calls_that_need_little_cpu_are_not_limited() -> None:
    async def main() -> None:
        kind = CallKind(100)
        with threads(1) as pool:
            call = kind.begin_call()
            await results(pool.submit(call.run_timed, abs, 1))
            kind.end_call(call)
        for _ in range(50):
            assert kind.has_room()
            kind.begin_call()

    run(main())


def test_calls_that_begin_to_compute_are_not_replaced() -> None:
    kind = CallKind(100)
    kind.max_running = 100
    calls = [kind.begin_call() for _ in range(10)]
    for count, call in zip(range(10, 1, -1), calls, strict=False):
        call.cpu, call.wall = 0.25, 0.25 * count  # they share the interpreter
        kind.end_call(call)
    assert kind.max_running == 1
