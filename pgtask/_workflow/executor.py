"""The execution of runs, each from its claim to its end: the choice of its function, and its outcome.

Invariant: the journal writes the outcome of a run under its lease, or the dispatcher writes one that leaves its record
unchanged; nothing else ends a run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pgtask._error_text import describe
from pgtask._fastpath import Dispatcher, Handled, Leases, Requeue, TaskLease
from pgtask._log import EventLog
from pgtask._retry import seconds_before_retry, throttled_seconds
from pgtask._workflow.context import RunContext
from pgtask._workflow.entries import Adopt, EndRun, LoadHistory
from pgtask._workflow.journal import Journal
from pgtask._workflow.steps import StepRunner
from pgtask._workflow.values import History
from pgtask.app import App
from pgtask.errors import (
    DatabaseError,
    DataRefused,
    DecodeError,
    PgtaskError,
    ReplayError,
    RunStopped,
    StepFailed,
    UnknownStepError,
)
from pgtask.outcome import Done
from pgtask.task import Context
from pgtask.workflow import Permanent, Workflow

__all__ = ["RunExecutor", "call_workflow", "choose_version"]

log = EventLog("pgtask.runs")

MAX_NAMES = 10  # of signals in a line of the log


class RunExecutor:
    """Drives the runs of one worker: `execute` becomes the handler of each workflow's step in the dispatch table."""

    def __init__(
        self, app: App, leases: Leases, dispatcher: Dispatcher, *, journal: Journal, runner: StepRunner
    ) -> None:
        self._workflows: Mapping[str, Sequence[Workflow[Any, Any]]] = app.workflows
        self._leases = leases
        self._dispatcher = dispatcher
        self._journal = journal
        self._runner = runner
        for definition in app:
            if definition.task in app.workflows:
                dispatcher.table.entry(definition.cls).run = self.execute

    async def execute(self, step: Any, context: Context) -> Handled | Requeue:
        """Drive a run until it ends, is suspended, fails or is stopped. Returns the outcome for its row."""
        lease = self._leases.get(context.task_id)
        assert lease is not None
        began = time.monotonic()
        name = type(step).workflow
        history = await self._journal.submit(LoadHistory(lease.id))
        if history.wakeup_at is None:
            return Handled()  # cancelled since it was claimed
        if not history.is_known or history.state is not None:
            try:
                await self._journal.submit(Adopt(lease, name))
            except RunStopped:
                return Handled()
        flow = choose_version(self._workflows[name], history.version)
        if flow is None:
            return await self._refuse_version(lease, name, history)
        run = RunContext(flow, lease, context, history, journal=self._journal, runner=self._runner)
        try:
            return await self._drive(run, step.input, began)
        finally:
            run.close()

    async def _drive(self, run: RunContext, input: Any, began: float) -> Handled | Requeue:
        """Call the function of a run, and write what has become of it."""
        try:
            output = await call_workflow(run, input)
        except GeneratorExit:
            raise
        except BaseException as error:
            if self._is_cancelled(run, error):
                raise
            if not run.is_stopped:
                return await self._retry_or_fail(run, error)
        if run.outcome is None:
            await run.uncommitted.wait(is_last=True)
        if run.outcome is not None:
            return await self._conclude_stopped(run)
        written = await self._end_run(run, output=output)
        if run.outcome is None:
            self._runner.report_done(run.lease, Done(), began)
        return written

    async def _conclude_stopped(self, run: RunContext) -> Handled | Requeue:
        """Return the outcome of a run that was stopped, or raise it. What it has made before is durable then."""
        outcome = run.outcome
        if isinstance(outcome, ReplayError | DataRefused):
            return await self._retry_or_fail(run, outcome)
        await run.uncommitted.wait()
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def _is_cancelled(self, run: RunContext, error: BaseException) -> bool:
        """True if the dispatcher has cancelled the run: it knows the outcome of its task."""
        is_ours = not run.lease.is_running or self._runner.is_draining
        return isinstance(error, asyncio.CancelledError) and run.outcome is None and is_ours

    async def _refuse_version(self, lease: TaskLease, name: str, history: History) -> Handled | Requeue:
        """Put back or park a run that no function here can replay, like a step that the app does not define."""
        what = f"{name} version {history.version}"
        delay = self._dispatcher.unknown_delay(what)
        if delay is not None:
            return Requeue(delay, lease.tried)
        error = describe(UnknownStepError(what))
        self._dispatcher.log_parked(lease, error)
        await self._write_end(EndRun(lease, history.version or 0, error=error, tried=lease.tried))
        return Handled()

    async def _retry_or_fail(self, run: RunContext, error: BaseException) -> Handled | Requeue:
        """Try a run again, or end it as ERROR, for an error that was raised outside of steps or not caught."""
        self._runner.end_if_copy(error)
        if isinstance(error, RunStopped):
            error = Permanent(f"the workflow raised RunStopped by itself: {error}")
        pause = throttled_seconds(error)
        tried = run.failed_before + (pause is None)
        delay = pause
        if pause is None and not _is_final(error):
            delay = seconds_before_retry(run.flow.policy, error, tried)
        before = run.outcome
        await run.uncommitted.wait(is_last=delay is None)
        if run.outcome is not before:  # the error may follow from what is not recorded
            return await self._conclude_stopped(run)
        if pause is not None:
            self._runner.report_throttled(run.lease, error, pause)
            return Requeue(pause, run.failed_before)
        if delay is not None:
            self._runner.report_failure(run.lease, error, delay, tried)
            return Requeue(delay, tried)
        self._dispatcher.errors += 1
        text = describe(error)
        if isinstance(error, StepFailed):
            text, tried = f"{error.step}: {error.error}", error.tries
        self._dispatcher.log_parked(run.lease, text, error)
        return await self._end_run(run, error=text, tried=tried, forgotten=run.failures_behind(error))

    async def _end_run(self, run: RunContext, *, forgotten: Sequence[int] = (), **end: Any) -> Handled | Requeue:
        """Write the end of a run, with the checkpoints that the journal does not have yet."""
        before, carried = run.outcome, [one for one in run.uncommitted.unsent if one.number not in forgotten]
        entry = EndRun(run.lease, run.version, checkpoints=carried, forgotten=forgotten, **end)
        try:
            is_written = await self._write_end(entry)
        except DataRefused:
            if not carried:
                raise
            await run.uncommitted.wait()  # is one of them the cause, or the end itself?
            if run.outcome is not before:
                return await self._conclude_stopped(run)
            return await self._end_run(run, forgotten=forgotten, **end)
        for checkpoint in carried if is_written else ():
            self._runner.report_recorded(run.lease, checkpoint)
        return Handled()

    async def _write_end(self, entry: EndRun) -> bool:
        """Write the end of a run, and log a warning if it leaves signals unread. False if its lease was lost."""
        lease = entry.lease
        try:
            unread = await self._journal.submit(entry)
        except RunStopped as lost:
            log.debug("run.stopped", reason=str(lost))
            return False
        if unread:
            first = sorted(unread.items(), key=lambda one: (-one[1], one[0]))[:MAX_NAMES]
            names = ", ".join(f"{count} {name}" for name, count in first)
            signals = sum(unread.values())
            log.warning("signals.unread", run=lease.id, step=lease.label, signals=signals, names=names)
        return True


def choose_version(flows: Sequence[Workflow[Any, Any]], version: int | None) -> Workflow[Any, Any] | None:
    """Return the function for runs that began under `version`; for those that have not begun, the newest."""
    if version is None:
        return flows[-1]
    return next((flow for flow in flows if flow.since <= version <= flow.version), None)


async def call_workflow(run: RunContext, input: Any) -> str:
    """Call the function of a workflow; return its output as JSON."""
    flow = run.flow
    value = None
    if flow.takes_input:
        try:
            value = flow._decode_input(input)
        except Exception as error:
            raise DecodeError(f"the input of workflow {flow.name} cannot be decoded: {error}") from None
    run.function = flow.function(run, value) if flow.takes_input else flow.function(run)  # type: ignore[assignment]
    try:
        output = await run.function  # type: ignore[misc]
    finally:
        run.function = None
    if run.outcome is not None:
        return ""
    run.check_end()
    return run.encode_output(output)


def _is_final(error: BaseException) -> bool:
    """True if a replay would only raise the error again: it follows from the history of the run."""
    return isinstance(error, PgtaskError) and not isinstance(error, DatabaseError)
