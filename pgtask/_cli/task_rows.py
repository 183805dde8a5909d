"""Rows of tasks as text: the label of a step, the colours of the states, and the JSON of a row.

Invariants: an object of JSON is one line and holds the whole row; a step that is not JSON is shown as its text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pgtask._cli.output import json_line
from pgtask._fastpath import scan_envelope
from pgtask._postgres.listing import Cursor
from pgtask._postgres.tasks import TaskRow
from pgtask.errors import DecodeError

__all__ = ["STATE_COLOURS", "step_label", "task_json"]

STATE_COLOURS = {"parked": "\x1b[31m", "leased": "\x1b[32m", "scheduled": "\x1b[2m"}


def step_label(step: str) -> str:
    """Return `Greeter.ReadName`, also of a step that was cut; `?` if it is no envelope."""
    try:
        task, name, _ = scan_envelope(step)
    except DecodeError:
        return _label_of_beginning(step)
    return f"{task}.{name}"


def _label_of_beginning(step: str) -> str:
    parts = step.split('"', 4)
    is_envelope = len(parts) == 5 and [part.strip() for part in parts[::2][:2]] == ["{", ":{"]
    return f"{parts[1]}.{parts[3]}" if is_envelope else "?"


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
