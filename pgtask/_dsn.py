"""The text that names a database: what can be said of it without connecting, and how it is shown.

Invariant: no message or log shows a password.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["check_dsn", "redact"]

_SCHEMES = ("postgresql://", "postgres://")
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?")


def check_dsn(value: Any) -> str:
    """Return `value` if it may be a DSN. Raises `ValueError`."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    if not value.startswith(_SCHEMES):
        scheme, found, _ = value.partition("://")
        wrong = f"; {scheme} is another scheme" if found else ""
        raise ValueError(
            f"use postgresql://USER@HOST/DATABASE, or postgresql:///DATABASE?host=/tmp for a socket{wrong}"
        )
    for host in re.split("[/?#]", value.partition("://")[2])[0].rpartition("@")[2].split(","):
        if not _HOST.fullmatch(host):
            raise ValueError(f"{host} is not a host and a port")
    return value


def redact(dsn: str) -> str:
    """The DSN without its password, for logs and messages."""
    dsn = re.sub(r"(://[^/@:?]*):.*@", r"\1:***@", dsn)  # up to the last @: a password may hold any character
    return re.sub(r"((?:^|[?&\s])(?:ssl)?password\s*=\s*)(?:'(?:\\.|[^'\\])*'|[^&\s]+)", r"\1***", dsn)
