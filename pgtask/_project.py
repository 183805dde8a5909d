"""The project directory, where pgtask reads `pyproject.toml` and `.pgtask`; found as git finds a repository.

It is the nearest directory, the working directory first, that has an embedded database (`.pgtask/data`) or a
`pyproject.toml` with `[tool.pgtask]`; without one, the working directory.

Invariant: above the working directory, no file counts that another user could have written.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tomllib
from pathlib import Path

from pgtask.errors import ConfigError

if sys.platform != "win32":
    import grp
    import pwd

__all__ = ["find_project", "import_from_project", "project_directory", "working_directory"]

SECTION = "pgtask"


def working_directory() -> Path | None:
    """Return the working directory; None if it was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def find_project() -> Path | None:
    """Return the project directory; None if the working directory was removed."""
    start = working_directory()
    if start is None:
        return None
    for directory in (start, *start.parents):
        if directory != start and not _is_safe(directory):
            break
        if _is_project(directory, start):
            return directory
    return start


def project_directory() -> Path:
    """Return the project directory. Raises `ConfigError` if the working directory was removed."""
    found = find_project()
    if found is None:
        raise ConfigError(
            "the working directory no longer exists: change to another one, or name the database by --dsn or "
            "DATABASE_URL"
        )
    return found


def import_from_project() -> None:
    """Put the working directory in front of Python's path, and the project directory behind it.

    `python` does the former by itself, a console script does not.
    """
    paths = [str(path) for path in (working_directory(), find_project()) if path is not None]
    paths = list(dict.fromkeys(paths))
    if sys.path[: len(paths)] != paths:
        sys.path[:0] = paths


def _is_safe(path: Path) -> bool:
    """Tell if only we and root can write to a file or directory."""
    if sys.platform == "win32":
        return False  # Windows has no comparable owners
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o002:
        return False
    return not status.st_mode & 0o020 or _is_group_of_one(status.st_gid, status.st_uid)


def _is_group_of_one(gid: int, uid: int) -> bool:
    """Tell if a group is the private group of a user: it has the user's name, and no other members.

    On systems with such groups, the files of a user are usually writable by the group.
    """
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(uid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _is_ours_or_server(data: Path) -> bool:
    """Tell if the data belong to us or to our server.

    For root the server runs as the owner of the data, `nobody` or another user: then the check of `.pgtask` suffices,
    since only root can write there.
    """
    return os.geteuid() in (0, data.stat().st_uid) or data.stat().st_uid == 0


def _is_project(directory: Path, start: Path) -> bool:
    embedded, file = directory / ".pgtask", directory / "pyproject.toml"
    is_here = directory == start
    with contextlib.suppress(PermissionError):
        if (embedded / "data").is_dir() and (is_here or (_is_safe(embedded) and _is_ours_or_server(embedded / "data"))):
            return True
    try:
        if not is_here and file.exists() and not _is_safe(file):
            return False
        with file.open("rb") as stream:
            tool = tomllib.load(stream).get("tool", {})
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return is_here  # the caller reads this file and reports the error
    return isinstance(tool, dict) and SECTION in tool
