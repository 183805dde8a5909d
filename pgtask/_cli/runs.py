"""The commands about runs of workflows: `runs`, `run`, `signal` and `resume`.

Invariants: as of the other commands; a signal that was sent is durable when the command ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import msgspec

from pgtask._cli.arguments import SOME_FAILED
from pgtask._cli.database import with_connection
from pgtask._cli.output import say, show
from pgtask._cli.tables import Column, Screen, moment, one_line, printable, relative, screen_of, table_lines
from pgtask._postgres.runs import (
    CheckpointRow,
    RunStatus,
    list_runs,
    read_checkpoints,
    read_statuses,
    resume_runs,
    send_signal,
)
from pgtask.errors import ConfigError, RunNotFound
from pgtask.workflow import check_name

__all__ = ["resume_command", "run_command", "runs_command", "signal_command"]

NO_SUCH_RUN = "there is no such run"
NOTHING_TO_RESUME = "a worker has it, it is due or scheduled, it has ended well, or there is no such run"
_COLOURS = {"ERROR": "\x1b[31m", "RUNNING": "\x1b[32m", "PAUSED": "\x1b[2m", "CANCELLED": "\x1b[2m"}
_RUN_COLUMNS = (
    Column("id"),
    Column("state", colours=_COLOURS),
    Column("workflow"),
    Column("created"),
    Column("recorded", is_number=True),
    Column("last", usual="-"),
    Column("waits on", usual="-"),
)
_CHECKPOINT_COLUMNS = (
    Column("#", is_number=True),
    Column("place"),
    Column("kind"),
    Column("name"),
    Column("took"),
    Column("recorded"),
)


def runs_command(args: argparse.Namespace) -> int:
    before = None if args.before is None else _id(args.before)
    found, following = with_connection(
        args,
        lambda connection: list_runs(connection, name=args.name, state=args.state, limit=args.limit, before=before),
    )
    if args.json:
        show(msgspec.json.encode(_plain(status)).decode() for status in found)
    elif found:
        show(_table(found, screen_of(sys.stdout)))
    elif following is None:
        say("no runs")
    if following is not None:
        say(f"there may be more: --before {following}")
    return 0


def run_command(args: argparse.Namespace) -> int:
    run = _id(args.id)

    async def look(connection: Any) -> tuple[list[RunStatus], list[CheckpointRow]]:
        return await read_statuses(connection, [run]), await read_checkpoints(connection, run)

    found, checkpoints = with_connection(args, look)
    if not found:
        say(f"{run}: {NO_SUCH_RUN}")
        return SOME_FAILED
    if args.json:
        recorded = [msgspec.structs.asdict(checkpoint) for checkpoint in checkpoints]
        show([msgspec.json.encode({**_plain(found[0]), "checkpoints": [_with_json(row) for row in recorded]}).decode()])
        return 0
    screen = screen_of(sys.stdout)
    show((*_page(found[0], screen), *_journal(checkpoints, found[0], screen)))
    return 0


def signal_command(args: argparse.Namespace) -> int:
    run, name = _id(args.id), check_name("signal", args.name, ConfigError)
    text = sys.stdin.read() if args.value == "-" else args.value
    try:
        payload = msgspec.json.format(text, indent=-1)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the value of the signal is not valid JSON: {error}") from None

    async def send(connection: Any) -> tuple[bool, str | None]:
        before = await read_statuses(connection, [run])
        return await send_signal(connection, run, name, payload), before[0].waits_on if before else None

    try:
        was_sent, waits_on = with_connection(args, send)
        if was_sent:
            show([_sent(name, waits_on)])
            return 0
        say(f"{run}: it has ended, or never was; the signal was not sent")
    except RunNotFound as error:
        say(str(error))
    return SOME_FAILED


def resume_command(args: argparse.Namespace) -> int:
    runs = [_id(word) for word in args.ids]
    resumed, taken = with_connection(args, lambda connection: resume_runs(connection, runs))
    show([f"{len(resumed):,} run{'' if len(resumed) == 1 else 's'} resumed"])
    reasons = {one.run: str(one) for one in taken}
    left = [run for run in runs if run not in resumed]
    for run in left:
        say(f"{run}: {reasons.get(run, NOTHING_TO_RESUME)}")
    return SOME_FAILED if left else 0


def _sent(name: str, waits_on: str | None) -> str:
    """Says so when it may be the wrong name."""
    if waits_on is None:
        return "sent; kept until the run waits for it"
    if f"signal {name}" in waits_on.split(", "):
        return "sent"
    return f"sent; kept until the run waits for it: now it waits for {waits_on}"


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ConfigError(f"{text} is not the id of a run") from None


# --- how runs look


def _plain(status: RunStatus) -> dict[str, Any]:
    fields = msgspec.structs.asdict(status)
    del fields["seen_at"]
    return _with_json(fields)


def _with_json(fields: dict[str, Any]) -> dict[str, Any]:
    """What is JSON in a column is JSON in the object."""
    for name in ("step", "output", "result"):
        if fields.get(name) is not None:
            fields[name] = msgspec.Raw(fields[name].encode())
    return fields


def _table(runs: list[RunStatus], screen: Screen) -> Iterator[str]:
    cells = [
        (
            str(run.id),
            run.state,
            run.name or "-",
            relative(run.created_at, run.seen_at),
            str(run.recorded),
            run.last_step or "-",
            run.waits_on or "-",
        )
        for run in runs
    ]
    return table_lines(_RUN_COLUMNS, cells, screen, texts=("error", [one_line(run.error or "") for run in runs]))


def _page(run: RunStatus, screen: Screen) -> Iterator[str]:
    now = run.seen_at
    values = {
        "id": str(run.id),
        "state": screen.paint(_COLOURS.get(run.state, ""), run.state),
        "workflow": f"{run.name}, version {run.version}" if run.version else str(run.name),
        "parent": None if run.parent is None else str(run.parent),
        "waits on": run.waits_on,
        "due_at": None if run.due_at is None else moment(run.due_at, now),
        "tried": str(run.tried) if run.tried else None,
        "created_at": moment(run.created_at, now),
        "started_at": None if run.started_at is None else moment(run.started_at, now),
        "ended_at": None if run.ended_at is None else moment(run.ended_at, now),
        "input": run.step,
        "output": run.output,
    }
    for name, value in values.items():
        if value is not None:
            yield f"{name:<11} {value if name == 'state' else printable(value)}"
    if run.error is not None:
        yield ""
        yield screen.paint(_COLOURS["ERROR"], "error")
        yield from (f"  {printable(line)}" for line in run.error.splitlines())


def _journal(checkpoints: list[CheckpointRow], run: RunStatus, screen: Screen) -> Iterator[str]:
    if not checkpoints:
        return
    cells = [
        (
            str(row.number),
            row.place,
            row.kind,
            row.name,
            f"{row.seconds:.3f} s" if row.kind == "step" else "-",
            relative(row.recorded_at, run.seen_at),
        )
        for row in checkpoints
    ]
    notes = [_note(row, run) for row in checkpoints]
    yield ""
    yield from table_lines(_CHECKPOINT_COLUMNS, cells, screen, texts=("result", notes))


def _note(row: CheckpointRow, run: RunStatus) -> str:
    """What came of it, or when something will."""
    due = "" if row.due_at is None else moment(row.due_at, run.seen_at)
    if row.kind == "step" and due:
        return f"try {row.tried + 1} at {due}, after {one_line(row.error or '')}"
    return one_line(row.error or row.result or (f"until {due}" if due else ""))
