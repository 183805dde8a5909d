"""The errors of pgtask, grouped by their cause.

Invariant: each message is one line that names the wrong thing and the remedy, so that a command can print it unchanged.
"""

from __future__ import annotations

__all__ = [
    "PgtaskError",
    "DefinitionError",
    "ConfigError",
    "AppLoadError",
    "LifespanError",
    "EnqueueError",
    "ConsumeError",
    "OutcomeError",
    "StepTimeout",
    "RowError",
    "DecodeError",
    "UnknownStepError",
    "ReplayError",
    "StepFailed",
    "SignalTimeout",
    "RunError",
    "RunFailed",
    "RunCancelled",
    "RunNotFound",
    "ResultTimeout",
    "GroupNotFound",
    "TaskNotFound",
    "RunStopped",
    "DatabaseError",
    "DatabaseUnavailable",
    "RowsLocked",
    "StatementTimeout",
    "PoolExhausted",
    "DatabaseRefused",
    "DataRefused",
    "SchemaError",
    "EmbeddedError",
]


class PgtaskError(Exception):
    """The root of all errors of this package."""

    def __init__(self, *args: object) -> None:  # that of `Exception` has no signature to show
        super().__init__(*args)


# --- the code or the configuration is wrong -----------------------------------------------------------------------


class DefinitionError(PgtaskError):
    """A task, a step or an app is declared in a way that cannot work. Raised by `App(...)`, before any I/O."""


class ConfigError(PgtaskError):
    """A flag, an environment variable or a key of `pyproject.toml` holds a value that cannot be used."""


class AppLoadError(PgtaskError):
    """The app named `module:attribute` could not be imported, or is not an `App`."""


class LifespanError(PgtaskError):
    """The lifespan in `App(..., lifespan=...)` has failed, at its start or at its end. The worker ends."""


class EnqueueError(PgtaskError, ValueError):
    """A step, time, delay, queue, priority, key or connection cannot be used to enqueue. Nothing was written."""


class ConsumeError(PgtaskError, ValueError):
    """A consumer was given a value that it cannot use: a lease of another consumer, a wrong delay. Nothing was sent."""


class OutcomeError(PgtaskError):
    """A step returned something that is not an outcome its annotation declares, or misused `ctx.transaction()`. Saved
    in the row's `error`."""


class StepTimeout(PgtaskError, TimeoutError):
    """A step ran longer than its `Policy(timeout=...)`. Counts as a failed try."""


# --- the row is wrong ---------------------------------------------------------------------------------------------


class RowError(PgtaskError):
    """A row of `pg_task` cannot be run as it is."""


class DecodeError(RowError):
    """The step of a row is not valid: broken JSON, a wrong envelope, wrong fields, or too large. The row is parked.

    In a workflow: a signal, or the result of a child, is not of the expected type.
    """


class UnknownStepError(RowError):
    """The row names a task or step that this app lacks. It is put back, or parked with `--unknown park`."""

    def __init__(self, name: str, family: str = "") -> None:
        super().__init__(f"unknown step {name}: this app does not define it")
        self.name = name
        self.family = family  # the name of its task


# --- workflows and their runs -------------------------------------------------------------------------------------


class ReplayError(PgtaskError):
    """A replayed workflow makes other calls than those that its run has recorded, or one where it must not. Names both.

    The run ends as ERROR with it. The workflow, which could catch it, gets `RunStopped` instead.
    """


class StepFailed(PgtaskError):
    """A step of a workflow has failed for good. Raised where it is awaited, the first time and in each replay.

    `step` is its name; `error` the text of its exception, which begins with the name of the exception's class; `tries`
    counts its tries.
    """

    def __init__(self, step: str, error: str, tries: int = 1) -> None:
        first, _, _ = error.partition("\n")
        super().__init__(f"step {step} failed: {first}")
        self.step = step
        self.error = error
        self.tries = tries


class SignalTimeout(PgtaskError, TimeoutError):
    """No signal of this name has come in time. Raised by `ctx.wait_for_signal(..., timeout=...)`."""


class RunError(PgtaskError):
    """A run has no result to give."""


class RunFailed(RunError):
    """The run has ended as ERROR; `error` is the whole text. You can resume it."""

    def __init__(self, run: object, error: str) -> None:
        first, _, _ = error.partition("\n")
        super().__init__(f"run {run} failed: {first}")
        self.run = run
        self.error = error


class RunCancelled(RunError):
    """The run was cancelled."""


class RunNotFound(RunError):
    """There is no such run, or it has ended."""


class ResultTimeout(RunError, TimeoutError):
    """The run has not ended within the time that `result(timeout=...)` was given. It goes on."""


class TaskNotFound(PgtaskError):
    """The table has no such task: it has finished, was cancelled, or never was. Finished tasks leave the table."""


class GroupNotFound(PgtaskError):
    """There is no group with this name."""


class RunStopped(BaseException):
    """Raised in a workflow where it awaits something of `ctx`, when its run must not go on here: it pauses, it
    contradicts its journal, its lease was lost, it was cancelled, or its worker leaves. Not an `Exception`, so that
    `except Exception` lets it pass; let it pass in `except BaseException` too. Each later call of `ctx` raises it
    again, and nothing is recorded."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)


# --- the database is unavailable, or refuses ----------------------------------------------------------------------


class DatabaseError(PgtaskError):
    """An error between us and Postgres."""


class DatabaseUnavailable(DatabaseError):
    """Postgres cannot be reached, or cannot serve us now: wait and try again."""


class RowsLocked(DatabaseUnavailable):
    """Another session has locked a row, or the table, for longer than we wait; or there was a deadlock with it, which
    the server has ended by undoing our statement, or the transaction of the caller."""


class StatementTimeout(DatabaseUnavailable):
    """A statement took longer than the `statement_timeout` of its session allows, or an operator has cancelled it. The
    server has undone it."""


class PoolExhausted(DatabaseError):
    """All connections of `ctx.db` are held by steps that each wait for one more, so none would ever come free."""


class DatabaseRefused(DatabaseError):
    """Postgres refuses for a reason that waiting will not fix: password, missing database, missing privilege."""


class DataRefused(DatabaseError):
    """Postgres refuses a value: not encodable, too long, or against a constraint; or a trigger, a rule or row security
    of yours keeps a row out. The statement has changed nothing."""


class SchemaError(DatabaseRefused):
    """The table `pg_task` is missing, or not of the shape this version needs. Names the command to run."""


class EmbeddedError(DatabaseError):
    """The embedded PostgreSQL cannot be installed, started or stopped."""
