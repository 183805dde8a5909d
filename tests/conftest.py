"""One throwaway PostgreSQL cluster per session, a database per test made from a template, and loops that fail loudly.

Tests run their async code by `run(...)`; nothing here or in the tests sleeps to wait for something.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate

# Whoever started us may have ignored these, as a shell does for what runs in its background; our tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

T = TypeVar("T")
_numbers = itertools.count()


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
    assert not stray, f"errors that nobody handled: {stray}"
    return result


def with_database(dsn: str, name: str) -> str:
    parts = urlsplit(dsn)  # put together by hand: urlunsplit forgets the // of an empty host
    return f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The DSN of the session's server. `PGTASK_TEST_DSN` names another one, to test on other versions."""
    if dsn := os.environ.get("PGTASK_TEST_DSN"):
        yield dsn
        return
    directory = Path(tempfile.mkdtemp(prefix="pgtask-test-"))
    try:
        yield embedded.start(directory)
    finally:
        embedded.stop(directory)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def template(cluster: str) -> str:
    """The name of a database with our schema, to make others from."""
    name = f"pgtask_template_{os.getpid()}"

    async def make() -> None:
        connection = await asyncpg.connect(cluster)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        await migrate(with_database(cluster, name))

    asyncio.run(make())
    return name


def _fresh_database(cluster: str, template: str) -> Iterator[str]:
    name = f"pgtask_test_{os.getpid()}_{next(_numbers)}"

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(cluster)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(execute(f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield with_database(cluster, name)
    asyncio.run(execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def empty_dsn(cluster: str) -> Iterator[str]:
    """A fresh database without our schema."""
    yield from _fresh_database(cluster, "template0")


@pytest.fixture
def dsn(cluster: str, template: str) -> Iterator[str]:
    """A fresh database with our schema."""
    yield from _fresh_database(cluster, template)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no pyproject.toml of the person who runs the tests has a say in them."""
    for name in list(os.environ):
        if (name.startswith("PGTASK_") and name != "PGTASK_TEST_DSN") or name in ("DATABASE_URL",):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
