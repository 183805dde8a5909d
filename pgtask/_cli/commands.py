"""`pgtask`: the commands of the person who looks after the tasks.

Invariants: a failure is one line on stderr and an exit code of `ExitCode`, never a traceback; stdout carries what was
asked for and nothing else. Nothing is asked back: a command does what its words say, or says why not.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pgtask._cli.arguments import parse
from pgtask._cli.change import cancel_command, retry_command
from pgtask._cli.database import configured_database, find_database, with_connection
from pgtask._cli.enqueue import enqueue_command
from pgtask._cli.explain import explained
from pgtask._cli.look import graph_command, list_command, show_command, stats_command
from pgtask._cli.output import BROKEN_PIPE, OutputError, let_go, open_streams, say, show
from pgtask._cli.prune import prune_command
from pgtask._cli.psql import psql_command
from pgtask._cli.runs import resume_command, run_command, runs_command, signal_command
from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate, migration_sql
from pgtask._postgres.tasks import stop_workers
from pgtask._supervisor.states import ExitCode
from pgtask.errors import AppLoadError, ConfigError, DatabaseError, DefinitionError, PgtaskError

__all__ = ["main"]

INTERRUPTED = 130  # as a shell reports a death of SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    open_streams(needs_stdout=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show an ellipsis is no error
    flags: dict[str, Any] = {}
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        flags = vars(args)
        return _COMMANDS[args.command](args)
    except OutputError as error:
        if error.code != BROKEN_PIPE:  # a reader that has seen enough
            say(str(error))
        return error.code
    except PgtaskError as error:
        say(explained(str(error), flags) if isinstance(error, DatabaseError) else str(error))
        return _exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        let_go()


def _exit_code(error: PgtaskError) -> int:
    match error:
        case DatabaseError():
            return ExitCode.DATABASE
        case AppLoadError() | DefinitionError():
            return ExitCode.APP
    return ExitCode.USAGE


# --- the commands that are about the database, not about tasks -----------------------------------------------------


def migrate_command(args: argparse.Namespace) -> int:
    if args.sql:
        show([migration_sql(keep_pg_task=args.keep_pg_task)], end="")
        return 0
    database = find_database(vars(args))
    show(asyncio.run(migrate(database.dsn, keep_pg_task=args.keep_pg_task)) or ["the schema is up to date"])
    return 0


def stop_command(args: argparse.Namespace) -> int:
    is_configured = configured_database(vars(args)) is not None
    if args.server:
        if is_configured:
            raise ConfigError(
                "--server ends the embedded PostgreSQL, but another database is configured, and that is not ours to end"
            )
        was_running = embedded.stop(Path.cwd())
        show([f"the embedded PostgreSQL {'has ended' if was_running else 'was not running'}"])
    elif not is_configured and not embedded.is_running(Path.cwd()):
        show(["the embedded PostgreSQL is not running, so no worker is working"])
    else:
        with_connection(args, stop_workers, needs_schema=False)
        show(["told all workers, on every host, to finish their running steps and leave"])
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "migrate": migrate_command,
    "enqueue": enqueue_command,
    "list": list_command,
    "show": show_command,
    "retry": retry_command,
    "cancel": cancel_command,
    "runs": runs_command,
    "run": run_command,
    "signal": signal_command,
    "resume": resume_command,
    "stats": stats_command,
    "prune": prune_command,
    "stop": stop_command,
    "graph": graph_command,
    "psql": psql_command,
}
