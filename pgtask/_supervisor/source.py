"""The code of the app: loaded from the working directory, by a worker or before the fork, and watched for changes.

Invariant: without `preload`, nothing here imports user code into the supervisor. A worker tells the directories that
its code came from; the supervisor looks at the files in them, and needs to know nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import sysconfig
import threading
from collections.abc import Iterable
from pathlib import Path

from pgtask.app import App, load_app
from pgtask.errors import AppLoadError, ConfigError

__all__ = ["Watched", "directories", "import_app", "preload"]

LOOK_EVERY = 0.5


def import_app(reference: str | None) -> App:
    """The app, with the working directory in front of the path. Raises `AppLoadError` with one readable line."""
    directory = os.getcwd()
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)
    if reference is None:
        raise ConfigError("no app was given")
    return load_app(reference)


def preload(reference: str | None) -> None:
    """Import the app here, so that workers find it imported, in memory that they share.

    The collector is kept from touching these objects: a page that is written to is no longer shared. Raises
    `AppLoadError`, also if the import started a thread, which a fork would not take along.
    """
    threads = threading.active_count()
    gc.disable()
    try:
        import_app(reference)
    finally:
        gc.enable()
    started = threading.active_count() - threads
    if started:
        raise AppLoadError(
            f"app {reference!r}: importing it started {started} thread{'s' * (started > 1)}, and a fork does not take "
            "threads along: start them in the lifespan, or run without --preload"
        )
    gc.freeze()


def directories() -> list[str]:
    """Where the imported modules come from, but for the standard library, what is installed, and pgtask itself."""
    paths = sysconfig.get_paths()
    foreign = {Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    foreign.add(Path(__file__).resolve().parents[1])
    found = {Path(os.getcwd())}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str):
            found.add(Path(file).resolve().parent)
    return sorted(str(path) for path in found if not foreign & {path, *path.parents})


class Watched:
    """Source files under the eyes of the supervisor: all those in the directories it was told, whether imported or
    not, since the next version may import a file that this one does not."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, int]] = {}
        self._looked = 0.0

    def add(self, paths: Iterable[str]) -> None:
        """A directory that is known already keeps the files it was first seen with."""
        for path in paths:
            if path not in self._files:
                self._files[path] = _sources(path)

    def changed(self, now: float) -> str | None:
        """A file that was changed, added or removed since the last look, if it is time to look."""
        if now - self._looked < LOOK_EVERY:
            return None
        self._looked = now
        differing: set[tuple[str, int]] = set()
        for path, before in self._files.items():
            self._files[path] = after = _sources(path)
            differing |= before.items() ^ after.items()
        return min(differing)[0] if differing else None


def _sources(directory: str) -> dict[str, int]:
    """The source files directly in a directory, and when each was last written."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                with contextlib.suppress(OSError):  # an editor is replacing it: it will be there at the next look
                    found[entry.path] = entry.stat().st_mtime_ns
    return found
