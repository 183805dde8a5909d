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
    RowError,
    RowsLocked,
    SchemaError,
    StepTimeout,
    UnknownStepError,
)
from pgtask.outcome import Done, Fail, Next, Outcome
from pgtask.policy import Policy
from pgtask.task import Context, Task

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
    # produce
    "Client",
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
    "RowError",
    "RowsLocked",
    "SchemaError",
    "StepTimeout",
    "UnknownStepError",
]

__version__ = "0.1.0"
