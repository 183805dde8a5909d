"""What is there of a project's embedded server: its paths, its socket, its process and its lock.

Invariant: a pid file is believed only as far as the process that it names is this directory's server indeed.
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

if sys.platform != "win32":
    import fcntl

__all__ = ["SOCKET", "Home", "postmaster", "ready_dsn", "take_lock"]

SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET = 103  # bytes of a path that every system takes: macOS has room for 103, Linux for 107


class Home:
    """The paths of one project's server."""

    def __init__(self, directory: Path) -> None:
        self.root = (directory / ".pgtask").resolve()
        self.data = self.root / "data"
        self.pid_file = self.data / "postmaster.pid"
        self.lock = self.root / "lock"
        self.log = self.root / "log"

    def sockets(self, user: User) -> Path:
        """The socket's directory: in `.pgtask`, unless that is too long a path or one a DSN cannot carry."""
        path = self.root / "run"
        if len(os.fsencode(path / SOCKET)) <= _LONGEST_SOCKET and re.fullmatch(r"[\w./@+= -]+", str(path)):
            return path
        # Not below the TMPDIR of the moment: every process must find the same one.
        return Path("/tmp", f"pgtask-{user.uid}-{hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]}")


def ready_dsn(home: Home) -> str | None:
    if not home.data.exists():
        return None
    user = server_user(home.data)
    sockets = home.sockets(user)
    try:
        # The eighth line is the postmaster's state. A stale file may say "ready" too, but has no listener.
        if home.pid_file.read_text().split("\n")[7].strip() != "ready":
            return None
        check_private(sockets, user)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(sockets / SOCKET))
    except (FileNotFoundError, ConnectionRefusedError, IndexError):
        return None
    return f"postgresql://postgres@/postgres?host={quote(str(sockets))}&port=5432"


def postmaster(home: Home) -> Any:
    """The process (psutil's) that the pid file names, if it is this directory's server indeed: the pid of a
    dead one may be anybody's by now."""
    import psutil

    try:
        process = psutil.Process(int(home.pid_file.read_text().split("\n")[0]))
        if process.name() != "postgres":
            return None
        try:
            ours = process.cwd() == str(home.data)
        except psutil.AccessDenied:  # root without SYS_PTRACE, as in a container; command lines are public
            sockets = str(home.sockets(server_user(home.data)))
            ours = any(sockets in argument for argument in process.cmdline())
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None
    return process if ours else None


def take_lock(home: Home) -> int | None:
    """A descriptor that holds the lock, or None while others hold it."""
    home.root.mkdir(mode=0o755, exist_ok=True)
    if not (ignore := home.root / ".gitignore").exists():
        ignore.write_text("*\n")
    lock = os.open(home.lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
