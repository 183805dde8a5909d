"""Fixtures for pytest: an embedded PostgreSQL for the session, a migrated database for each test, and workers on it.

Invariant: nothing starts, and no part of the engine is imported, before a test uses a fixture. pytest finds this module
by its entry point.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

__all__ = ["pgtask_database", "pgtask_server", "pgtask_worker"]

STOP_TIMEOUT = 20.0  # seconds
_numbers = itertools.count()


@pytest.fixture(scope="session")
def pgtask_server() -> Iterator[str]:
    """The DSN of a throwaway PostgreSQL, which needs the extra `pgtask-supervisor[embedded]`; or, if the variable
    `PGTASK_TEST_DSN` is set, of that server: the fixtures then make and drop databases there."""
    if dsn := os.environ.get("PGTASK_TEST_DSN"):
        yield dsn
        return
    from pgtask._postgres import embedded

    directory = Path(tempfile.mkdtemp(prefix="pgtask-"))
    try:
        yield embedded.start(directory)
    finally:
        embedded.stop(directory)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def _pgtask_template(pgtask_server: str) -> Iterator[str]:
    """The name of a migrated database, the template of others: that is faster than migrating each."""
    from pgtask._postgres.migrate import migrate

    name = f"pgtask_fixture_template_{os.getpid()}"
    asyncio.run(_execute(pgtask_server, f"CREATE DATABASE {name}"))
    asyncio.run(migrate(_with_database(pgtask_server, name)))
    yield name
    asyncio.run(_execute(pgtask_server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def pgtask_database(pgtask_server: str, _pgtask_template: str) -> Iterator[str]:
    """The DSN of a database for this test alone, with the schema of pgtask and no tasks."""
    name = f"pgtask_fixture_{os.getpid()}_{next(_numbers)}"
    asyncio.run(_execute(pgtask_server, f"CREATE DATABASE {name} TEMPLATE {_pgtask_template}"))
    yield _with_database(pgtask_server, name)
    asyncio.run(_execute(pgtask_server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def pgtask_worker(pgtask_database: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a supervisor with one worker on `pgtask_database`: `pgtask_worker("greetings:app", "--queue", "mail")`.

    Returns the process; with `"--burst"`, `wait()` for it. It can import the modules that your test can. At the end of
    the test the fixture tells it to drain, and kills it if that takes longer than 20 s. pytest captures its log.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(app: str, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pgtask._cli.supervisor", app, "--procs", "1"]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "PGTASK_DSN": pgtask_database}
        started.append(subprocess.Popen([*command, *flags], env=environment))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _execute(dsn: str, statement: str) -> None:
    from pgtask._postgres.connection import connect

    connection = await connect(dsn, name="pgtask tests")
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def _with_database(dsn: str, name: str) -> str:
    parts = urlsplit(dsn)  # put together by hand: urlunsplit forgets the // of an empty host
    return f"{parts.scheme}://{parts.netloc}/{name}" + (f"?{parts.query}" if parts.query else "")
