"""Resumable tasks in one Postgres table, run by a supervisor of N processes."""

from pgtask.app import App
from pgtask.client import Client
from pgtask.consumer import Consumer, Lease
from pgtask.errors import (
    AppLoadError,
    ConfigError,
    ConsumeError,
    DatabaseError,
    DatabaseRefused,
    DatabaseUnavailable,
    DataRefused,
    DecodeError,
    DefinitionError,
    EmbeddedError,
    EnqueueError,
    LifespanError,
    OutcomeError,
    PgtaskError,
    ReplayError,
    ResultTimeout,
    RowError,
    RowsLocked,
    RunCancelled,
    RunError,
    RunFailed,
    RunNotFound,
    RunStopped,
    SchemaError,
    SignalTimeout,
    StepFailed,
    StepTimeout,
    UnknownStepError,
)
from pgtask.outcome import Done, Fail, Next, Outcome
from pgtask.policy import Policy
from pgtask.runs import Run, RunStatus
from pgtask.task import Context, Task
from pgtask.workflow import Permanent, Transient, Workflow, workflow
from pgtask.workflow_context import Child, WorkflowContext

__all__ = [
    # define
    "App",
    "Context",
    "Policy",
    "Task",
    # say what comes next
    "Done",
    "Fail",
    "Next",
    "Outcome",
    # make functions durable
    "Child",
    "Permanent",
    "Transient",
    "Workflow",
    "WorkflowContext",
    "workflow",
    # produce
    "Client",
    "Run",
    "RunStatus",
    # consume by hand
    "Consumer",
    "Lease",
    # errors
    "AppLoadError",
    "ConfigError",
    "ConsumeError",
    "DatabaseError",
    "DatabaseRefused",
    "DatabaseUnavailable",
    "DataRefused",
    "DecodeError",
    "DefinitionError",
    "EmbeddedError",
    "EnqueueError",
    "LifespanError",
    "OutcomeError",
    "PgtaskError",
    "ReplayError",
    "ResultTimeout",
    "RowError",
    "RowsLocked",
    "RunCancelled",
    "RunError",
    "RunFailed",
    "RunNotFound",
    "RunStopped",
    "SchemaError",
    "SignalTimeout",
    "StepFailed",
    "StepTimeout",
    "UnknownStepError",
]

__version__ = "0.1.0"
