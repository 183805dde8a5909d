"""A thread with an event loop of its own, for the coroutines of a sync caller.

Invariants: a call always returns: with the result, or with an error once the thread has ended. A copy of the process,
by fork, never touches what the loop of its parent holds.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import uvloop

from pgtask.errors import EnqueueError

__all__ = ["LoopThread", "forget"]

T = TypeVar("T")


class LoopThread:
    """The thread runs from now on, until `stop`."""

    def __init__(self, name: str) -> None:
        self._loop: Any = uvloop.new_event_loop()
        self._calls: dict[Future[Any], Any] = {}  # the coroutine of each until it starts, then its asyncio Task
        self._is_stopping = self._is_ended = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def is_here(self) -> bool:
        """Return whether this code runs in the thread."""
        return self._thread.ident == threading.get_ident()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the loop."""
        future: Future[Any] = Future()
        self._calls[future] = coroutine  # from here on the end of the thread ends the call
        self._send(self._start, future)
        return future

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and wait for it. An interrupt of the waiting thread cancels it."""
        future = self.begin(coroutine)
        try:
            return future.result()
        except BaseException:
            self.cancel(future)
            raise

    def cancel(self, future: Future[Any]) -> None:
        """Cancel a call, unless it has ended."""
        if not future.done():
            self._send(self._cancel, future)

    def resolve(self, waiter: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        """Give a future of the loop its value, or its error."""
        self._send(_resolve, waiter, value, error)

    def stop(self) -> None:
        """Cancel what still runs, and end the thread."""
        self._is_stopping = True
        self._send(self._loop.stop)
        self._thread.join()

    def _send(self, callback: Any, *args: Any) -> None:
        """Have the loop call something; if it is closed, end the calls that are left."""
        try:
            if not self._is_ended:
                self._loop.call_soon_threadsafe(callback, *args)
                return
        except RuntimeError:  # it was closed just now
            pass
        self._end_calls()

    # --- in the thread

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(asyncio.sleep(0))  # each Task takes its first step
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._is_ended = True
            self._loop.close()
            self._end_calls()

    def _end_calls(self) -> None:
        while self._calls:
            with suppress(KeyError, RuntimeError):  # another thread does this too
                future, call = self._calls.popitem()
                if asyncio.iscoroutine(call):
                    call.close()
                future.set_exception(_closed())

    def _start(self, future: Future[Any]) -> None:
        if not self._is_stopping:
            self._calls[future] = self._loop.create_task(self._finish(future, self._calls[future]))

    def _cancel(self, future: Future[Any]) -> None:
        if isinstance(call := self._calls.get(future), asyncio.Task):
            self._loop.call_soon(call.cancel)  # a Task that was cancelled before its first step would end nothing here

    async def _finish(self, future: Future[Any], coroutine: Coroutine[Any, Any, Any]) -> None:
        try:
            result = await coroutine
        except asyncio.CancelledError:
            self._calls.pop(future, None)
            future.set_exception(_closed())
        except BaseException as error:
            self._calls.pop(future, None)
            future.set_exception(error)
        else:
            self._calls.pop(future, None)
            future.set_result(result)


def _resolve(waiter: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if waiter.done():  # its call was cancelled
        return
    if error is None:
        waiter.set_result(value)
    else:
        waiter.set_exception(error)


def _closed() -> EnqueueError:
    return EnqueueError("the client was closed during the call")


def forget(*things: Any) -> None:
    """Never free things that a copy of the process has inherited: their end would close, or take out of the epoll of
    the parent, what the parent still uses."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
