"""The steps of a Django task: one for each function, named by its path. Its row says all that Django asks of a result,
so it needs no table of its own.

    a call --> its value in the archive
          |--> parked, as a call with its failures
          '--> nothing, with `keep_results` off

Invariants: the statement that ends the call writes its value or its failure, so a call that has ended never runs again
unless a person wants it; a task that a person revives has its function called, with the failures so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pgtask.django.calls import AsyncFunction, PlainFunction
from pgtask.django.invocation import Invocation
from pgtask.django.results import is_async_at
from pgtask.outcome import Done, Fail
from pgtask.task import Context, Task

__all__ = ["AsyncCall", "Call", "DjangoTask"]


class DjangoTask(Task):
    """A task that was enqueued by Django: `@task` functions of the project, called by their paths."""

    archive = True
    transparent = True
    call: Invocation

    @staticmethod
    def find_step(path: str) -> tuple[type[DjangoTask], Callable[[Any, Context], Any]] | None:
        """Return the class that the step of the function at a path is like, and what runs it; None if it is no path."""
        if "." not in path:
            return None
        return (AsyncCall, AsyncFunction(path).run) if is_async_at(path) else (Call, PlainFunction(path).run)


class Call(DjangoTask):
    """Calls a plain function, in a thread."""

    def run(self, ctx: Context) -> Done | Fail:
        ended: Done | Fail = PlainFunction(self.call.path or "Call").run(self, ctx)
        return ended


class AsyncCall(DjangoTask):
    """Calls an async function, on the loop of the worker."""

    async def run(self, ctx: Context) -> Done | Fail:
        ended: Done | Fail = await AsyncFunction(self.call.path or "AsyncCall").run(self, ctx)
        return ended
