"""Messages about the database, for people: with the source of its DSN, and a remedy that can be typed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pgtask._dsn import redact
from pgtask.config import dsn_source

__all__ = ["with_dsn_source"]


def with_dsn_source(message: str, flags: Mapping[str, Any]) -> str:
    """Add the flag, variable or key that named the database to the message, and the given `--dsn` to its remedy."""
    found = dsn_source(flags)
    if found is None:
        return message
    source, shown = found[0], redact(found[1])
    if message.endswith(": pgtask migrate") and flags.get("dsn"):
        return f"{message} --dsn {shlex.quote(shown)}" if shown == found[1] else f"{message} with the same --dsn"
    return message.replace(f"[{shown}]", f"[{source}: {shown}]")
