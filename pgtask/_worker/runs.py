"""The runs of a worker: which function replays a run, how it is driven, and how it ends.

Invariant: what becomes of a run is written by the journal under its lease, or is an outcome of the dispatcher that
leaves its record as it is; nothing else ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pgtask._events import log_event
from pgtask._fastpath import Again, Dispatcher, Lease, Leases, Written
from pgtask._worker.calls import Calls
from pgtask._worker.entries import History, Journalled
from pgtask._worker.error_text import describe
from pgtask._worker.run import Run
from pgtask.app import App
from pgtask.errors import DatabaseError, DecodeError, PgtaskError, ReplayError, RunStopped, StepFailed, UnknownStepError
from pgtask.task import Context
from pgtask.workflow import Permanent, Transient, Workflow

__all__ = ["Runs"]

log = logging.getLogger("pgtask.runs")


class Runs:
    """Drives runs: `run` becomes the handler of each workflow's step in the dispatch table."""

    def __init__(self, app: App, leases: Leases, dispatcher: Dispatcher, *, journal: Journalled, calls: Calls) -> None:
        self._workflows: Mapping[str, Sequence[Workflow[Any, Any]]] = app.workflows
        self._leases = leases
        self._dispatcher = dispatcher
        self._journal = journal
        self._calls = calls
        for definition in app:
            if definition.task in app.workflows:
                dispatcher.table.entry(definition.cls).run = self.run

    async def run(self, step: Any, context: Context) -> Written | Again:
        """Drive a run until it ends, pauses, fails or is stopped; says what its row has become, or is to become."""
        lease = self._leases.get(context.task_id)
        assert lease is not None
        name = type(step).workflow
        history = await self._journal.load(lease.id)
        if history.wakeup_at is None:
            return Written()  # cancelled since it was claimed
        if not history.is_known or history.state is not None:
            try:
                await self._journal.adopt(lease, name)
            except RunStopped:
                return Written()
        flow = self._choose(name, history.version)
        if flow is None:
            return await self._unknown(lease, name, history)
        run = Run(flow, lease, context, history, journal=self._journal, calls=self._calls)
        try:
            output = await self._drive(run, step.input)
        except RunStopped as stopped:
            if run.verdict is None:
                return await self._fail(run, Permanent(f"the workflow raised RunStopped by itself: {stopped}"))
        except Exception as error:
            if run.verdict is None:
                return await self._fail(run, error)
        except BaseExceptionGroup:  # RunStopped, out of an asyncio.TaskGroup
            if run.verdict is None:
                raise
        if isinstance(run.verdict, ReplayError):
            return await self._fail(run, run.verdict)
        if isinstance(run.verdict, Exception):
            raise run.verdict
        if run.verdict is not None:
            return run.verdict
        return await self._end(run, output=output)

    async def _drive(self, run: Run, input: Any) -> str:
        """Call the workflow; its output as JSON."""
        flow = run.flow
        if flow.takes_input:
            try:
                value = flow.decode_input(input)
            except Exception as error:
                raise DecodeError(f"the input of workflow {flow.name} cannot be decoded: {error}") from None
            output = await flow.function(run, value)
        else:
            output = await flow.function(run)
        if run.verdict is not None:
            return ""
        run.check_end()
        return run.encode_output(output)

    def _choose(self, name: str, version: int | None) -> Workflow[Any, Any] | None:
        """The function for runs that began under `version`; for those that have not begun, the newest."""
        flows = self._workflows[name]
        if version is None:
            return flows[-1]
        return next((flow for flow in flows if flow.since <= version <= flow.version), None)

    async def _unknown(self, lease: Lease, name: str, history: History) -> Written | Again:
        """No function here can replay what the run has recorded: as with a step that the app does not define."""
        what = f"{name} version {history.version}"
        delay = self._dispatcher.unknown(what)
        if delay is not None:
            return Again(delay, lease.tried)
        error = describe(UnknownStepError(what))
        self._dispatcher.parked(lease, error)
        version = history.version or 0
        return await self._written(
            self._journal.end(lease, output=None, error=error, tried=lease.tried, forgotten=[], version=version)
        )

    async def _fail(self, run: Run, error: Exception) -> Written | Again:
        """What was raised outside of steps, or was not caught: try again, or end as ERROR."""
        tried = run.failed_before + 1
        policy = run.flow.policy
        if not _is_final(error) and tried <= policy.retry_limit:
            delay = policy.delay_before_retry(tried)
            if isinstance(error, Transient) and error.retry_after is not None:
                delay = error.retry_after.total_seconds()
            self._calls.say_failed(run.lease, error, delay, tried)
            return Again(delay, tried)
        self._dispatcher.errors += 1
        text = f"{error.step}: {error.error}" if isinstance(error, StepFailed) else describe(error)
        self._dispatcher.parked(run.lease, text)
        return await self._end(run, error=text, tried=tried, forgotten=run.failures_behind(error))

    async def _end(
        self,
        run: Run,
        *,
        output: str | None = None,
        error: str | None = None,
        tried: int = 0,
        forgotten: Sequence[int] = (),
    ) -> Written:
        return await self._written(
            self._journal.end(
                run.lease, output=output, error=error, tried=tried, forgotten=forgotten, version=run.version
            )
        )

    async def _written(self, entry: Any) -> Written:
        try:
            await entry
        except RunStopped as lost:
            log_event(log, logging.DEBUG, "run.stopped", reason=str(lost))
        return Written()


def _is_final(error: Exception) -> bool:
    """Whether a replay would only raise it again: it follows from what is recorded, or says so itself."""
    return isinstance(error, (Permanent, PgtaskError)) and not isinstance(error, DatabaseError)
