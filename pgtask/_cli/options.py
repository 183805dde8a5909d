"""Options that several commands share, and the values of options: their text parsed, or refused with what was expected.

Invariant: nothing here touches a database.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from pgtask._cli.parser import Parser
from pgtask._durations import DURATION_EXAMPLES, MAX_SECONDS, parse_duration
from pgtask._placement import scoped_key
from pgtask._postgres.listing import TaskFilter, check_error_pattern
from pgtask.errors import ConfigError, EnqueueError
from pgtask.policy import check_queue

__all__ = [
    "FILTERS",
    "ID_HELP",
    "TIME_HELP",
    "add_filters",
    "add_json",
    "add_page",
    "add_traceback",
    "has_filters",
    "parse_age",
    "parse_pattern",
    "parse_queues",
    "parse_rate",
    "parse_seconds",
    "parse_time",
    "parse_where",
    "task_filter",
    "whole_number",
]

FILTERS = ("queue", "task", "step", "key", "error", "age", "where", "group")
MAX_PAGE = 10_000
ID_HELP = "the id, or its first or last digits, 8 or more, if no other one has them"
TIME_HELP = "seconds, or with units: 90, 5m, 1h30m, 2d"


# --- options ------------------------------------------------------------------------------------------------


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: an object of JSON on each line")


def add_page(parser: Parser, rows: str) -> None:
    """Add `--limit`, the number of `rows` on a page."""
    limit = whole_number(1, MAX_PAGE)
    parser.add_argument(
        "-n", "--limit", type=limit, default=50, metavar="N", help=f"{rows} on a page (default: %(default)s)"
    )


def add_traceback(parser: Parser) -> None:
    parser.add_argument("--traceback", action="store_true", help="if the app cannot be loaded, show the traceback")


def add_filters(parser: Parser, *, queue_flags: Sequence[str] = ("-q", "--queue")) -> None:
    """Add the options that `task_filter` reads."""
    parser.add_argument(
        *queue_flags,
        dest="queue",
        action="extend",
        type=parse_queues,
        metavar="NAMES",
        help="only these queues, as a or a,b",
    )
    parser.add_argument("--task", metavar="TASK", help="only this task, as Greeter")
    parser.add_argument("--step", metavar="STEP", help="only this step, as ReadName or Greeter.ReadName")
    parser.add_argument("--key", metavar="KEY", help="only those with this key, of the --task it belongs to")
    parser.add_argument(
        "--error",
        type=parse_pattern,
        metavar="PATTERN",
        help="only parked ones with this error, as 'TimeoutError%%'",
    )
    parser.add_argument(
        "--age", type=parse_age, metavar="TIME", help="only those that fell due, or were parked, before"
    )
    parser.add_argument(
        "--where",
        action="append",
        type=parse_where,
        metavar="FIELD=TEXT",
        help="only those whose step has this field with this text of JSON, as customer=42 or address.city=Bern",
    )
    parser.add_argument("--group", metavar="NAME", help="only the members of this group")


def task_filter(args: argparse.Namespace, states: tuple[str, ...]) -> TaskFilter:
    """Return the filter of `add_filters`, for tasks in these states. Raises `ConfigError`."""
    task, step = args.task, args.step
    if step is not None and "." in step:
        named, _, step = step.partition(".")
        if task not in (None, named):
            raise ConfigError(f"--task {task} has no step {args.step}")
        task = named
    if args.error is not None:
        if "parked" not in states:
            raise ConfigError("--error is of parked tasks: leave out --state")
        states = ("parked",)
    if None not in (args.key, args.group):
        raise ConfigError("--key and --group exclude each other")
    queues = None if args.queue is None else tuple(dict.fromkeys(args.queue))
    return TaskFilter(
        states=states,
        queues=queues,
        task=task,
        step=step,
        error=args.error,
        older_than=args.age,
        key=None if args.key is None else _check_scope(args.key, task),
        where=tuple(args.where or ()),
        group=args.group,
    )


def _check_scope(key: str, task: str | None) -> str:
    if task is None:
        raise ConfigError(f"--key {key}: a key belongs to a task or workflow; name it by --task")
    try:
        scoped_key(task, key)
    except EnqueueError as error:
        raise ConfigError(f"--{error}") from None
    return key


def has_filters(args: argparse.Namespace) -> bool:
    return any(getattr(args, name) is not None for name in FILTERS)


# --- values -------------------------------------------------------------------------------------------------


def whole_number(minimum: int, maximum: float = math.inf) -> Callable[[str], int]:
    def parse_whole(text: str) -> int:
        number = int(text)
        if not minimum <= number <= maximum:
            span = f"{minimum} or more" if maximum == math.inf else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"{text} is not {span}")
        return number

    parse_whole.__name__ = "whole number"
    return parse_whole


def parse_seconds(text: str) -> float:
    """Return the seconds of a text such as `90`, `5m` or `1h30m`."""
    try:
        seconds = parse_duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a number of seconds, nor a time span such as {DURATION_EXAMPLES}"
        ) from None
    if seconds >= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is too long: give less than {MAX_SECONDS:,} seconds")
    return seconds


def parse_queues(text: str) -> list[str]:
    """Return the queues of a text such as `a,b`."""
    try:
        return [check_queue(name.strip()) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_age(text: str) -> timedelta:
    return timedelta(seconds=parse_seconds(text))


def parse_pattern(text: str) -> str:
    """Return a pattern of LIKE."""
    try:
        return check_error_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def parse_where(text: str) -> tuple[str, str]:
    """Return the path and the text of `customer=42`."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")) or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a field and its text, as customer=42 or address.city=Bern")
    return path, value


def parse_rate(text: str) -> float:
    """Return the tasks a second of a text such as `500/s`, `30/m` or `1000/h`."""
    number, _, unit = text.partition("/")
    seconds = {"": 1, "s": 1, "m": 60, "h": 3600}.get(unit)
    try:
        rate = float(number) / (seconds or math.nan)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a rate such as 500/s, 30/m or 1000/h")
    return rate


def parse_time(text: str) -> datetime:
    """Return a time with its zone."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected a time such as 2026-12-24T18:00:00+01:00") from None
    if time.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text}: has no time zone; add Z or an offset such as +01:00")
    return time
