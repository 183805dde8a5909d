"""`pgtask-supervisor`: reads the settings, finds the database, runs the supervisor, and says how it ended.

Invariants: a failure is one line on stderr and an exit code, with a traceback only at `--log-level debug`;
stdout carries nothing but the summary of a burst. The flags are those of `SETTINGS`, so none can be
forgotten.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from pgtask._cli.explain import explained
from pgtask._cli.output import OutputError, let_go, open_streams, say, show
from pgtask._cpus import allowed_cpus
from pgtask._dsn import redact
from pgtask._events import log_event
from pgtask._settings import SETTINGS, Setting
from pgtask._supervisor.logs import configure
from pgtask._supervisor.parent import Supervisor
from pgtask._supervisor.progress import Progress, burst_notes, burst_summary, share_terminal
from pgtask._supervisor.source import preload
from pgtask._supervisor.states import ExitCode
from pgtask._supervisor.tally import Result
from pgtask._supervisor.worker import MOST_PROCS
from pgtask.app import check_reference
from pgtask.config import Config, dsn_source, load_config
from pgtask.errors import AppLoadError, ConfigError, DatabaseError

__all__ = ["main"]

PROGRAM = "pgtask-supervisor"
log = logging.getLogger("pgtask.supervisor")

_GROUPS = {
    "database": ("dsn", "listen", "ignore_stop_notify"),
    "workers": ("procs", "pin", "concurrency", "batch", "pool_size", "lease_timeout", "heartbeat_interval"),
    "tasks": ("queue", "unknown", "max_step_bytes"),
    "start and stop": ("burst", "burst_horizon", "grace", "preload", "reload"),
    "health": ("stall", "max_tasks", "max_rss"),
    "log": ("log", "log_level"),
}

_NO_APP = (
    "no app to run: name it as module:attribute after the command, "
    "in PGTASK_APP, or as app under [tool.pgtask] in pyproject.toml"
)

_EPILOG = """\
Each option is also an environment variable (--burst-horizon is PGTASK_BURST_HORIZON) and a key
(burst-horizon) under [tool.pgtask] in the pyproject.toml of the working directory. A flag wins over the
environment, and that over the file.

signals:  TERM, INT   finish the running steps within --grace; a second one stops now
          QUIT        stop now; tasks go back to the queue
          HUP         replace the workers one at a time, with fresh code
          TTIN, TTOU  one worker more, one less
          USR1        log a line about each worker

exit code:  0  stopped, or the burst finished       3  a worker could not start
            1  the burst finished, but some task    4  the app could not be loaded
               is parked with an error              5  the database refused us
            2  wrong usage                        130  interrupted before it began
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until stopped; return the exit code."""
    open_streams(needs_stdout=False)
    try:
        return _main(argv)
    finally:
        let_go()


def _main(argv: Sequence[str] | None) -> int:
    try:
        flags = _parse(argv)
        config = load_config(flags)
        if config.app is None:
            raise ConfigError(_NO_APP)
        if config.procs > MOST_PROCS:
            raise ConfigError(
                f"procs {config.procs}: more than {MOST_PROCS} worker processes are not started; one per CPU "
                "is enough, and raise --concurrency for steps that wait"
            )
        if config.pin and not allowed_cpus():
            raise ConfigError("--pin: this platform has no CPU affinity")
    except ConfigError as error:
        say(f"{error} (see {PROGRAM} --help)", program=PROGRAM)
        return ExitCode.USAGE
    progress = share_terminal() if config.burst and config.log == "text" and _is_terminal() else None
    configure(config.log, config.log_level)
    try:
        check_reference(config.app)  # before a database is started for it
        return _run(config, flags, progress)
    except AppLoadError as error:
        _complain(config, ExitCode.APP, str(error), error)
        return ExitCode.APP
    except DatabaseError as error:
        _complain(config, ExitCode.DATABASE, str(error), error)
        return ExitCode.DATABASE
    except KeyboardInterrupt:  # before the supervisor minds its signals: while the embedded server starts
        return ExitCode.INTERRUPTED


def _run(config: Config, flags: Mapping[str, Any], progress: Progress | None) -> int:
    # Here, not above: usage errors and --help need no database driver. Before the fork: children share it.
    from pgtask._worker.process import run_worker

    if config.preload:
        preload(config.app)
    embedded = config.dsn is None
    if embedded:
        config = msgspec.structs.replace(config, dsn=_start_embedded(config))
    elif (named := dsn_source(flags)) is not None:  # for whoever reads that it cannot be reached
        log_event(log, logging.INFO, "database.named", by=named[0], dsn=redact(named[1]))
    result = Supervisor(config, run_worker, embedded=embedded, progress=progress).run()
    if result.message is not None:
        _complain(config, result.code, explained(result.message, flags))
    elif config.burst:
        _show_burst(config, result)
    return result.code


def _show_burst(config: Config, result: Result) -> None:
    """To whoever may read it: that nobody does changes nothing about the burst, nor about its exit code."""
    totals, parked = result.totals, result.parked_left
    summary = burst_summary(totals, result.seconds, finished=result.finished, parked_left=parked, style=config.log)
    try:
        show([summary])
    except OutputError as error:
        say(str(error), program=PROGRAM)
    if config.log == "text":  # the object has it in its fields
        for note in burst_notes(totals, parked_left=parked):
            say(note, program=PROGRAM)


def _start_embedded(config: Config) -> str:
    from pgtask._postgres.embedded import running_dsn, start
    from pgtask._supervisor.check import check_app

    directory = Path.cwd()
    dsn = running_dsn(directory)
    event = "embedded.started" if dsn is None else "embedded.running"
    if dsn is None:
        if config.app is not None and not config.preload:
            check_app(config.app, patience=config.stall)  # a server is not started for an app that cannot be loaded
        log_event(log, logging.INFO, "embedded.starting", directory=directory / ".pgtask")
        dsn = start(directory)
    log_event(log, logging.INFO, event, dsn=dsn, stop="pgtask stop --server")
    return dsn


def _complain(config: Config, code: ExitCode, message: str, error: BaseException | None = None) -> None:
    """The one line of a failure: for a person as it is, for a program as an event."""
    if config.log == "json":
        log_event(log, logging.ERROR, "supervisor.failed", message=message, exit=int(code))
    else:
        say(message, program=PROGRAM)
    if error is not None:
        log_event(log, logging.DEBUG, "supervisor.failed", exc_info=error)


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


# --- the command line ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110)


def _parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """What was given, by the name of the setting; the values are as they were typed."""
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [APP] [--procs N] [--burst] [options]",
        description="Run the tasks of an app from one Postgres table, in N worker processes.",
        epilog=_EPILOG,
        formatter_class=_help_formatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    group_of: dict[str, argparse._ArgumentGroup] = {}
    for title, names in _GROUPS.items():
        group_of |= dict.fromkeys(names, parser.add_argument_group(title))
    for setting in SETTINGS:
        if setting.name == "app":
            parser.add_argument("app", nargs="?", metavar="APP", help=setting.help)
        else:
            _add(group_of.get(setting.name, parser), setting)
    about = parser.add_argument_group("about")
    about.add_argument("--help", "-h", action="help", help="show this and exit")
    about.add_argument("--version", action="version", version=_version(), help="show the version and exit")
    return vars(parser.parse_args(argv))


def _add(group: argparse._ActionsContainer, setting: Setting) -> None:
    text = setting.help.replace("%", "%%")
    if setting.is_switch:
        group.add_argument(setting.flag, dest=setting.name, action="store_true", help=text)
    else:
        action = "append" if setting.name == "queue" else "store"
        group.add_argument(setting.flag, dest=setting.name, action=action, metavar=setting.metavar, help=text)


def _version() -> str:
    try:
        return f"{PROGRAM} {importlib.metadata.version('pgtask-supervisor')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        from pgtask import __version__

        return f"{PROGRAM} {__version__}"


if __name__ == "__main__":
    raise SystemExit(main())
