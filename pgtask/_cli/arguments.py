"""The words that `pgtask` understands: its commands, their options, and the help of each.

Invariant: a mistake is a `ConfigError` of one line that names the help to read; nothing here touches a database.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from pgtask import __version__
from pgtask._cli.values import age, seconds, whole
from pgtask._postgres.listing import SCAN_LIMIT, STATES
from pgtask._postgres.runs import RunState
from pgtask.errors import ConfigError

__all__ = ["SOME_FAILED", "parse"]

PAGE_LIMIT = 10_000

SOME_FAILED = 1
"""The exit code for "some of the tasks could not be found or changed"."""

_EPILOG = """\
The database is --dsn, else PGTASK_DSN, DATABASE_URL, or dsn under [tool.pgtask] in the pyproject.toml of
the working directory; else an embedded PostgreSQL in .pgtask/, started when it is needed. APP is
module:attribute, else PGTASK_APP, or app under [tool.pgtask].

exit code:  0  done                            4  the app could not be loaded
            1  some of the tasks named could   5  the database refused us or is away
               not be found or changed
            2  wrong usage                    74  the output could not be written
"""

_ENQUEUE = """\
Enqueue a task. Prints its id. The JSON holds the step's fields; it is checked as a worker would decode
it, before anything is sent. Without it the fields take their defaults; - reads it from stdin.

    pgtask enqueue greetings:app ReadName '{"filename": "name.txt"}' --delay 300
"""
_LIST = f"""\
List tasks from the indexes of the table, state by state:

    leased     a worker has it; the lease that ends first at the head
    ready      due, waits for a worker; queue by queue, in the order in which they are claimed
    scheduled  due later; in the same order
    parked     waits for a person, its error is set; the latest first

A page is --limit tasks; what to give to --after for the next one is said on stderr, and is the cursor of
each object with --json. With a filter, {SCAN_LIMIT:,} tasks are looked at and no more; stderr says so.
On a terminal that is too narrow, a column that holds nothing but its default is left out.
"""
_RETRY = """\
Make tasks due now, at the step they are at: the error is cleared, and they have all retries of their
policy again (tried is 0). Parked and waiting tasks; one that a worker has is left alone and named.
With --parked, all that are parked when their turn comes, the latest first, 5,000 in a transaction.
(UPDATE pg_task SET error = NULL does the same, but leaves tried: the next failure parks the task again.)
"""
_CANCEL = """\
Remove tasks from the table, waiting or parked ones. A task that a worker has is left alone and named.
With --force it is removed as well: its worker is not told, it goes on until it notices at its next
renewal; what it says then is dropped, but what the step has done in the world is done.
"""
_RUNS = """\
List the runs of workflows, the latest first, also those that have ended. A page is --limit runs; what to
give to --before for the next one is said on stderr. With --state, 100,000 runs are looked at and no more.
"""
_RUN = """\
Show all of a run: how it is, what it waits for, and what it has recorded, step by step.
"""
_SIGNAL = """\
Send a signal to a run. It is kept until the run waits for one of this name. The JSON is its value (null
without it); - reads it from stdin.

    pgtask signal 01a1fd57-7122-74df-8e6f-4aeddb706f1c approval '{"approved": true}'
"""
_RESUME = """\
Let runs go on that have ended as ERROR or were cancelled, from what they have recorded, with all their
retries; wake those that pause, to look again. One that a worker has, or that has ended well, is named.
"""
_STATS = """\
Count the tasks of each queue and priority by their state. Nothing is counted further than 100,000 (less
with more than ten lanes): 100,000+ means at least so many. Then what the table weighs, and a warning for
what ails it: leases that ran out, an old transaction that keeps vacuum from removing dead rows.
"""
_PRUNE = """\
Remove archived tasks, and runs of workflows with what they recorded, that ended longer ago than AGE, in batches
that are transactions of their own. Parked tasks, failed runs among them, wait for a person: they are removed only
with --parked, by when they were parked. What is named by a flag is removed, and nothing else.

    pgtask prune --older-than 30d
"""
_STOP = """\
Tell all workers of the database, on every host, to finish their running steps and leave; supervisors
leave with them. Those started with --ignore-stop-notify or --no-listen do not hear it.
With --server, end the embedded PostgreSQL instead. Workers survive that: they wait until it is back.
"""
_GRAPH = "Print the state machine of the app's tasks as a Mermaid diagram: from the annotations, without a database."
_PSQL = """\
Become psql on the configured database, with ARGS as they are (after -- if the first is --dsn or --help):
the psql of the embedded PostgreSQL, or your system's for a database of your own.

    pgtask psql -c 'SELECT step, tried, error FROM pg_task'
"""
_MIGRATE = """\
Create the table pg_task, or bring it up to date: also adopts, with all its rows, the table of the Rust
crate pg_task. Says what was done. May be run at any time and as often as one likes.
"""


_ID_HELP = "the id, or its first digits, 8 or more, if no other task has them"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What a command does not know is its own mistake, not that of `pgtask`."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            state = next((word[2:] for word in unknown if word[:2] == "--" and word[2:] in STATES), None)
            hint = f"; did you mean --state {state}?" if state and "--state" in self._option_string_actions else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command and what was given with it. Raises `ConfigError`, or `SystemExit` after help or version."""
    parser = _build()
    if list(words[:1]) == ["psql"]:
        ours, theirs = _split_psql(words)
        args = parser.parse_args(ours)
        args.arguments = theirs
        return args
    return parser.parse_args(words)


def _split_psql(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for us, at the head, and those for psql: argparse would take some of these for its own."""
    at = 1
    while at < len(words):
        if words[at] == "--":
            return list(words[:at]), list(words[at + 1 :])
        if words[at] == "--dsn":
            at += 2
        elif words[at] == "--help" or words[at].startswith("--dsn="):
            at += 1
        else:
            break
    return list(words[:at]), list(words[at:])


def _build() -> _Parser:
    parser = _Parser(
        prog="pgtask",
        description="Enqueue, look at and mend the tasks of one Postgres table. pgtask-supervisor runs them.",
        epilog=_EPILOG,
        formatter_class=_help_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pgtask {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, description: str, *, takes_dsn: bool = True) -> _Parser:
        made: _Parser = commands.add_parser(
            name, help=summary, description=description, formatter_class=_help_formatter, allow_abbrev=False
        )
        if takes_dsn:
            made.add_argument("--dsn", metavar="DSN", help="the database")
        return made

    _add_migrate(command("migrate", "create the table, or bring it up to date", _MIGRATE))
    _add_enqueue(command("enqueue", "enqueue a task", _ENQUEUE))
    _add_list(command("list", "list tasks", _LIST))
    _add_show(command("show", "show all of a task", "Show all of a task: every column, the step, the whole error."))
    _add_retry(command("retry", "make tasks due now, with all their retries", _RETRY))
    _add_cancel(command("cancel", "remove tasks", _CANCEL))
    _add_runs(command("runs", "list runs of workflows", _RUNS))
    _add_show(command("run", "show all of a run", _RUN))
    signal = command("signal", "send a signal to a run", _SIGNAL)
    signal.add_argument("id", metavar="ID", help="the id of the run")
    signal.add_argument("name", metavar="NAME", help="for which the run waits, or will")
    signal.add_argument("value", nargs="?", default="null", metavar="JSON", help="what is sent")
    resume = command("resume", "let runs go on that failed or were cancelled", _RESUME)
    resume.add_argument("ids", nargs="+", metavar="ID", help="the id of a run")
    _add_json(command("stats", "count tasks, weigh the table", _STATS))
    _add_prune(command("prune", "remove archived tasks and ended runs that are old", _PRUNE))
    stop = command("stop", "tell all workers to finish and leave", _STOP)
    stop.add_argument("--server", action="store_true", help="end the embedded PostgreSQL")
    graph = command("graph", "print the app's state machine as Mermaid", _GRAPH, takes_dsn=False)
    graph.add_argument("app", nargs="?", metavar="APP", help="the app, as module:attribute")
    psql = command("psql", "open the database in psql", _PSQL)
    psql.usage = "pgtask psql [--dsn DSN] [ARGS...]"
    psql.add_argument("arguments", nargs="*", metavar="ARGS", help="what psql is given")
    return parser


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=110)


def _add_migrate(parser: _Parser) -> None:
    parser.add_argument("--sql", action="store_true", help="print the script for psql, and do nothing")
    parser.add_argument(
        "--keep-pg-task", action="store_true", help="leave the indexes and triggers of pg_task 1.0, for Rust workers"
    )


def _add_enqueue(parser: _Parser) -> None:
    parser.usage = "pgtask enqueue [APP] STEP [JSON] [options]"
    parser.add_argument("words", nargs="+", metavar="[APP] STEP [JSON]", help="STEP is ReadName or Greeter.ReadName")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--delay", type=seconds, metavar="S", help="due after so many seconds")
    when.add_argument("--at", metavar="TIME", help="due at a time, as 2026-12-24T18:00:00+01:00")
    parser.add_argument("--queue", metavar="NAME", help="its queue (default: the step's)")
    parser.add_argument("--priority", type=int, metavar="N", help="its priority (default: the step's)")
    parser.add_argument("--key", metavar="KEY", help="if a task has this key already, print the id of that one")


def _add_list(parser: _Parser) -> None:
    parser.add_argument("--state", choices=STATES, help="only this state")
    _add_filters(parser)
    parser.add_argument(
        "--limit", type=whole(1, PAGE_LIMIT), default=50, metavar="N", help="tasks on a page (default: 50)"
    )
    parser.add_argument("--after", metavar="CURSOR", help="go on after this place")
    _add_json(parser)


def _add_runs(parser: _Parser) -> None:
    parser.add_argument("--name", metavar="WORKFLOW", help="only of this workflow")
    parser.add_argument("--state", choices=get_args(RunState), help="only in this state")
    parser.add_argument(
        "--limit", type=whole(1, PAGE_LIMIT), default=50, metavar="N", help="runs on a page (default: 50)"
    )
    parser.add_argument("--before", metavar="ID", help="go on before this run")
    _add_json(parser)


def _add_filters(parser: _Parser) -> None:
    parser.add_argument("--queue", metavar="NAME", help="only this queue")
    parser.add_argument("--task", metavar="TASK", help="only this task, as Greeter")
    parser.add_argument("--step", metavar="STEP", help="only this step, as ReadName or Greeter.ReadName")


def _add_show(parser: _Parser) -> None:
    parser.add_argument("id", metavar="ID", help=_ID_HELP)
    _add_json(parser)


def _add_retry(parser: _Parser) -> None:
    parser.usage = "pgtask retry ID... | --parked [--queue NAME] [--task TASK] [--step STEP] [--limit N]"
    parser.add_argument("ids", nargs="*", metavar="ID", help=_ID_HELP)
    parser.add_argument("--parked", action="store_true", help="all parked tasks, instead of IDs")
    _add_filters(parser)
    parser.add_argument("--limit", type=whole(1), metavar="N", help="with --parked, so many at most")


def _add_cancel(parser: _Parser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID", help=_ID_HELP)
    parser.add_argument("--force", action="store_true", help="also those that a worker has")


def _add_prune(parser: _Parser) -> None:
    parser.add_argument(
        "--older-than", type=age, required=True, metavar="AGE", help="45s, 90m, 12h, 30d or 8w; 0s is everything"
    )
    for kind, help in (
        ("archive", "archived tasks (if nothing is named, these and the ended runs)"),
        ("runs", "runs that succeeded or were cancelled"),
        ("parked", "parked tasks and failed runs"),
    ):
        parser.add_argument(f"--{kind}", dest="kinds", action="append_const", const=kind, help=help)
    parser.add_argument(
        "--batch",
        type=whole(1, 100_000),
        default=5_000,
        metavar="N",
        help="most tasks or runs at once (default: 5,000)",
    )
    _add_json(parser)


def _add_json(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: an object of JSON on each line")
