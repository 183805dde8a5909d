"""Import the app from the project: in a worker, in a check, or in the supervisor with `--preload`.

Invariant: `import_app` puts the working directory in front of Python's path, as `python` does.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
import threading
from pathlib import Path

from pgtask._project import find_project, import_from_project, working_directory
from pgtask.app import App, load_app
from pgtask.errors import AppLoadError, ConfigError

__all__ = ["import_app", "preload_app", "source_directories"]


def import_app(reference: str | None) -> App:
    """Import the app. Raises `AppLoadError` with one readable line."""
    import_from_project()
    if reference is None:
        raise ConfigError("no app was given")
    return load_app(reference)


def preload_app(reference: str | None) -> None:
    """Import the app before the fork, so that workers share its memory.

    The objects are exempt from the garbage collector, which writes to each page that it visits: a written page is no
    longer shared. Raises `AppLoadError`, also if the import started a thread, which a fork does not copy.
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


def source_directories() -> list[str]:
    """Return the directories of all imported modules, except the standard library, installed packages and pgtask."""
    paths = sysconfig.get_paths()
    foreign = {Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    foreign.add(Path(__file__).resolve().parent)
    found = {path for path in (working_directory(), find_project()) if path is not None}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str):
            found.add(Path(file).resolve().parent)
    return sorted(str(path) for path in found if not foreign & {path, *path.parents})
