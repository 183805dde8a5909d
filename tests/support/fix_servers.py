"""The oldest PostgreSQL that is installed on this machine, for tests whose promise depends on the version's planner."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fix_database import memory

from pgtask._postgres.server_user import server_user

OLDEST_VERSION = 14
PORT = 5432  # only part of the name of a socket, in a directory of its own


def _programs() -> Path | None:
    """Return the directory of the oldest version that we support, if the packages of Debian have put one here."""
    found = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()]
    versions = sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())
    version = next((version for version in versions if version >= OLDEST_VERSION), None)
    return None if version is None else Path(f"/usr/lib/postgresql/{version}/bin")


@pytest.fixture(scope="session")
def installed_cluster() -> Iterator[str]:
    """The DSN of a server of that version, which belongs to the session."""
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL is installed in /usr/lib/postgresql (apt install postgresql)")
    directory = Path(tempfile.mkdtemp(prefix="pgtask-installed-", dir=memory()))
    user = server_user(directory / "data")
    identity: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": []} if os.geteuid() == 0 else {}
    os.chown(directory, *user)

    def execute(program: str, *args: str) -> None:
        command = [str(programs / program), "-D", str(directory / "data"), *args]
        with (directory / "output").open("ab") as output:  # a pipe would stay open in the server
            done = subprocess.run(command, cwd=directory, stdout=output, stderr=output, check=False, **identity)
        assert done.returncode == 0, (directory / "output").read_text()

    try:
        execute("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        options = f"-p {PORT} -c listen_addresses= -c unix_socket_directories={directory} -c fsync=off"
        execute("pg_ctl", "start", "--wait", "--silent", "-o", options)
        try:
            yield f"postgresql://postgres@/postgres?host={directory}&port={PORT}"
        finally:
            execute("pg_ctl", "stop", "--mode=immediate", "--silent")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
