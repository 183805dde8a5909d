"""Errors for `with` where `async with` is meant, and the other way round: Python's own names no remedy.

Invariant: a type checker does not see these methods, so it goes on refusing the wrong statement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pgtask.errors import EnqueueError, PgtaskError

__all__ = ["AsyncWithOnly", "SyncWithOnly"]


class AsyncWithOnly:
    """A class that is entered by `async with` alone."""

    _with_error: ClassVar[type[PgtaskError]] = EnqueueError
    _sync_twin: ClassVar[str] = ""
    """What sync code uses in place of it."""

    if not TYPE_CHECKING:

        def __enter__(self):
            twin = f"; in sync code use {self._sync_twin}" if self._sync_twin else ""
            raise self._with_error(f"{type(self).__name__} is entered by `async with`, not by `with`{twin}")

        def __exit__(self, *_):
            pass


class SyncWithOnly:
    """A class that is entered by `with` alone."""

    if not TYPE_CHECKING:

        async def __aenter__(self):
            raise EnqueueError(f"{type(self).__name__} is entered by `with`; in async code use `async with Client()`")

        async def __aexit__(self, *_):
            pass
