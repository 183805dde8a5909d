"""The embedded server, with real servers: found, shared, crashed, moved in on by other users, and put away."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from pgtask._postgres import embedded
from pgtask._postgres.server_user import server_user
from pgtask.errors import EmbeddedError

pytestmark = pytest.mark.timeout(60)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc or sets capabilities")

REPOSITORY = Path(embedded.__file__).parents[2]


@pytest.fixture
def project() -> Iterator[Callable[..., Path]]:
    """Makes project directories below a fresh one that others may enter (or not), and stops their servers."""
    parent = Path(tempfile.mkdtemp(prefix="pgtask-test-", dir="/tmp")).resolve()
    made: list[Path] = []

    def make(name: str = "project", *, mode: int = 0o755) -> Path:
        parent.chmod(mode)
        directory = parent / name
        directory.mkdir(parents=True)
        made.append(directory)
        return directory

    yield make
    for directory in made:
        if directory.exists():
            sockets = embedded._Home(directory).sockets(server_user(directory / ".pgtask" / "data"))
            embedded.stop(directory)
            if not sockets.is_relative_to(parent):
                shutil.rmtree(sockets, ignore_errors=True)
    shutil.rmtree(parent)


@pytest.fixture
def shared(project: Callable[..., Path]) -> Path:
    """A project whose server runs."""
    directory = project()
    embedded.start(directory)
    return directory


def psql(directory: Path, *commands: str) -> str:
    dsn = embedded.running_dsn(directory)
    assert dsn is not None
    arguments = [part for command in commands for part in ("-c", command)]
    command = [str(embedded.binary("psql")), dsn, "--no-psqlrc", "--tuples-only", "--no-align", "--quiet", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def postmaster(directory: Path) -> psutil.Process:
    return psutil.Process(int((directory / ".pgtask/data/postmaster.pid").read_text().split()[0]))


def script(directory: Path, body: str) -> list[str]:
    """A command that runs `body` in another Python, which knows `directory` and `embedded`."""
    head = f"""
        from pathlib import Path
        from pgtask._postgres import embedded
        directory = Path({str(directory)!r})
    """
    return [sys.executable, "-c", dedent(head) + dedent(body)]


def environment() -> dict[str, str]:
    path = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


# --- found, made, shared --------------------------------------------------------------------------------------


def test_first_start_makes_a_durable_server_without_tcp(project: Callable[..., Path]) -> None:
    directory = project()
    assert embedded.running_dsn(directory) is None
    assert not (directory / ".pgtask").exists()
    assert embedded.stop(directory) is False
    assert not (directory / ".pgtask").exists()

    dsn = embedded.start(directory)

    assert dsn == embedded.running_dsn(directory)
    assert embedded.is_running(directory)
    names = ("fsync", "synchronous_commit", "listen_addresses", "max_connections", "shared_buffers", "huge_pages")
    values = [psql(directory, f"show {name}") for name in names]
    assert values == ["on", "on", "", "200", "256MB", "off"]
    assert psql(directory, "show server_encoding", "select upper('é'), 'b' > 'A'") == "UTF8\nÉ|t"
    assert psql(directory, "select current_user, current_database()") == "postgres|postgres"
    assert (directory / ".pgtask/.gitignore").read_text() == "*\n"


def test_second_start_from_another_process_is_the_same_server(shared: Path) -> None:
    before = postmaster(shared)
    there = subprocess.run(
        script(shared, "print(embedded.start(directory))"), env=environment(), capture_output=True, text=True
    )
    assert there.stdout.strip() == embedded.start(shared) == embedded.running_dsn(shared)
    assert postmaster(shared) == before


def test_processes_that_start_at_once_get_one_server(project: Callable[..., Path]) -> None:
    directory = project()
    body = """
        import sys
        print("loaded", flush=True)
        sys.stdin.readline()
        embedded.start(directory)
        print((directory / ".pgtask/data/postmaster.pid").read_text().split()[0])
    """
    starters = [
        subprocess.Popen(
            script(directory, body), env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for starter in starters:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "loaded\n"
    pids = {starter.communicate("go\n", timeout=50)[0].strip() for starter in starters[:1]}
    assert [starter.communicate("go\n", timeout=50) for starter in starters[1:]]
    assert pids == {str(postmaster(directory).pid)}
