"""Rows of runs as text: the colours of the states, and the fields of their JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from pgtask._postgres.runs import RunStatus

__all__ = ["RUN_COLOURS", "raw_json", "run_fields"]

RUN_COLOURS = {"ERROR": "\x1b[31m", "RUNNING": "\x1b[32m", "PAUSED": "\x1b[2m", "CANCELLED": "\x1b[2m"}


def run_fields(status: RunStatus) -> dict[str, Any]:
    """Return the columns of a run, for an object of JSON."""
    fields = msgspec.structs.asdict(status)
    del fields["seen_at"]
    return raw_json(fields)


def raw_json(fields: dict[str, Any]) -> dict[str, Any]:
    """Embed the columns that hold JSON as JSON, not as text."""
    for name in ("step", "input", "output", "result"):
        if fields.get(name) is not None:
            fields[name] = msgspec.Raw(fields[name].encode())
    return fields
