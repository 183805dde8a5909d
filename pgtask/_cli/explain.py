"""Messages about the database, for a person: with who named it, and a remedy that can be typed as it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pgtask._dsn import redact
from pgtask.config import dsn_source

__all__ = ["explained"]


def explained(message: str, flags: Mapping[str, Any]) -> str:
    """What the database has said, with the flag, variable or key that named it; the remedy with the `--dsn` given."""
    found = dsn_source(flags)
    if found is None:
        return message
    source, shown = found[0], redact(found[1])
    if message.endswith(": pgtask migrate"):
        return f"{message} --dsn {shlex.quote(shown)}" if flags.get("dsn") else message
    return message.replace(f"[{shown}]", f"[{source}: {shown}]")
