"""`pgtask prune`: remove old archived tasks and ended runs.

Invariant: parked tasks, failed runs among them, wait for a person: only a flag that names them removes them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import TIME_HELP, add_json, parse_age, whole_number
from pgtask._cli.output import note, write_lines
from pgtask._cli.parser import Parser
from pgtask._postgres.prune import prune

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "remove old archived tasks and ended runs"
HELP = """\
Remove archived tasks, and runs of workflows with their checkpoints, that ended longer ago than AGE, in batches that are
transactions of their own. Parked tasks and failed runs wait for you: only --parked removes them, by the time of their
parking. The rows of pgtask actions are removed too. Ended groups with their results stay until you say --groups. With
flags, prune removes only the kinds that they name.

    pgtask prune --older-than 30d
"""

NOTE_INTERVAL = 5.0  # seconds
_NAMES = {
    "archive": "archived task",
    "runs": "ended run",
    "parked": "parked task",
    "actions": "action",
    "groups": "group",
}
_HISTORY = ("archive", "runs", "actions")  # the kinds that are pruned unless one is named


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--older-than", type=parse_age, required=True, metavar="AGE", help=f"{TIME_HELP}, 8w; 0 is everything"
    )
    for kind, help in (
        ("archive", "archived tasks (if nothing is named: these, ended runs, and actions)"),
        ("runs", "runs that succeeded or were cancelled"),
        ("parked", "parked tasks and failed runs"),
        ("actions", "rows of what pgtask actions lists"),
        ("groups", "ended groups with their results"),
    ):
        parser.add_argument(f"--{kind}", dest="kinds", action="append_const", const=kind, help=help)
    parser.add_argument(
        "--batch",
        type=whole_number(1, 100_000),
        default=5_000,
        metavar="N",
        help="most tasks or runs at once (default: 5,000)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    kinds = args.kinds or _HISTORY

    async def prune_kinds(connection: Any) -> dict[str, int]:
        found = {}
        for kind in dict.fromkeys(kinds):
            progress = _ProgressNotes(kind)
            found[kind] = await prune(
                connection, kind, older_than=args.older_than, batch=args.batch, removed=progress.note_removed
            )
        return found

    for kind, removed in with_connection(args, prune_kinds).items():
        if args.json:
            write_lines([msgspec.json.encode({"kind": kind, "removed": removed}).decode()])
        else:
            write_lines([f"{removed:,} {_NAMES[kind]}{'' if removed == 1 else 's'} removed"])
    return 0


class _ProgressNotes:
    """A line on stderr every few seconds, while a long prune goes on."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._noted_at = time.monotonic()

    def note_removed(self, total: int) -> None:
        if time.monotonic() - self._noted_at >= NOTE_INTERVAL:
            self._noted_at = time.monotonic()
            note(f"{total:,} {_NAMES[self._kind]}s removed so far")
