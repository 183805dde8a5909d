"""A project's embedded server on disk: its paths, its socket, its process and its lock.

Invariant: a pid file counts only if the process that it names is really this directory's server.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pgtask._postgres.server_user import User, check_private, server_user
from pgtask._postgres.user_files import create_file, open_folder

if sys.platform != "win32":
    import fcntl

__all__ = ["SOCKET", "Home", "postmaster", "ready_dsn", "take_lock"]

SOCKET = ".s.PGSQL.5432"
_MAX_SOCKET_PATH = 103  # bytes that every system accepts: macOS accepts 103, Linux 107


class Home:
    """The paths of one project's server."""

    def __init__(self, directory: Path) -> None:
        self.root = (directory / ".pgtask").resolve()
        self.data = self.root / "data"
        self.pid_file = self.data / "postmaster.pid"
        self.lock = self.root / "lock"
        self.log = self.root / "log"

    def has_data(self) -> bool:
        """Return whether there is a database. One that this process may not read counts: the next access gives the
        error."""
        try:
            os.stat(self.data / "PG_VERSION")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True

    def sockets(self, user: User) -> Path:
        """The socket's directory: in `.pgtask`, unless that path is too long or does not fit into a DSN."""
        path = self.root / "run"
        if len(os.fsencode(path / SOCKET)) <= _MAX_SOCKET_PATH and re.fullmatch(r"[\w./@+= -]+", str(path)):
            return path
        # Not below TMPDIR: every process must find the same directory.
        return Path("/tmp", f"pgtask-{user.uid}-{hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]}")


def ready_dsn(home: Home) -> str | None:
    """Return the DSN of the server if it accepts connections, else None."""
    if not home.has_data():
        return None
    user = server_user(home.data)
    sockets = home.sockets(user)
    try:
        # The eighth line is the postmaster's state. A stale file may say "ready" too, but has no listener.
        if _pid_lines(home, user)[7].strip() != "ready":
            return None
        check_private(sockets, user)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(sockets / SOCKET))
    except (FileNotFoundError, ConnectionRefusedError, IndexError):
        return None
    return f"postgresql://postgres@/postgres?host={quote(str(sockets))}&port=5432"


def _pid_lines(home: Home, user: User) -> list[str]:
    """Read the lines of the pid file. Raises `FileNotFoundError` if there is none."""
    with open_folder(home.data, user) as folder:
        return folder.read(home.pid_file.name).decode(errors="replace").split("\n")


def postmaster(home: Home) -> Any:
    """Return the process (of psutil) that the pid file names, if it is really this directory's server: another process
    may have the pid of a dead one by now."""
    import psutil

    if not home.has_data():
        return None
    user = server_user(home.data)
    try:
        process = psutil.Process(int(_pid_lines(home, user)[0]))
        if process.name() != "postgres":
            return None
        try:
            ours = process.cwd() == str(home.data)
        except psutil.AccessDenied:  # root without SYS_PTRACE, as in a container; command lines are public
            sockets = str(home.sockets(user))
            ours = any(sockets in argument for argument in process.cmdline())
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None
    return process if ours else None


def take_lock(home: Home) -> int | None:
    """Take the lock: return a descriptor that holds it, or None while other processes hold it."""
    home.root.mkdir(mode=0o755, exist_ok=True)
    create_file(home.root / ".gitignore", "*\n")
    lock = os.open(home.lock, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
