"""The name under which a command or a client leaves a row of who did it."""

from __future__ import annotations

import getpass
import socket

__all__ = ["operator_name"]


def operator_name() -> str:
    """Return the user and the host of this process, as alice@web-1."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without such a user
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
