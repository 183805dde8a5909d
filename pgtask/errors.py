"""Every error pgtask raises, grouped by whose fault it is.

Invariant: each message is one line that names the thing that is wrong and what to do about it, so that a command can
print it as it stands.
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
    "RunStopped",
    "DatabaseError",
    "DatabaseUnavailable",
    "RowsLocked",
    "DatabaseRefused",
    "DataRefused",
    "SchemaError",
    "EmbeddedError",
]


class PgtaskError(Exception):
    """The root of all errors of this package."""


# --- the code or the configuration is wrong -----------------------------------------------------------------------


class DefinitionError(PgtaskError):
    """A task, a step or an app is declared in a way that cannot work. Raised by `App(...)`, before any I/O."""


class ConfigError(PgtaskError):
    """A flag, an environment variable or a key of `pyproject.toml` holds a value that cannot be used."""


class AppLoadError(PgtaskError):
    """The app named `module:attribute` could not be imported, or is not an `App`."""


class LifespanError(PgtaskError):
    """What `App(..., lifespan=...)` names has failed, at its start or at its end. The worker ends."""


class EnqueueError(PgtaskError, ValueError):
    """A step, time, delay, queue, priority or key cannot be enqueued. Nothing has been sent to the database."""


class ConsumeError(PgtaskError, ValueError):
    """A consumer was given what it cannot use: a lease that is not its own, a wrong delay. Nothing has been sent."""


class OutcomeError(PgtaskError):
    """A step returned something that is not an outcome its annotation declares. Saved in the row's `error`."""


class StepTimeout(PgtaskError, TimeoutError):
    """A step ran longer than its `Policy(timeout=...)`. Counts as a failed try."""


# --- the row is wrong ---------------------------------------------------------------------------------------------


class RowError(PgtaskError):
    """A row of `pg_task` cannot be run as it is."""


class DecodeError(RowError):
    """The step of a row is not valid: broken JSON, a wrong envelope, wrong fields, or too large. The row is parked.

    In a workflow: a signal, or what a child has returned, is not of the type that is asked for.
    """


class UnknownStepError(RowError):
    """The row names a task or step that this app lacks. It is put back, or parked with `--unknown park`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"unknown step {name}: this app does not define it")
        self.name = name


# --- workflows and their runs -------------------------------------------------------------------------------------


class ReplayError(PgtaskError):
    """A workflow, replayed, does not ask for what its run has recorded, or asks where it may not. Names both sides.

    The run ends as ERROR with it. It is not raised in the workflow, where it could be caught: `RunStopped` is.
    """


class StepFailed(PgtaskError):
    """A step of a workflow has failed for good. Raised where it is awaited, the first time and in each replay.

    `step` is its name; `error` the text of what it raised, which begins with the name of the exception's class.
    """

    def __init__(self, step: str, error: str) -> None:
        first, _, _ = error.partition("\n")
        super().__init__(f"step {step} failed: {first}")
        self.step = step
        self.error = error


class SignalTimeout(PgtaskError, TimeoutError):
    """No signal of this name has come in time. Raised by `ctx.wait_for_signal(..., timeout=...)`."""


class RunError(PgtaskError):
    """A run has no result to give."""


class RunFailed(RunError):
    """The run has ended as ERROR; `error` is the whole text. It goes on if somebody resumes it."""

    def __init__(self, run: object, error: str) -> None:
        first, _, _ = error.partition("\n")
        super().__init__(f"run {run} failed: {first}")
        self.run = run
        self.error = error


class RunCancelled(RunError):
    """The run was cancelled."""


class RunNotFound(RunError):
    """There is no such run, or none any more that could be told anything."""


class ResultTimeout(RunError, TimeoutError):
    """The run has not ended within the time that `result(timeout=...)` was given. It goes on."""


class RunStopped(BaseException):
    """Raised within a workflow where it awaits something of `ctx`, when its run must not go on here: it pauses, it
    contradicts its journal, its lease was lost, it was cancelled, or its worker leaves. Not an `Exception`, so that
    `except Exception` lets it pass; let it pass in `except BaseException` too. What awaits `ctx` after it gets it
    again, and nothing is recorded."""


# --- the database is away, or refuses -----------------------------------------------------------------------------


class DatabaseError(PgtaskError):
    """Something between us and Postgres."""


class DatabaseUnavailable(DatabaseError):
    """Postgres cannot be reached or cannot serve us just now: wait and try again."""


class RowsLocked(DatabaseUnavailable):
    """Somebody else has locked a row, or the table, for longer than we wait, or waits for what we have locked."""


class DatabaseRefused(DatabaseError):
    """Postgres refuses for a reason that waiting will not mend: password, missing database, missing privilege."""


class DataRefused(DatabaseError):
    """Postgres refuses a value: not encodable, too long, or against a constraint. Nothing of the statement was done."""


class SchemaError(DatabaseRefused):
    """The table `pg_task` is missing, or not of the shape this version needs. Names the command to run."""


class EmbeddedError(DatabaseError):
    """The embedded PostgreSQL cannot be installed, started or stopped."""
