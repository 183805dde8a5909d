"""`pgtask stop`: stop all workers of the schema, or the embedded database."""

from __future__ import annotations

import argparse

from pgtask._cli.database import configured_database, with_connection
from pgtask._cli.output import note, write_lines
from pgtask._cli.parser import Parser
from pgtask._postgres import embedded
from pgtask._postgres.tasks import stop_workers
from pgtask._project import project_directory
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "stop all workers, or the embedded database"
HELP = """\
Tell all workers of the schema, on every host, to finish their running steps and exit; their supervisors exit with
them, with exit code 0. Workers that were started with --no-listen do not receive it. The role needs the privilege
UPDATE on pg_task.

With --server, stop the embedded PostgreSQL of this directory instead, and no worker: workers wait until it is back.
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--server", action="store_true", help="stop the embedded PostgreSQL, not the workers")


def run(args: argparse.Namespace) -> int:
    is_configured = configured_database(vars(args)) is not None
    if args.server:
        if is_configured:
            raise ConfigError(
                "--server stops the embedded PostgreSQL, but another database is configured: "
                "pgtask did not start it and will not stop it"
            )
        was_running = embedded.stop(project_directory())
        write_lines([f"the embedded PostgreSQL {'has stopped' if was_running else 'was not running'}"])
    elif not is_configured and not embedded.is_running(project_directory()):
        write_lines(["the embedded PostgreSQL is not running, so no worker is working"])
    else:
        schema, listening = with_connection(args, stop_workers, needs_schema=False)
        if not listening:
            deaf = "workers with --no-listen do not receive this: end their supervisors"
            write_lines([f"no worker listens on this database, so there was none to stop; {deaf}"])
            return 0
        whose = "" if schema is None else f" of the schema {schema}, but none of pg_task in Rust"
        of_any = "" if schema is None else f"; {listening} listen on this database, those of other schemas included"
        write_lines([f"told all workers{whose}, on every host, to finish their running steps and exit{of_any}"])
        if not is_configured:
            note("the embedded PostgreSQL keeps running; to stop it: pgtask stop --server")
    return 0
