"""`pgtask parked`: the parked tasks, folded by the causes of their errors."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence

import msgspec

from pgtask._cli.database import with_connection
from pgtask._cli.options import add_filters, add_json, has_filters, task_filter
from pgtask._cli.output import json_line, note, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import relative_time
from pgtask._cli.tables import Screen, detect_screen, labelled_lines, printable
from pgtask._postgres.causes import MAX_CAUSES, ParkedCause, find_causes
from pgtask._postgres.listing import filter_words
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "cause_lines", "run"]

SUMMARY = "fold parked tasks by the causes of their errors"
HELP = f"""\
Fold the parked tasks by cause: the step, the first line of the error without its numbers, ids and quoted values (# for
each), and the place in your code. For each cause, that of most tasks first: how many, since when, the latest one, and
a command that says how many it would retry; without --dry-run it retries them. No more than {MAX_CAUSES:,} causes are
told apart.

    pgtask parked --task Shop --age 1h
"""


def add_arguments(parser: Parser) -> None:
    add_filters(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.key is not None:
        raise ConfigError("--key names one task, so there is nothing to fold: pgtask list --key")
    wanted = task_filter(args, ("parked",))
    causes = with_connection(args, lambda connection: find_causes(connection, wanted))
    if args.json:
        write_lines(json_line(_fields(cause)) for cause in causes)
        return 0
    write_lines(cause_lines(causes, detect_screen(sys.stdout), filters=filter_words(wanted)))
    tasks = sum(cause.tasks for cause in causes)
    if tasks:
        count = f"{tasks:,} parked task{'' if tasks == 1 else 's'}"
        note(f"{count} of {len(causes):,} cause{'' if len(causes) == 1 else 's'}")
    else:
        note("no parked tasks match" if has_filters(args) else "no parked tasks")
    return 0


def _fields(cause: ParkedCause) -> dict[str, object]:
    fields = msgspec.structs.asdict(cause)
    del fields["seen_at"]
    return fields | {"pattern": cause.pattern}


def cause_lines(causes: Sequence[ParkedCause], screen: Screen, *, filters: Sequence[str] = ()) -> Iterator[str]:
    """Yield the causes for people, a paragraph each. The command goes on one line, to be copied. It has the `filters`,
    and says first how many tasks it would retry: the text of an error may fit others too."""
    for number, cause in enumerate(causes):
        if number:
            yield ""
        step = printable(cause.step) or "other causes"
        yield from labelled_lines("parked", f"{cause.tasks:,} {step}", screen)
        if cause.text:
            yield from labelled_lines("error", printable(cause.text), screen)
        if cause.place is not None:
            yield from labelled_lines("place", printable(cause.place), screen)
        first, last = (relative_time(time, cause.seen_at) for time in (cause.first_at, cause.last_at))
        yield from labelled_lines("when", last if first == last else f"{first} to {last}", screen)
        yield from labelled_lines("example", str(cause.example), screen)
        if (pattern := cause.pattern) is not None and cause.step != "?" and "\\" not in cause.step:
            words = ["pgtask", "retry", *filters, "--step", cause.step, "--error", pattern]  # the last of a flag counts
            yield f"{'retry':<12}{printable(shlex.join([*words, '--dry-run']))}"
