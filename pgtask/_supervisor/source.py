"""The source files of the app, watched for changes with `--reload`.

Invariant: imports no user code. A worker sends the directories that its code came from; the supervisor polls the files
in them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

__all__ = ["SourceWatcher"]

POLL_INTERVAL = 0.5  # seconds


class SourceWatcher:
    """All source files in the directories it was given, imported or not: the next version of the app may import a file
    that this one does not."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, int]] = {}
        self._polled = 0.0

    def add_directories(self, paths: Iterable[str]) -> None:
        """Watch these too. A directory that is known already keeps the file times of its first poll."""
        for path in paths:
            if path not in self._files:
                self._files[path] = _list_sources(path)

    def find_change(self, now: float) -> str | None:
        """Return a file that was changed, added or removed since the last poll; None before the next poll is due."""
        if now - self._polled < POLL_INTERVAL:
            return None
        self._polled = now
        differing: set[tuple[str, int]] = set()
        for path, before in self._files.items():
            self._files[path] = after = _list_sources(path)
            differing |= before.items() ^ after.items()
        return min(differing)[0] if differing else None


def _list_sources(directory: str) -> dict[str, int]:
    """Return the source files directly in a directory, with the times of their last write in nanoseconds."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                with contextlib.suppress(OSError):  # an editor is replacing it: the next poll finds it
                    found[entry.path] = entry.stat().st_mtime_ns
    return found
