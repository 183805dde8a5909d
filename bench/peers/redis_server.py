"""A Redis for each database, on a socket of its own. It writes nothing to disk; the DSN only names it."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path


def directory(dsn: str) -> Path:
    """Return the directory of the Redis of this database."""
    return Path(tempfile.gettempdir(), f"bench-redis-{hashlib.sha256(dsn.encode()).hexdigest()[:12]}")


def socket_path(dsn: str) -> Path:
    return directory(dsn) / "socket"


def begin_redis(dsn: str) -> None:
    """Start a Redis, after ending one that a failed run has left behind."""
    end_redis(dsn)
    where = directory(dsn)
    where.mkdir()
    memory_only = ["--save", "", "--appendonly", "no"]
    unix_socket = ["--port", "0", "--unixsocket", str(socket_path(dsn)), "--dir", str(where)]
    subprocess.run(
        ["redis-server", *unix_socket, *memory_only, "--daemonize", "yes"], check=True, stdout=subprocess.DEVNULL
    )
    while not connected(dsn):
        time.sleep(0.01)


def end_redis(dsn: str) -> None:
    connected(dsn, b"SHUTDOWN NOSAVE\r\n")
    shutil.rmtree(directory(dsn), ignore_errors=True)


def connected(dsn: str, order: bytes = b"PING\r\n") -> bool:
    """Return True if the Redis answers. To an order to shut down, its answer is the end of the connection."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path(dsn)))
        connection.sendall(order)
        connection.recv(16)
        return True
    return False
