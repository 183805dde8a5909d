"""The steps of a Django task. Its row says all that Django asks of a result, so it needs no table of its own.

    Call or AsyncCall --> Returned --> Done, kept in the archive
                     |--> Failed   --> parked, as a call with its failures
                     '--> Done, with `keep_results` off

Invariants: the statement that ends the call writes its value or its failure, so a call that has ended never runs again
unless a person wants it; a task that a person revives has its function called, with the failures so far.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pgtask._postgres.store import statement
from pgtask._validate import encode, envelope_of
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.django.calls import FunctionCall, call_async, call_plain
from pgtask.django.invocation import Failure, Invocation
from pgtask.outcome import Done, Fail, Next
from pgtask.task import Context, Task

__all__ = ["AsyncCall", "Call", "DjangoTask", "Failed", "Returned", "first_step"]


class DjangoTask(Task):
    """A task that was enqueued by Django: `@task` functions of the project, called by their paths."""


class Call(DjangoTask):
    """Calls a plain function, in a thread."""

    transparent = True
    call: Invocation

    def run(self, ctx: Context) -> Next[Returned] | Next[Failed] | Done:
        return _outcome_of(call_plain(self.call, ctx.task_id), is_async=False)


class AsyncCall(DjangoTask):
    """Calls an async function, on the loop of the worker."""

    transparent = True
    call: Invocation

    async def run(self, ctx: Context) -> Next[Returned] | Next[Failed] | Done:
        return _outcome_of(await call_async(self.call, ctx.task_id), is_async=True)


class Returned(DjangoTask):
    """A call that has returned. The archive keeps it with its value."""

    archive = True
    call: Invocation
    value: Any
    worker: str
    started_at: datetime
    finished_at: datetime

    async def run(self, ctx: Context) -> Done:
        return Done()


class Failed(DjangoTask):
    """A call that has failed; the last of its failures is the news. It parks the task, as a call."""

    call: Invocation
    reason: str
    is_async: bool = False

    async def run(self, ctx: Context) -> Fail:
        text = envelope_of(*encode(first_step(self.call, is_async=self.is_async), DEFAULT_MAX_STEP_BYTES))
        async with ctx.transaction() as conn:
            await conn.execute(statement("django/note_failure"), ctx.task_id, text)
        return Fail(self.reason)


def first_step(call: Invocation, *, is_async: bool) -> Task:
    """Return the step that calls a function."""
    return AsyncCall(call) if is_async else Call(call)


def _outcome_of(ended: FunctionCall, *, is_async: bool) -> Next[Returned] | Next[Failed] | Done:
    if ended.reason is not None:
        failure = Failure(ended.worker, ended.started_at, ended.finished_at, ended.exception, ended.traceback)
        return Next(Failed(ended.call.failed_with(failure), ended.reason, is_async))
    if not ended.is_kept:
        return Done()
    return Next(Returned(ended.call, ended.value, ended.worker, ended.started_at, ended.finished_at))
