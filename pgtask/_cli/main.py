"""`pgtask`: the list of its commands, the parsing of its words, and its exit codes.

Invariants: a failure is one line on stderr and an exit code of `ExitCode`, never a traceback; stdout carries results
and nothing else. No command asks a question: it does what its words say, or refuses and says why.
"""

from __future__ import annotations

import argparse
import io
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

from pgtask import __version__
from pgtask._cli.commands import (
    actions,
    cancel,
    check,
    completion,
    enqueue,
    graph,
    groups,
    limit,
    migrate,
    move,
    parked,
    pause,
    prune,
    psql,
    reschedule,
    resume,
    retry,
    run,
    runs,
    schedules,
    show,
    signal,
    stats,
    stop,
    top,
    verify,
    web,
)
from pgtask._cli.commands import list as list_
from pgtask._cli.explain import with_dsn_source
from pgtask._cli.output import BROKEN_PIPE, OutputError, flush_streams, note, open_streams, write_lines
from pgtask._cli.parser import Parser, parse_words
from pgtask._cli.process_list import hide_passwords
from pgtask._dsn import conceal_arguments
from pgtask._nearest import nearest
from pgtask._status import ExitCode
from pgtask.errors import AppLoadError, ConfigError, DatabaseError, DefinitionError, PgtaskError

__all__ = ["COMMANDS", "GROUPS", "build_parser", "main", "parse"]


class Command(Protocol):
    """The module of a command; its name is that of the command."""

    __name__: str
    SUMMARY: str
    HELP: str

    def add_arguments(self, parser: Parser, /) -> None: ...

    def run(self, args: argparse.Namespace, /) -> int:
        """Run the command; return the exit code."""
        ...


def _by_name(*commands: Command) -> dict[str, Command]:
    return {command.__name__.rpartition(".")[2]: command for command in commands}


GROUPS: dict[str, dict[str, Command]] = {
    "set up": _by_name(migrate, verify, psql, stop, completion),
    "enqueue": _by_name(enqueue),
    "look": _by_name(list_, parked, show, stats, schedules, groups, top, graph, check, actions, web),
    "fix": _by_name(retry, reschedule, move, cancel, prune, pause, resume, limit),
    "workflows": _by_name(runs, run, signal),
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
OFFLINE = ("graph", "completion")
"""The commands that read no database."""

EPILOG = """\
Another program starts the workers: pgtask-supervisor APP.

The database is --dsn, before or after the command; else PGTASK_DSN, dsn under [tool.pgtask] in pyproject.toml, or
DATABASE_URL; else the embedded PostgreSQL in .pgtask/. APP is module:attribute; else PGTASK_APP, or app under
[tool.pgtask]. pgtask looks for pyproject.toml and .pgtask/ in the working directory and then upwards. Only enqueue and
migrate create a database where there is none.

exit code:
    0   done
    1   some of the tasks named were not found or changed;
        check, verify: they have found something
    2   wrong usage, or no command
    4   the app cannot be loaded
    5   the database refuses, is unavailable or missing
   74   the output cannot be written
"""

_WORKER_WORDS = ("worker", "workers", "start", "supervisor", "serve", "work")
# The names of our commands in other queues and tools.
_SYNONYMS = {
    **dict.fromkeys(("ls", "ps", "tasks", "jobs"), "list"),
    **dict.fromkeys(("status", "info", "count"), "stats"),
    **dict.fromkeys(("watch", "monitor", "htop", "dashboard"), "top"),
    **dict.fromkeys(("add", "push", "send", "submit", "delay", "defer"), "enqueue"),
    **dict.fromkeys(("get", "inspect", "describe", "result"), "show"),
    **dict.fromkeys(("rm", "delete", "remove", "kill", "revoke", "abort"), "cancel"),
    **dict.fromkeys(("failed", "errors", "causes", "dead"), "parked"),
    **dict.fromkeys(("history", "audit"), "actions"),
    **dict.fromkeys(("cron", "crontab", "schedule", "periodic", "beat"), "schedules"),
    **dict.fromkeys(("postpone", "snooze"), "reschedule"),
    **dict.fromkeys(("requeue", "rerun", "revive"), "retry"),
    **dict.fromkeys(("purge", "clean", "cleanup", "vacuum"), "prune"),
    **dict.fromkeys(("init", "setup", "upgrade", "schema", "initdb"), "migrate"),
    **dict.fromkeys(("shutdown", "quit"), "stop"),
    **dict.fromkeys(("hold", "suspend", "freeze"), "pause"),
    **dict.fromkeys(("unpause", "continue", "unfreeze"), "resume"),
    **dict.fromkeys(("sql", "shell", "dbshell"), "psql"),
    **dict.fromkeys(("diagram", "draw"), "graph"),
    **dict.fromkeys(("console", "dashboard", "ui"), "web"),
    **dict.fromkeys(("workflows", "workflow"), "runs"),
    **dict.fromkeys(("completions", "complete"), "completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    open_streams(needs_stdout=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show an ellipsis is no error
    if argv is None:
        hide_passwords()
    flags: dict[str, Any] = {}
    words = sys.argv[1:] if argv is None else argv
    try:
        if not words:
            write_lines([build_parser().format_help().rstrip("\n")])
            return ExitCode.USAGE  # no command ran
        args = parse(words)
        flags = vars(args)
        return COMMANDS[args.command].run(args)
    except OutputError as error:
        if error.code != BROKEN_PIPE:  # a reader that has seen enough
            note(str(error))
        return error.code
    except PgtaskError as error:
        if flags.get("traceback") and isinstance(error, (AppLoadError, DefinitionError)):
            traceback.print_exception(error.__cause__ or error)
        message = with_dsn_source(str(error), flags) if isinstance(error, DatabaseError) else str(error)
        note(conceal_arguments(message, words))
        return _exit_code(error)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    finally:
        flush_streams()


def _exit_code(error: PgtaskError) -> int:
    match error:
        case DatabaseError():
            return ExitCode.DATABASE
        case AppLoadError() | DefinitionError():
            return ExitCode.APP
    return ExitCode.USAGE


# --- parsing ------------------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the command and its arguments. Raises `ConfigError`, or `SystemExit` after help or version."""
    return parse_words(_parse, words, known=COMMANDS)


def _parse(words: list[str]) -> argparse.Namespace:
    at = _find_command(words)
    if at is not None and words[at] == "help":
        words = [*words[:at], *words[at + 1 : at + 2], "--help"]
        at = _find_command(words)
    parser = build_parser(None if at is None else words[at])
    if at is None:
        parser.parse_args(words)
        parser.error("there is no command, such as list")
    _check_command(words[at], words[at + 1 :])
    words_of_psql: list[str] = []
    if words[at] == "psql":
        words[at:], words_of_psql = psql.split_words(words[at:])
    args = parser.parse_args(words)
    if words_of_psql:
        args.arguments = words_of_psql
    if args.command in OFFLINE and args.dsn is not None:
        raise ConfigError(f"pgtask {args.command} reads no database: leave out --dsn")
    return args


def _find_command(words: Sequence[str]) -> int | None:
    """Return the place of the command among the words."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] == "--dsn" else 1
    return at if at < len(words) else None


def _check_command(name: str, rest: Sequence[str]) -> None:
    """Raise `ConfigError` for a word that is no command; it names the command that was probably meant."""
    app = next((word for word in rest if ":" in word and "://" not in word and not word.startswith("-")), None)
    if name in _WORKER_WORDS or (name == "run" and app is not None and rest[0] == app):
        raise ConfigError(f"workers are started by: pgtask-supervisor {app or 'APP'}")
    if name in COMMANDS:
        return
    if "://" in name:
        raise ConfigError("a database is named by --dsn DSN, before or after the command (see pgtask --help)")
    meant = _SYNONYMS.get(name) or nearest(name, COMMANDS, cutoff=0.6)
    hint = f"did you mean {meant}?" if meant else f"there are {', '.join(COMMANDS)}"
    raise ConfigError(f"there is no command {name!r}; {hint} (see pgtask --help)")


def build_parser(command: str | None = None) -> Parser:
    """Return the parser of all commands; that of one command, if it is named, takes a twentieth of the time."""
    listing = "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {name:<10} {module.SUMMARY}" for name, module in group.items())
        for title, group in GROUPS.items()
    )
    parser = Parser(
        prog="pgtask",
        usage="pgtask [-h] [-V] [--dsn DSN] COMMAND ...",
        description="Enqueue, inspect and fix the tasks of one Postgres table. pgtask-supervisor runs them."
        f"\n\n{listing}\n\npgtask COMMAND --help explains a command.",
        epilog=EPILOG,
    )
    parser.add_argument("-V", "--version", action="version", version=f"pgtask {__version__}", help="show the version")
    parser.add_argument("--dsn", metavar="DSN", help="the database")
    parsers = parser.add_subparsers(dest="command", prog="pgtask", metavar="COMMAND", help=argparse.SUPPRESS)
    for name, module in COMMANDS.items() if command not in COMMANDS else [(command, COMMANDS[command])]:
        added: Parser = parsers.add_parser(name, description=module.HELP)
        if name not in OFFLINE:
            # No default, or it would replace a --dsn before the command.
            added.add_argument("--dsn", metavar="DSN", default=argparse.SUPPRESS, help="the database")
        module.add_arguments(added)
    return parser
