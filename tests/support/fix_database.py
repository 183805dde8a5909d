"""One throwaway PostgreSQL cluster per session, a database per test made from a template, and loops that fail loudly.

Tests run their async code by `run(...)`; nothing here or in the tests sleeps to wait for something.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate

os.environ["_PGTASK_CHECK_INVARIANTS"] = "1"  # the debug mode: a worker that breaks an invariant fails

# Our parent may have ignored these, as a shell does for its background; our tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

T = TypeVar("T")
_numbers = itertools.count()
_kept: dict[str, Any] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_database(cleanup): the tests of this module share a database")


def pytest_collection_finish() -> None:
    """Keep what pytest has collected from the collector, which `run` calls: without this, each call takes 0.2 s.

    The bytecode of pgtask and of the tests may be kept; that of the programs that tests write may not.
    """
    gc.collect()
    gc.freeze()
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def run(coroutine: Awaitable[T], timeout: float = 60) -> T:
    """Run a coroutine to its end; an exception that reaches the loop's handler fails the test too."""
    stray: list[dict[str, Any]] = []

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))
        async with asyncio.timeout(timeout):
            result = await coroutine
        gc.collect()
        return result

    result = asyncio.run(main())
    assert not stray, f"unhandled errors: {stray}"
    return result


def with_database(dsn: str, name: str) -> str:
    parts = urlsplit(dsn)  # put together by hand: urlunsplit forgets the // of an empty host
    return f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"


def memory() -> str | None:
    """Return a directory in memory, if there is room: a server is made there in a quarter of the time."""
    directory = Path("/dev/shm")
    return str(directory) if directory.is_dir() and shutil.disk_usage(directory).free > 4 << 30 else None


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The DSN of the session's server. `PGTASK_TEST_DSN` names another one, to test on other versions."""
    if dsn := os.environ.get("PGTASK_TEST_DSN"):
        yield dsn
        return
    directory = Path(tempfile.mkdtemp(prefix="pgtask-test-", dir=memory()))
    try:
        yield embedded.start(directory)
    finally:
        embedded.stop(directory)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def template(cluster: str) -> str:
    """The name of a database with our schema, to make others from."""
    name = f"pgtask_template_{os.getpid()}"

    asyncio.run(execute(cluster, f"CREATE DATABASE {name}"))
    asyncio.run(migrate(with_database(cluster, name)))
    return name


async def execute(dsn: str, statement: str) -> None:
    """Run a statement on a connection of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def administer(cluster: str, statement: str) -> None:
    """Run a statement on the connection that this process keeps to a server: a new one takes 10 ms."""
    import psycopg  # here, since programs without it import this module too

    kept = _kept.get(cluster)
    if kept is None or kept.closed:
        kept = _kept[cluster] = psycopg.connect(cluster, autocommit=True)
    kept.execute(statement.encode())


def pytest_unconfigure() -> None:
    for kept in _kept.values():
        kept.close()


def fresh_database(cluster: str, template: str) -> Iterator[str]:
    """Make a database from a template, and drop it afterwards."""
    name = f"pgtask_test_{os.getpid()}_{next(_numbers)}"
    # In memory a copy of files takes half the time. A server older than 15 does not know the option.
    strategy = "" if "PGTASK_TEST_DSN" in os.environ or memory() is None else "STRATEGY file_copy"
    administer(cluster, f"CREATE DATABASE {name} TEMPLATE {template} {strategy}")
    yield with_database(cluster, name)
    administer(cluster, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_dsn(cluster: str) -> Iterator[str]:
    """A fresh database without our schema."""
    yield from fresh_database(cluster, "template0")


@pytest.fixture(scope="module")
def module_dsn(cluster: str, template: str) -> Iterator[str]:
    """A database with our schema for all tests of a module."""
    yield from fresh_database(cluster, template)


@pytest.fixture
def dsn(request: pytest.FixtureRequest, cluster: str, template: str) -> Iterator[str]:
    """A fresh database with our schema.

    In a module marked `one_database`, the database of the module, which is faster. Before each test, the SQL that the
    mark names runs, and the tasks are deleted.
    """
    mark = request.node.get_closest_marker("one_database")
    if mark is None:
        yield from fresh_database(cluster, template)
    else:
        shared: str = request.getfixturevalue("module_dsn")
        asyncio.run(execute(shared, "; ".join([*mark.args, "DELETE FROM pg_task"])))
        yield shared


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the variables and the pyproject.toml of the caller out of the tests."""
    for name in list(os.environ):
        if (name.startswith("PGTASK_") and name != "PGTASK_TEST_DSN") or name in ("DATABASE_URL",):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_log_of_other_tests() -> Iterator[None]:
    """Take away the handlers of a program that ran in our process: its stderr is closed once its test is over."""
    loggers = [logging.getLogger(), logging.getLogger("pgtask")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        for handler in logger.handlers[:]:
            if type(handler).__module__ == "pgtask._cli.logging":
                logger.removeHandler(handler)
        if logger.level != level:
            logger.setLevel(level)
