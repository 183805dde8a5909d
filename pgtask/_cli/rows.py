"""How tasks look: the table of `list`, the page of `show`, and the JSON of both.

Invariants: an object of JSON is one line and holds the whole row; a step that is not JSON is shown as the text it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec

from pgtask._cli.names import NO_SUCH_TASK
from pgtask._cli.tables import Column, Screen, moment, one_line, printable, relative, table_lines
from pgtask._fastpath import scan_envelope
from pgtask._postgres.listing import Cursor
from pgtask._postgres.tasks import TaskRow, Verdict
from pgtask.errors import DecodeError

__all__ = ["list_lines", "refusal", "row_json", "show_lines"]

_COLOURS = {"parked": "\x1b[31m", "leased": "\x1b[32m", "scheduled": "\x1b[2m"}
_COLUMNS = (
    Column("id"),
    Column("state", colours=_COLOURS),
    Column("step"),
    Column("queue", usual="default"),
    Column("prio", is_number=True, usual="0"),
    Column("tried", is_number=True, usual="0"),
    Column("due"),
)
_CLAIMS = Column("claims", is_number=True)


def label(step: str) -> str:
    """`Greeter.ReadName`, also of a step that was cut; `?` if it is no envelope."""
    try:
        task, name, _ = scan_envelope(step)
    except DecodeError:
        return _label_of_beginning(step)
    return f"{task}.{name}"


def _label_of_beginning(step: str) -> str:
    parts = step.split('"', 4)
    is_envelope = len(parts) == 5 and [part.strip() for part in parts[::2][:2]] == ["{", ":{"]
    return f"{parts[1]}.{parts[3]}" if is_envelope else "?"


def list_lines(rows: Sequence[TaskRow], screen: Screen) -> Iterator[str]:
    """The table; with the column `claims` if a task was claimed again without a verdict on the claim before."""
    is_suspect = any(row.claims > 1 for row in rows)
    columns = (*_COLUMNS, _CLAIMS) if is_suspect else _COLUMNS
    cells = [
        (
            str(row.id),
            row.state,
            label(row.step),
            row.queue,
            str(row.priority),
            str(row.tried),
            relative(row.wakeup_at, row.seen_at),
            *([str(row.claims)] if is_suspect else []),
        )
        for row in rows
    ]
    errors = [one_line(row.error or "") for row in rows]
    return table_lines(columns, cells, screen, texts=("error", errors))


def row_json(row: TaskRow, place: Cursor | None = None) -> str:
    """The row, its `label` beside the step, and in a list its `cursor` for `--after`."""
    fields: dict[str, Any] = {"id": row.id, "state": row.state, "label": label(row.step)}
    fields |= msgspec.structs.asdict(row)
    fields["step"] = _as_json(row.step)
    del fields["seen_at"]
    if place is not None:
        fields["cursor"] = str(place)
    return msgspec.json.encode(fields).decode()


def _as_json(step: str) -> msgspec.Raw | str:
    try:
        return msgspec.Raw(msgspec.json.format(step.encode(), indent=-1))
    except (msgspec.DecodeError, RecursionError):
        return step


def show_lines(row: TaskRow, screen: Screen) -> Iterator[str]:
    now = row.seen_at
    values = {
        "id": str(row.id),
        "state": screen.paint(_COLOURS.get(row.state, ""), row.state),
        "step": printable(label(row.step)),
        "queue": printable(row.queue),
        "priority": str(row.priority),
        "key": "-" if row.key is None else printable(row.key),
        "tried": str(row.tried),
        "claims": str(row.claims),
        "wakeup_at": moment(row.wakeup_at, now),
        "created_at": moment(row.created_at, now),
        "updated_at": moment(row.updated_at, now),
        "lease": _lease(row),
    }
    for name, value in values.items():
        yield f"{name:<11} {value}"
    yield ""
    yield from (printable(line) for line in _pretty(row.step).split("\n"))
    if row.error is not None:
        yield ""
        yield screen.paint(_COLOURS["parked"], "error")
        yield from (f"  {printable(line)}" for line in row.error.splitlines())


def _lease(row: TaskRow) -> str:
    if row.locked_by is None or row.lock_expires_at is None:
        return "-"
    if row.lock_expires_at < row.seen_at:
        return f"{row.locked_by}, ran out {relative(row.lock_expires_at, row.seen_at)}: any worker may take the task"
    return f"{row.locked_by}, ends {relative(row.lock_expires_at, row.seen_at)} unless it is renewed"


def _pretty(step: str) -> str:
    try:
        return msgspec.json.format(step, indent=2)
    except (msgspec.DecodeError, RecursionError):
        return step


def refusal(verdict: Verdict) -> str | None:
    """Why a task was not changed, in words; None if it was."""
    if verdict.is_done:
        return None
    if not verdict.was_there:
        return NO_SUCH_TASK
    if _is_live(verdict.leased_until, verdict.seen_at):
        return "a worker has it under a live lease"
    return "somebody else took or changed it just now; try again"


def _is_live(leased_until: datetime | None, now: datetime) -> bool:
    return leased_until is not None and leased_until >= now
