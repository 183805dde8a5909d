"""The lifespan of an app, entered and left by a worker, with errors that name it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pgtask._error_text import one_line
from pgtask.app import App
from pgtask.errors import LifespanError

__all__ = ["OVERDUE", "opened_resources"]

OVERDUE = "the lifespan did not end within the grace"


@asynccontextmanager
async def opened_resources(app: App) -> AsyncIterator[Any]:
    """Enter the lifespan and yield its resources, None without one.

    Raises `LifespanError` for an error at its start or end, including sys.exit(), and for a cancellation at its end,
    which means that the grace was over. An error in between passes through it, as through any context manager.
    """
    if app.lifespan is None:
        yield None
        return
    passing: BaseException | None = None
    when = ""
    try:
        manager: Any = app.lifespan()
        if not hasattr(manager, "__aenter__"):
            raise LifespanError(
                f"the lifespan returned an object of type {type(manager).__name__}, "
                "which is not an async context manager; decorate it with @asynccontextmanager"
            )
        async with manager as resources:
            when = " at its end"
            try:
                yield resources
            except BaseException as error:
                passing = error
                raise
    except LifespanError:
        raise
    except asyncio.CancelledError:
        if passing or not when:
            raise
        raise LifespanError(OVERDUE) from None
    except (Exception, SystemExit) as error:
        if error is passing:
            raise
        raise LifespanError(f"the lifespan failed{when}: {one_line(error)}") from error
