"""The replay of a run to the end of its record, without a worker.

Invariants: no step runs, and nothing is written; the context answers each call that is recorded as that of a worker
does, and each other call waits. All branches go as far as their records lead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, cast

from pgtask._check.absent import Absent, refuse_use
from pgtask._check.causes import Break
from pgtask._check.remedies import CODE_RAISES, REPLAY, SLOW, for_input, for_result, for_use, for_version
from pgtask._check.time_limit import OutOfTime, time_limit
from pgtask._error_text import describe
from pgtask._fastpath import Handled
from pgtask._postgres.waiting import WaitingRun
from pgtask._workflow.branches import Wait
from pgtask._workflow.context import RunContext
from pgtask._workflow.executor import call_workflow, choose_version
from pgtask._workflow.history import REMEDY
from pgtask._workflow.steps import StepRunner
from pgtask._workflow.unawaited import tracked
from pgtask._workflow.values import History
from pgtask.errors import (
    DecodeError,
    PgtaskError,
    ReplayError,
    RunError,
    RunStopped,
    SignalTimeout,
    StepFailed,
    UnknownStepError,
)
from pgtask.policy import Policy
from pgtask.workflow import Workflow

__all__ = ["replay"]

_ANSWERS = (StepFailed, SignalTimeout, RunError)
"""Errors that follow from what the run has recorded: they are its result, and no break."""


class _UncheckedUse(ReplayError):
    """The code between the calls of a workflow uses something that a check does not have."""


class _UnreadableResult(ReplayError):
    """The recorded result of a step is not of the type that its function returns now."""


class _PausedClock:
    """The part of a journal that a replay needs: the time of the database."""

    def __init__(self, seen_at: datetime) -> None:
        self._seen_at = seen_at

    def now(self) -> datetime:
        return self._seen_at


class ReplayContext(RunContext):
    """The context of a run that is replayed to the end of its record."""

    def __init__(self, flow: Workflow[Any, Any], task: WaitingRun, history: History, *, max_bytes: int) -> None:
        lease = SimpleNamespace(id=task.id, tried=task.tried, is_running=True)
        of_worker = {name: Absent(f"ctx.{name}", self._refuse_use) for name in ("db", "client", "resources")}
        context = SimpleNamespace(task_id=task.id, attempt=task.tried + 1, **of_worker)
        runner = StepRunner(
            cast(Any, SimpleNamespace(draining=False)), cast(Any, None), max_bytes=max_bytes, end_if_copy=_ignore
        )
        journal = cast(Any, _PausedClock(history.seen_at))
        super().__init__(flow, cast(Any, lease), cast(Any, context), history, journal=journal, runner=runner)

    @tracked
    async def step(  # type: ignore[override]  # the overloads are for users
        self, name: str, function: Any, /, *args: Any, policy: Policy | None = None
    ) -> Any:
        self._refuse_absent_function(function)
        try:
            return await super().step(name, function, *args, policy=policy)
        except PgtaskError:
            raise
        except Exception as error:
            self._stop_for_error(_UnreadableResult(f"the recorded result of step {name!r} cannot be decoded: {error}"))

    def _refuse_absent_function(self, function: Any) -> None:
        """Refuse to tell the type of the result of a function that hangs on something absent."""
        while isinstance(function, partial):
            function = function.func
        if isinstance(function, Absent):
            refuse_use(function)

    def _refuse_use(self, what: str) -> NoReturn:
        self._stop_for_error(_UncheckedUse(what))

    async def _begin(self) -> None:
        """Wait in place of anything that is not recorded."""
        await self._wait(Wait("what is not recorded"))

    async def _wait(self, wait: Wait) -> None:
        await super()._wait(Wait(wait.what))  # without a time at which it looks again

    async def _suspend(self, waits: list[Wait]) -> None:
        """End the replay, as all branches have come to the end of their records."""
        for left in self.history.unreached:
            if not any(_comes_after(left.place, place) for place in self._branches.places):
                self._stop_for_error(
                    ReplayError(
                        f"the workflow passes {left.kind} {left.name!r}, which the journal has at place {left.place}; "
                        f"its code has changed: {REMEDY}"
                    )
                )
        self._stop(Handled(), "its record ends here")


def _comes_after(place: str, other: str) -> bool:
    """Return whether a branch that has come to the `other` place may still come to a place. Calls and branches take
    turns in both."""
    for at, (one, two) in enumerate(zip(place.split("."), other.split("."), strict=False)):
        if one != two:
            return at % 2 == 0 and int(one) > int(two)
    return False


def _ignore(_: object) -> None:
    """Stand for what a worker does after a step."""


async def replay(
    flows: Sequence[Workflow[Any, Any]],
    task: WaitingRun,
    input: Any,
    history: History,
    *,
    max_bytes: int,
    seconds: float,
) -> Break | None:
    """Replay a run by one of the functions of its workflow; return why it breaks, or None."""
    name = flows[0].name
    flow = choose_version(flows, history.version)
    if flow is None:
        text = str(UnknownStepError(f"{name} version {history.version}"))
        return Break("version", name, f"UnknownStepError: {text}", lambda: for_version(map(_describe_versions, flows)))
    # In a task of its own: an error of the code may leave that cancelled.
    return await asyncio.create_task(_replay(flow, task, input, history, max_bytes, seconds))


def _describe_versions(flow: Workflow[Any, Any]) -> str:
    span = f"versions {flow.since} to" if flow.since < flow.version else "version"
    return f"{span} {flow.version}"


async def _replay(
    flow: Workflow[Any, Any], task: WaitingRun, input: Any, history: History, max_bytes: int, seconds: float
) -> Break | None:
    run = ReplayContext(flow, task, history, max_bytes=max_bytes)
    error: BaseException | None = None
    try:
        async with time_limit(seconds):
            await call_workflow(run, input)
    except OutOfTime:
        text = f"the code between its calls took longer than {seconds:g} s"
        return Break("unchecked", flow.name, text, lambda: SLOW)
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt):
            raise
        error = raised
    finally:
        run.close()
    if run.outcome is not None:
        error = run.outcome if isinstance(run.outcome, Exception) else None
    return None if error is None or isinstance(error, _ANSWERS) else _explain(flow.name, error)


def _explain(name: str, error: BaseException) -> Break:
    """Return the break that follows from an error of a replay."""
    what, text = str(error), describe(error).replace(f": {REMEDY}", "")
    match error:
        case _UncheckedUse():
            return Break("unchecked", name, f"the code between its calls uses {what}", lambda: for_use(what))
        case _UnreadableResult():
            return Break("result", name, what, lambda: for_result(what))
        case ReplayError():
            return Break("replay", name, text, lambda: REPLAY)
        case DecodeError() if what.startswith("the input of workflow"):
            return Break("input", name, text, lambda: for_input(what))
        case DecodeError():
            return Break("result", name, text, lambda: for_result(what))
        case RunStopped():
            return Break("raises", name, "the workflow raised RunStopped by itself", lambda: CODE_RAISES)
    return Break("raises", name, text, lambda: CODE_RAISES)
