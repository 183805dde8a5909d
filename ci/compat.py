"""Run the tests of the Rust crate pg_task on tables of ours: all of them must pass.

    ci/compat [fresh] [adopted] [kept]

The crate's source comes from where cargo gets it and lies in a temporary directory. Its own migrations are replaced by
what `pgtask migrate --sql --keep-pg-task` prints (fresh), or followed by that (kept), or by that without the flag
(adopted), which notifies Rust workers for a day.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migration_sql

VERSION = "1.0.0"
TESTS = 153
TIMEOUT = 1800.0
OURS = "20990101000000_pgtask.sql"
KINDS = ("fresh", "adopted", "kept")
MANIFEST = f"""\
[package]
name = "compat"
version = "0.0.0"
edition = "2021"

[dependencies]
pg_task = "={VERSION}"
"""


def main(kinds: list[str]) -> int:
    if unknown := set(kinds) - set(KINDS):
        print(f"compat: no kind of table is called {' or '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="pgtask-compat-") as scratch, server(Path(scratch)) as dsn:
        crate = download(Path(scratch))
        shutil.copytree(crate / "migrations", crate / "original")
        passed = {kind: run_tests(crate, kind, dsn) for kind in kinds or KINDS}
    for kind, count in passed.items():
        print(f"compat: {kind}: {count} of {TESTS} tests of pg_task {VERSION} pass")
    return 0 if all(count >= TESTS for count in passed.values()) else 1


@contextmanager
def server(directory: Path) -> Iterator[str]:
    """A PostgreSQL of its own."""
    try:
        yield embedded.start(directory)
    finally:
        embedded.stop(directory)


def download(directory: Path) -> Path:
    """A copy of the crate's source."""
    project = directory / "project"
    (project / "src").mkdir(parents=True)
    (project / "src" / "lib.rs").touch()
    (project / "Cargo.toml").write_text(MANIFEST)
    listing = subprocess.run(
        ["cargo", "metadata", "--format-version=1"],
        cwd=project, stdout=subprocess.PIPE, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    packages = json.loads(listing.stdout)["packages"]
    source = next(Path(one["manifest_path"]).parent for one in packages if one["name"] == "pg_task")
    return shutil.copytree(source, directory / "pg_task")


def run_tests(crate: Path, kind: str, dsn: str) -> int:
    """How many tests pass. What cargo says goes to our own output."""
    shutil.rmtree(crate / "migrations")
    if kind == "fresh":
        (crate / "migrations").mkdir()
    else:
        shutil.copytree(crate / "original", crate / "migrations")
    (crate / "migrations" / OURS).write_text(as_migration(migration_sql(keep_pg_task=kind != "adopted")))
    asyncio.run(make_database(dsn, kind, [one.read_text() for one in sorted((crate / "migrations").iterdir())]))
    os.utime(crate / "src" / "lib.rs")  # cargo does not see that the migrations are others
    found = re.fullmatch(r"(\w+://)(\w+)@/(\w+)\?(.*)", dsn)
    assert found is not None
    url = f"{found[1]}/{kind}?{found[4]}&user={found[2]}"
    print(f"compat: {kind}", flush=True)
    with subprocess.Popen(
        ["cargo", "test", "--lib", "--locked", "--quiet", "--no-fail-fast"],
        cwd=crate, env={**os.environ, "DATABASE_URL": url, "SQLX_OFFLINE": "false"}, stdout=subprocess.PIPE, text=True,
    ) as tests:  # fmt: skip
        assert tests.stdout is not None
        passed = 0
        for line in tests.stdout:
            print(line, end="", flush=True)
            if said := re.search(r"(\d+) passed;", line):
                passed = int(said[1])
    return passed


def as_migration(script: str) -> str:
    """The script of psql as sqlx takes it: in a transaction of its own, without the commands of psql."""
    return re.sub(r"(?m)^(\\set .*|BEGIN .*|COMMIT);?$", "", script)


async def make_database(dsn: str, name: str, migrations: list[str]) -> None:
    """The database that the crate's queries are checked against when they are compiled."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    connection = await asyncpg.connect(dsn, database=name)
    for migration in migrations:
        async with connection.transaction():
            await connection.execute(migration)
    await connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
