"""A real pgbouncer in transaction mode, before a PostgreSQL of its own that the tests may stop and start.

The server is not the one of `fix_database`: that serves all other tests, and these ones take it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest
from fix_database import with_database

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate
from pgtask._postgres.server_user import server_user

ROLE = "pooled"
PORT = 6432  # only part of the name of a socket, in a directory that no other pgbouncer uses
START_TIMEOUT = 15.0

SETTINGS: dict[str, str | int | float] = {
    "pool_mode": "transaction",
    "auth_type": "trust",
    "max_client_conn": 200,
    "default_pool_size": 10,
    "server_login_retry": 1,
    "query_wait_timeout": 120,
}


class Server:
    """The PostgreSQL behind the pooler. `ROLE` logs in with a password, so that a test can change it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.dsn = embedded.start(directory)
        self.data = directory / ".pgtask" / "data"
        self.user = server_user(self.data)
        rules = self.data / "pg_hba.conf"
        rules.write_text(f"local all {ROLE} scram-sha-256\n{rules.read_text()}")
        self.execute(f"CREATE ROLE {ROLE} SUPERUSER LOGIN PASSWORD 'right'", "SELECT pg_reload_conf()")
        self.execute("CREATE DATABASE template_tasks")
        asyncio.run(migrate(with_database(self.dsn, "template_tasks")))

    def execute(self, *statements: str, dsn: str | None = None) -> None:
        """Run each as a transaction of its own, past the pooler."""

        async def main() -> None:
            connection = await asyncpg.connect(dsn or self.dsn)
            for statement in statements:
                await connection.execute(statement)
            await connection.close()

        asyncio.run(main())

    def set_password(self, password: str) -> None:
        self.execute(f"ALTER ROLE {ROLE} PASSWORD '{password}'")

    def stop(self) -> None:
        """Shut it down, with its sessions; returns when it is gone."""
        embedded.stop(self._directory)

    def start(self) -> None:
        """Returns when it accepts connections."""
        assert embedded.start(self._directory) == self.dsn


class Counts(NamedTuple):
    """The clients of one database in the eyes of the pooler."""

    active: int
    waiting: int


class Bouncer:
    """One pgbouncer, and its admin console. `dsn` goes through it, `direct` past it, both to the same database."""

    def __init__(self, program: str, server: Server, name: str, directory: Path) -> None:
        self._program, self._directory = program, directory
        self.server, self.name = server, name
        self.direct = with_database(server.dsn, name)
        self._settings = dict(SETTINGS)
        self._passwords: dict[str, str] = {ROLE: "right"}
        self._process: subprocess.Popen[bytes] | None = None
        os.chown(directory, *server.user)
        self._write()

    @property
    def dsn(self) -> str:
        return f"postgresql://{ROLE}:right@/{self.name}?host={self._directory}&port={PORT}&sslmode=disable"

    @property
    def log(self) -> str:
        """All that it has logged."""
        return (self._directory / "log").read_text()

    def configure(self, **settings: str | int | float) -> None:
        """For the next `start`, or `reload`."""
        self._settings |= settings
        self._write()

    def know_password(self, password: str) -> None:
        """Which it asks of clients, unless it trusts them, and gives to the server; from the next `start` or `reload`
        on."""
        self._passwords[ROLE] = password
        self._write()

    def _write(self) -> None:
        host = self.server.dsn.partition("host=")[2].partition("&")[0].replace("%2F", "/")
        lines = [
            *("[databases]", f"* = host={host} port=5432"),
            *("[pgbouncer]", "listen_addr =", f"listen_port = {PORT}", f"unix_socket_dir = {self._directory}"),
            *(f"auth_file = {self._directory / 'users'}", "admin_users = admin"),
            *(f"{name} = {value}" for name, value in self._settings.items()),
        ]
        users = {**self._passwords, "admin": "admin"}
        self._put("ini", "\n".join(lines) + "\n")
        self._put("users", "".join(f'"{name}" "{password}"\n' for name, password in users.items()))

    def _put(self, name: str, text: str) -> None:
        path = self._directory / name
        path.write_text(text)
        os.chown(path, *self.server.user)
        path.chmod(0o600)

    # --- the process

    def start(self) -> None:
        """Returns when its console answers."""
        user = self.server.user
        identity: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": []}
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, str(self._directory / "ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **(identity if os.geteuid() == 0 else {}),
            )
        deadline = time.monotonic() + START_TIMEOUT
        while self._console("SHOW VERSION").returncode:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log

    def kill(self) -> None:
        """End it at once, and all its connections; it leaves its socket behind."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    # --- the admin console

    def _console(self, command: str) -> subprocess.CompletedProcess[str]:
        address = f"host={self._directory} port={PORT} user=admin password=admin dbname=pgbouncer sslmode=disable"
        return subprocess.run(
            [str(embedded.binary("psql")), "--no-psqlrc", "--csv", "--command", command, address],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def command(self, command: str) -> list[dict[str, str]]:
        """A command of the console, such as `SHOW POOLS`; its rows."""
        done = self._console(command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return list(csv.DictReader(done.stdout.splitlines()))

    def set(self, name: str, value: int) -> None:
        """Change a setting while it runs."""
        self.command(f"SET {name} = {value}")

    def pause(self) -> None:
        """Lets each transaction come to its end, and then no other begin; returns when none is left."""
        self.command("PAUSE")

    def resume(self) -> None:
        self.command("RESUME")

    def reconnect(self) -> None:
        """Have each connection to the server end with its transaction."""
        self.command("RECONNECT")

    def reload(self) -> None:
        self.command("RELOAD")

    def counts(self) -> Counts:
        """The clients of our database."""
        pools = [row for row in self.command("SHOW POOLS") if row["database"] == self.name]
        return Counts(sum(int(row["cl_active"]) for row in pools), sum(int(row["cl_waiting"]) for row in pools))

    def until_waiting(self, clients: int) -> None:
        """Wait until so many clients of our database wait for a connection to the server."""
        deadline = time.monotonic() + START_TIMEOUT
        while (counts := self.counts()).waiting < clients:
            assert time.monotonic() < deadline, counts

    def clients(self) -> int:
        """The connections of clients, as `max_client_conn` counts them, without our own."""
        return sum(row["database"] != "pgbouncer" for row in self.command("SHOW CLIENTS"))


@contextlib.contextmanager
def open_directory(prefix: str) -> Iterator[Path]:
    """One that pgbouncer and the server reach: as root, we run both as another user."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def pgbouncer_program() -> str:
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("no pgbouncer is installed (apt install pgbouncer)")
    return program


@pytest.fixture(scope="session")
def pooled_server(pgbouncer_program: str) -> Iterator[Server]:
    with open_directory("pgtask-pooled-") as directory:
        try:
            yield Server(directory)
        finally:
            embedded.stop(directory)


@pytest.fixture
def bouncer(pgbouncer_program: str, pooled_server: Server) -> Iterator[Bouncer]:
    """A pgbouncer that is not started yet, before a fresh database with our schema. Its server is there again, with the
    right password, when the test is over."""
    name = f"pooled_{time.monotonic_ns()}"
    pooled_server.execute(f"CREATE DATABASE {name} TEMPLATE template_tasks")
    with open_directory("pgtask-bouncer-") as directory:
        bouncer = Bouncer(pgbouncer_program, pooled_server, name, directory)
        try:
            yield bouncer
        finally:
            bouncer.kill()
            pooled_server.start()
            pooled_server.execute(f"ALTER ROLE {ROLE} PASSWORD 'right'", f"DROP DATABASE {name} WITH (FORCE)")
