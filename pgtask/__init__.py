"""Resumable tasks in one Postgres table, run by a supervisor of N processes."""

from typing import TYPE_CHECKING, Any

from pgtask._ids import TaskId
from pgtask._postgres.failures import ParkedTask
from pgtask._statement import statement
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
from pgtask.groups import Group, GroupHandle, GroupStatus
from pgtask.limits import Breaker, Limit, Rate
from pgtask.outcome import Done, Enqueue, Fail, Next, Outcome
from pgtask.policy import Policy
from pgtask.runs import Run, RunStatus
from pgtask.schedules import Schedule
from pgtask.task import BatchContext, Context, Task
from pgtask.task_function import task
from pgtask.tasks import TaskHandle, Tasks, TaskStatus
from pgtask.workflow import Permanent, Throttled, Transient, Workflow
from pgtask.workflow_context import Child, WorkflowContext
from pgtask.workflow_decorator import workflow

if TYPE_CHECKING:
    from pgtask.consumer import Consumer, Lease
    from pgtask.sync_client import SyncClient
    from pgtask.sync_handles import SyncGroupHandle, SyncRun, SyncTaskHandle, SyncTasks

__all__ = [
    # define
    "App",
    "Batch",
    "BatchContext",
    "Breaker",
    "Context",
    "Limit",
    "Policy",
    "Schedule",
    "Rate",
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
    "Group",
    "GroupHandle",
    "GroupStatus",
    "ParkedTask",
    "Run",
    "RunStatus",
    "TaskId",
    "TaskHandle",
    "TaskStatus",
    "Tasks",
    "SyncClient",
    "SyncGroupHandle",
    "SyncRun",
    "SyncTaskHandle",
    "SyncTasks",
    "statement",
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
        """Import what few programs use when it is first used: the rest of a program need not wait for it."""
        if name in ("Consumer", "Lease"):
            from pgtask import consumer

            return getattr(consumer, name)
        if name in ("SyncClient", "SyncGroupHandle", "SyncRun", "SyncTaskHandle", "SyncTasks"):
            from pgtask import sync_client, sync_handles

            return getattr(sync_client if name == "SyncClient" else sync_handles, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
