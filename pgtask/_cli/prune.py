"""`pgtask prune`: remove what was kept and is old.

Invariant: parked tasks, failed runs among them, wait for a person, so they are removed only by one who asks for it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.output import say, show
from pgtask._postgres.prune import prune

__all__ = ["prune_command"]

SAY_EVERY = 5.0  # seconds
_NAMES = {"archive": "archived task", "runs": "ended run", "parked": "parked task"}
_HISTORY = ("archive", "runs")  # what is pruned unless something is named


def prune_command(args: argparse.Namespace) -> int:
    kinds = args.kinds or _HISTORY

    async def work(connection: Any) -> dict[str, int]:
        found = {}
        for kind in dict.fromkeys(kinds):
            progress = _Progress(kind)
            found[kind] = await prune(
                connection, kind, older_than=args.older_than, batch=args.batch, removed=progress.removed
            )
        return found

    for kind, removed in with_connection(args, work).items():
        if args.json:
            show([msgspec.json.encode({"kind": kind, "removed": removed}).decode()])
        else:
            show([f"{removed:,} {_NAMES[kind]}{'' if removed == 1 else 's'} removed"])
    return 0


class _Progress:
    """A line on stderr every few seconds, for what takes long."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._said = time.monotonic()

    def removed(self, total: int) -> None:
        if time.monotonic() - self._said >= SAY_EVERY:
            self._said = time.monotonic()
            say(f"{total:,} {_NAMES[self._kind]}s removed so far")
