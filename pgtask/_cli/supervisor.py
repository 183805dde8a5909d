"""`pgtask-supervisor`: read the settings, find the database, run the supervisor, and report how it ended.

Invariants: a failure is one line on stderr and an exit code, with a traceback only at `--log-level debug`;
stdout carries nothing but the summary of a burst. The flags are those of `SETTINGS`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import msgspec

from pgtask._app_import import preload_app
from pgtask._cli.django_project import adopt_django_project
from pgtask._cli.explain import with_dsn_source
from pgtask._cli.log_lines import is_terminal
from pgtask._cli.logging import HOOKS, configure, restore
from pgtask._cli.output import OutputError, flush_streams, note, open_streams, write_lines
from pgtask._cli.parser import Parser, help_formatter, parse_words
from pgtask._cli.process_list import hide_passwords
from pgtask._cli.progress import BurstProgress, burst_notes, burst_summary, share_terminal
from pgtask._cpus import allowed_cpus
from pgtask._dsn import conceal_arguments, redact
from pgtask._log import EventLog
from pgtask._nearest import nearest
from pgtask._project import project_directory
from pgtask._settings import SETTINGS, Setting
from pgtask._status import ExitCode
from pgtask._supervisor.exporter import Exporter
from pgtask._supervisor.parent import Supervisor
from pgtask._supervisor.sd_notify import SdNotify
from pgtask._supervisor.slot import MAX_PROCS
from pgtask._supervisor.totals import Result
from pgtask.app import check_reference
from pgtask.config import Config, dsn_source, load_config, use_config, use_project
from pgtask.errors import AppLoadError, ConfigError, DatabaseError

__all__ = ["main"]

PROGRAM = "pgtask-supervisor"
log = EventLog("pgtask.supervisor")

_NO_APP = (
    "no app to run: name it as module:attribute after the command, "
    "in PGTASK_APP, or as app under [tool.pgtask] in pyproject.toml"
)

_EPILOG = """\
TIME is seconds, or has units: 90, 5m, 1h30m, 2d.

Each option is also an environment variable (--burst-horizon is PGTASK_BURST_HORIZON) and a key (burst-horizon) under
[tool.pgtask] in the pyproject.toml of the working directory, or of one above it. A flag wins over the environment,
and that over the file.

signals:
  TERM, INT   finish the running steps within --grace;
              a second one stops now
  QUIT        stop now; release the tasks
  HUP         replace the workers one by one, with new code
  TTIN, TTOU  add one worker, remove one
  USR1        log a line about each worker

exit code:
         0  stopped, or the burst finished
         1  the burst finished, but a task of this app is
            parked
         2  wrong usage
         3  a worker could not start
         4  the app cannot be loaded
         5  the database refuses the connection
  130, 143  the burst was stopped before its end
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until stopped; return the exit code."""
    open_streams(needs_stdout=False)
    try:
        return _main(argv)
    finally:
        flush_streams()


def _main(argv: Sequence[str] | None) -> int:
    is_hidden = argv is not None or hide_passwords()
    words = sys.argv[1:] if argv is None else argv
    try:
        flags = _parse(words)
        adopt_django_project(flags)
        config = load_config(flags)
        if config.app is None:
            raise ConfigError(_NO_APP)
        if config.procs > MAX_PROCS:
            raise ConfigError(
                f"procs {config.procs}: more than {MAX_PROCS} worker processes are not started; one per CPU "
                "is enough, and raise --concurrency for steps that wait"
            )
        if config.pin and not allowed_cpus():
            raise ConfigError("--pin: this platform has no CPU affinity")
        if config.dsn is None:
            project_directory()  # raises if the working directory was removed
        server = _open_metrics(config)
    except ConfigError as error:
        note(f"{conceal_arguments(str(error), words)} (see {PROGRAM} --help)", program=PROGRAM)
        return ExitCode.USAGE
    progress = share_terminal() if config.burst and config.log == "text" and is_terminal(sys.stderr) else None
    configure(config.log, config.log_level)
    if not is_hidden and redact(flags.get("dsn", "")) != flags.get("dsn", ""):
        hint = "the list of processes shows it: set PGTASK_DSN instead of --dsn"
        log.warning("password.visible", hint=hint)
    try:
        _check_app(config.app)  # before a database is started for it
        return _run(config, flags, progress, server)
    except AppLoadError as error:
        _report_failure(config, ExitCode.APP, conceal_arguments(str(error), words), error)
        return ExitCode.APP
    except DatabaseError as error:
        _report_failure(config, ExitCode.DATABASE, str(error), error)
        return ExitCode.DATABASE
    except KeyboardInterrupt:  # before the supervisor handles signals, while the embedded server starts
        return ExitCode.INTERRUPTED
    finally:
        use_config(None)
        use_project({})


def _check_app(reference: str) -> None:
    """Raise `AppLoadError` for a word that cannot name an app, such as a command of `pgtask`."""
    try:
        check_reference(reference)
    except AppLoadError as error:
        from pgtask._cli.main import COMMANDS  # which needs the database driver

        command = nearest(reference, COMMANDS, cutoff=0.8)
        hint = f"; to {COMMANDS[command].SUMMARY}: pgtask {command}" if command else ""
        raise AppLoadError(f"{error}{hint}") from None


def _open_metrics(config: Config) -> socket.socket | None:
    """Listen for the metrics, if there are to be any. Raises `ConfigError`."""
    if config.metrics is None:
        return None
    from pgtask._observe.server import check_library, listen

    check_library()
    return listen(config.metrics)


def _make_exporter(config: Config, server: socket.socket) -> Exporter:
    from pgtask._observe.exporter import run_exporter

    host, port, *_ = server.getsockname()
    log.info("metrics.serving", host=host, port=port)
    return Exporter(config, run_exporter, server)


def _run(config: Config, flags: Mapping[str, Any], progress: BurstProgress | None, server: socket.socket | None) -> int:
    # Here, not above: usage errors and --help need no database driver. Before the fork: children share it.
    from pgtask._worker.boot import boot_worker
    from pgtask._worker.process import run_worker
    from pgtask._worker.turn_slots import TurnSlots
    from pgtask._worker_client import WorkerClient

    if config.dsn is not None:
        use_config(config)
    if config.preload:
        preload_app(config.app)
        restore()
    embedded = config.dsn is None
    if embedded:
        config = msgspec.structs.replace(config, dsn=_start_embedded(config))
        use_config(config)
    elif (named := dsn_source(flags)) is not None:  # for a reader of the errors that follow
        log.info("database.named", by=named[0], dsn=redact(named[1]))
    run = functools.partial(run_worker, make_client=WorkerClient, turn_slots=TurnSlots())
    start = functools.partial(boot_worker, run=run, hooks=HOOKS)
    exporter = None if server is None else _make_exporter(config, server)
    manager = SdNotify()
    result = Supervisor(config, start, embedded=embedded, progress=progress, exporter=exporter, manager=manager).run()
    if result.message is not None:
        _report_failure(config, result.code, with_dsn_source(result.message, flags))
    elif config.burst:
        _show_burst(config, result)
    return result.code


def _show_burst(config: Config, result: Result) -> None:
    """Write the summary. A stdout that cannot be written to changes neither the burst nor its exit code."""
    left: dict[str, Any] = {
        "parked_left": result.parked_left,
        "parked_others": result.parked_others,
        "paused": result.paused,
    }
    summary = burst_summary(result.totals, result.seconds, finished=result.finished, **left, style=config.log)
    try:
        write_lines([summary])
    except OutputError as error:
        note(str(error), program=PROGRAM)
    if config.log == "text":  # the object has it in its fields
        for line in burst_notes(result.totals, **left):
            note(line, program=PROGRAM)


def _start_embedded(config: Config) -> str:
    from pgtask._postgres.embedded import running_dsn, start
    from pgtask._supervisor.check import check_app

    directory = project_directory()
    dsn = running_dsn(directory)
    event = "embedded.started" if dsn is None else "embedded.running"
    if dsn is None:
        if config.app is not None and not config.preload:
            check_app(config.app, timeout=config.stall)  # a server is not started for an app that cannot be loaded
        log.info("embedded.starting", directory=directory / ".pgtask")
        dsn = start(directory)
    log.info(event, directory=directory / ".pgtask", stop="pgtask stop --server")
    return dsn


def _report_failure(config: Config, code: ExitCode, message: str, error: BaseException | None = None) -> None:
    """Report a failure: to a person as one line, to a program as an event."""
    if config.log == "json":
        log.error("supervisor.failed", message=message, exit=int(code))
    else:
        note(message, program=PROGRAM)
    if error is not None:
        log.debug("supervisor.failed", exc_info=error)


# --- the command line ---------------------------------------------------------------------------------------


CHOICES = {setting.flag: setting.choices for setting in SETTINGS if setting.choices}
"""The values of the flags that have few."""


class SupervisorParser(Parser):
    synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("--workers", "--num-workers", "--processes", "-w"), "--procs"),
        **dict.fromkeys(("--threads", "--slots"), "--concurrency"),
        **dict.fromkeys(("--queues", "-Q"), "--queue"),
        **dict.fromkeys(("--loglevel", "--verbose", "-v"), "--log-level"),
        **dict.fromkeys(("--database", "--database-url", "--db", "--url", "-d"), "--dsn"),
    }

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parse(words: Sequence[str]) -> dict[str, Any]:
    """Return the given values by the names of their settings, as they were typed."""
    return vars(parse_words(build_parser().parse_args, words))


def build_parser() -> Parser:
    parser = SupervisorParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [APP] [-p N] [--burst] [options]",
        description="Run the tasks of an app from one Postgres table, in N worker processes.",
        epilog=_EPILOG,
        formatter_class=help_formatter(30),
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for setting in SETTINGS:
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_setting(groups[setting.group], setting)
    about = parser.add_argument_group("about")
    about.add_argument("--help", "-h", action="help", help="show this and exit")
    about.add_argument("--version", "-V", action="version", version=_version(), help="show the version and exit")
    return parser


def _add_setting(group: argparse._ActionsContainer, setting: Setting) -> None:
    text = setting.help.replace("%", "%%")
    flags = [flag for flag in (setting.short, setting.flag) if flag is not None]
    if setting.name == "app":
        group.add_argument("app", nargs="?", metavar=setting.metavar, help=text)
    elif setting.is_switch:
        group.add_argument(*flags, dest=setting.name, action="store_true", help=text)
    else:
        action = "append" if setting.name == "queue" else "store"
        group.add_argument(*flags, dest=setting.name, action=action, metavar=setting.metavar, help=text)


def _version() -> str:
    try:
        return f"{PROGRAM} {importlib.metadata.version('pgtask-supervisor')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        from pgtask import __version__

        return f"{PROGRAM} {__version__}"


if __name__ == "__main__":
    raise SystemExit(main())
