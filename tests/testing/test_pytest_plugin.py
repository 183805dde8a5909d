"""The fixtures that users get: seen from inside, and from the outside in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from apps import Noop
from fix_database import run
from paths import REPOSITORY

from pgtask import Client

pytest_plugins = ["pgtask.pytest_plugin"]


@pytest.fixture(scope="session")
def pgtask_server(cluster: str) -> str:
    """The server of this suite, instead of a second one; the test of a pytest of its own starts one."""
    return cluster


async def fetch(dsn: str, query: str) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


@pytest.mark.parametrize("nth", [1, 2])
def test_each_test_has_an_empty_migrated_database(pgtask_database: str, nth: int) -> None:
    assert run(fetch(pgtask_database, "SELECT count(*) FROM pg_task")) == 0
    run(fetch(pgtask_database, "INSERT INTO pg_task (step) VALUES ('{}')"))


def test_a_worker_works_and_may_be_waited_for(
    pgtask_database: str, pgtask_worker: Callable[..., subprocess.Popen[bytes]]
) -> None:
    async def main() -> None:
        async with Client(pgtask_database) as client:
            await client.enqueue(Noop())

    run(main())
    assert pgtask_worker("apps:app", "--burst").wait(30) == 0
    assert run(fetch(pgtask_database, "SELECT count(*) FROM pg_task")) == 0


INNER = """
import asyncio

from greetings import Greet

from pgtask import Client


def test_it_greets(pgtask_database, pgtask_worker, tmp_path):
    async def enqueue():
        async with Client(pgtask_database) as client:
            await client.enqueue(Greet(str(tmp_path / "said")))

    asyncio.run(enqueue())
    pgtask_worker("greetings:app")
    while not (tmp_path / "said").exists():
        pass
"""
GREETINGS = """
from __future__ import annotations

from pathlib import Path

from pgtask import App, Context, Done, Task


class Greeter(Task):
    pass


class Greet(Greeter):
    path: str

    def run(self, ctx: Context) -> Done:
        Path(self.path).touch()
        return Done()


app = App(Greeter)
"""


@pytest.mark.timeout(100)
def test_fixtures_work_in_a_project_and_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(INNER)
    (tmp_path / "greetings.py").write_text(GREETINGS)
    (tmp_path / "temporary").mkdir()
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pgtask.pytest_plugin", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != "PGTASK_TEST_DSN"},
            "TMPDIR": str(tmp_path / "temporary"),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(tmp_path)]),
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not list((tmp_path / "temporary").glob("pgtask-*"))
