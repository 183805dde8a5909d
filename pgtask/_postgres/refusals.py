"""Inserts into `pg_task` that the user's own triggers, rules or row security refuse.

Invariant: where no row comes back, we look for the cause a bounded number of times. If no task has the key, the cause
is one of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from pgtask.errors import DataRefused

__all__ = ["KEPT_OUT", "MAX_KEY_TRIES", "check_count", "refusals"]

MAX_KEY_TRIES = 20  # times that the task with a key may finish between our insert and the look for it

KEPT_OUT = "a trigger, rule or row security policy of yours on pg_task keeps it out"


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refusals by the user's own rules and row security into `DataRefused`: these are about the row."""
    try:
        yield
    except asyncpg.InvalidCachedStatementError:
        raise
    except asyncpg.FeatureNotSupportedError as error:
        raise DataRefused(f"a rule or row security of yours on pg_task does not allow it: {error.args[0]}") from error
    except (asyncpg.InsufficientPrivilegeError, asyncpg.WithCheckOptionViolationError) as error:
        if error.server_source_function != "ExecWithCheckOptions":
            raise
        raise DataRefused(f"{error.args[0]} (SQLSTATE {error.sqlstate})") from error


def check_count(inserted: int, wanted: int) -> None:
    """Raise `DataRefused` unless all rows were inserted."""
    if inserted != wanted:
        raise DataRefused(f"{wanted - inserted} of {wanted} tasks were not inserted: {KEPT_OUT}")
