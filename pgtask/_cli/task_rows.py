"""Rows of tasks as text: the colours of the states, and the JSON of a row.

Invariants: an object of JSON is one line and holds the whole row; a step that is not JSON is shown as its text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pgtask._cli.output import json_line
from pgtask._postgres.listing import Cursor
from pgtask._postgres.task_status import step_label
from pgtask._postgres.tasks import TaskRow

__all__ = ["STATE_COLOURS", "task_json"]

STATE_COLOURS = {"parked": "\x1b[31m", "leased": "\x1b[32m", "scheduled": "\x1b[2m"}


def task_json(row: TaskRow, place: Cursor | None = None) -> str:
    """Return the row as JSON, with its `label` beside the step, and in a list its `cursor` for `--after`."""
    fields: dict[str, Any] = {"id": row.id, "state": row.state, "label": step_label(row.step)}
    fields |= msgspec.structs.asdict(row)
    fields["step"] = _step_json(row.step)
    del fields["seen_at"]
    if place is not None:
        fields["cursor"] = str(place)
    return json_line(fields)


def _step_json(step: str) -> msgspec.Raw | str:
    try:
        return msgspec.Raw(msgspec.json.format(step.encode(), indent=-1))
    except (msgspec.DecodeError, RecursionError):
        return step
