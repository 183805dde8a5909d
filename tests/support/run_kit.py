"""Questions to runs of a real fleet, and its fleet of the app `flows`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TypeVar
from uuid import UUID

import fleet
from fix_database import run
from fleet import Fleet, Rows

from pgtask import Client

T = TypeVar("T")
SOON = 30.0
"""The seconds within which a run must end."""


def working(dsn: str, *arguments: str, procs: int = 1, app: str = "flows:app") -> AbstractContextManager[Fleet]:
    return fleet.ready(dsn, *arguments, procs=procs, app=app)


def ask(dsn: str, question: Callable[[Client], Awaitable[T]]) -> T:
    """Ask a client something."""

    async def main() -> T:
        async with Client(dsn) as client:
            return await question(client)

    return run(main())


def marks(rows: Rows, run: UUID) -> list[str]:
    """Return the steps that the run has marked."""
    return [row[0] for row in rows("SELECT step FROM mark WHERE run = $1 ORDER BY at", run)]


def until_paused(rows: Rows, run: UUID) -> None:
    """Wait until the run waits for something, without a worker."""
    rows.until(
        "SELECT locked_by IS NULL AND wakeup_at > now() AND waits_on IS NOT NULL "
        "FROM pg_task JOIN pg_task_runs USING (id) WHERE id = $1",
        run,
    )
