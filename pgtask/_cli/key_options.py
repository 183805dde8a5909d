"""The options of `pgtask enqueue` about another task that has the key, and what it says of that task.

Invariant: a wrong combination is refused before anything is sent, in the words of the command line.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any, get_args

from pgtask._cli.options import parse_seconds
from pgtask._cli.parser import Parser
from pgtask._ids import TaskId
from pgtask._placement import OnConflict, OnParked
from pgtask.errors import ConfigError

__all__ = ["add_key", "check_key_options", "describe_outcome", "key_options"]


def add_key(parser: Parser) -> None:
    """Add `--key`, and the options that `key_options` reads."""
    parser.add_argument("--key", metavar="KEY", help="at most one task of this name has this key, until it has ended")
    group = parser.add_argument_group("if a task has the key already")
    group.add_argument(
        "--on-conflict",
        choices=get_args(OnConflict),
        metavar="RULE",
        help="keep: drop this step (the default); replace: a task that waits takes this step; after: this one waits "
        "behind a task that runs, or has another step",
    )
    group.add_argument(
        "--on-parked",
        choices=get_args(OnParked),
        metavar="RULE",
        help="if that task is parked: keep it so (the default); revive: retry it, at its own step; replace: it takes "
        "this step",
    )
    group.add_argument(
        "--debounce",
        type=parse_seconds,
        metavar="TIME",
        help="due when no call with this key has come for that time, with the step of the last call",
    )
    group.add_argument("--ceiling", type=parse_seconds, metavar="TIME", help="but not later than that after the first")


def check_key_options(args: argparse.Namespace, *, is_run: bool) -> None:
    """Raise `ConfigError` for options that do not go together. `is_run`: those of a workflow have a key alone."""
    given = [flag for flag in ("on-conflict", "on-parked", "debounce") if _value(args, flag) is not None]
    if args.ceiling is not None and args.debounce is None:
        raise ConfigError("--ceiling bounds a debounce: add --debounce TIME")
    if given and args.key is None:
        raise ConfigError(f"--{given[0]} is about another task with the same key: add --key KEY")
    if given and is_run:
        raise ConfigError(f"--{given[0]} is not for the run of a workflow: a run that has the key is kept")
    if args.debounce is not None and (args.delay is not None or args.at is not None):
        raise ConfigError("--debounce says when the task is due: leave out --delay and --at")
    if args.ceiling is not None and args.ceiling < args.debounce:
        raise ConfigError("--ceiling must not be shorter than --debounce")


def _value(args: argparse.Namespace, flag: str) -> Any:
    return getattr(args, flag.replace("-", "_"))


def key_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Client.enqueue`, of those that are given."""
    spans = {name: getattr(args, name) for name in ("debounce", "ceiling")}
    options = {name: timedelta(seconds=value) for name, value in spans.items() if value is not None}
    rules = {"on_conflict": args.on_conflict, "on_parked": args.on_parked}
    return {**options, **{name: rule for name, rule in rules.items() if rule is not None}}


def describe_outcome(task: TaskId, key: str) -> str | None:
    """Return what the command says of the task that has the key; None if it is new, or was kept."""
    match task.outcome:
        case "behind":
            return f"task {task} is new, and waits behind the one that has the key {key!r}"
        case "replaced":
            return f"nothing new was enqueued: task {task} has the key {key!r} already, and has this step now"
        case "revived":
            return f"nothing new was enqueued: task {task} has the key {key!r} already, and was parked; it is due again"
    return None
