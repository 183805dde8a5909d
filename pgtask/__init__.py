"""Resumable tasks in one Postgres table, run by a supervisor of N processes."""

from typing import TYPE_CHECKING, Any

from pgtask._ids import TaskId
from pgtask._postgres.failures import ParkedTask
from pgtask.app import App
from pgtask.batch import Batch
from pgtask.client import Client
from pgtask.errors import (
    DatabaseRefused,
    DatabaseUnavailable,
    DefinitionError,
    EnqueueError,
    PgtaskError,
    ResultTimeout,
    RunCancelled,
    RunFailed,
    RunStopped,
    SignalTimeout,
    StepFailed,
)
from pgtask.outcome import Done, Enqueue, Fail, Next, Outcome
from pgtask.policy import Policy
from pgtask.runs import Run, RunStatus
from pgtask.task import BatchContext, Context, Task
from pgtask.task_function import task
from pgtask.tasks import TaskHandle, Tasks, TaskStatus
from pgtask.workflow import Permanent, Throttled, Transient, Workflow
from pgtask.workflow_context import Child, WorkflowContext
from pgtask.workflow_decorator import workflow

if TYPE_CHECKING:
    from pgtask.consumer import Consumer, Lease

__all__ = [
    # define
    "App",
    "Batch",
    "BatchContext",
    "Context",
    "Policy",
    "Task",
    "task",
    # say what comes next
    "Done",
    "Enqueue",
    "Fail",
    "Next",
    "Outcome",
    # make functions durable
    "Child",
    "Permanent",
    "Throttled",
    "Transient",
    "Workflow",
    "WorkflowContext",
    "workflow",
    # produce
    "Client",
    "ParkedTask",
    "Run",
    "RunStatus",
    "TaskId",
    "TaskHandle",
    "TaskStatus",
    "Tasks",
    # consume by hand
    "Consumer",
    "Lease",
    # errors that a program catches; the others are in `pgtask.errors`
    "DatabaseRefused",
    "DatabaseUnavailable",
    "DefinitionError",
    "EnqueueError",
    "PgtaskError",
    "ResultTimeout",
    "RunCancelled",
    "RunFailed",
    "RunStopped",
    "SignalTimeout",
    "StepFailed",
]

__version__ = "0.1.0"


if not TYPE_CHECKING:  # a checker would accept any name

    def __getattr__(name: str) -> Any:
        """Import the names that load a part of the worker when they are first used: most programs only produce."""
        if name in ("Consumer", "Lease"):
            from pgtask import consumer

            return getattr(consumer, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
