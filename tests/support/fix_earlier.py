"""The code of an earlier schema, built from the history, to run beside the code of now."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import REPOSITORY, SUPPORT

from pgtask._postgres.migrate import SCHEMA_VERSION

MIGRATIONS = "pgtask/_postgres/sql/migrations"


class Earlier(NamedTuple):
    """A build of an earlier commit. `path` is the PYTHONPATH of its programs, with the apps of the tests of now."""

    commit: str
    version: int
    path: str

    def run(self, *words: str) -> str:
        """Run its Python with these words; return the output."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd="/",  # which holds no code of ours
            env={**os.environ, "PYTHONPATH": self.path},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="session")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    """The last commit before the newest migration."""
    commit = _last_before(SCHEMA_VERSION)
    directory = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, "pgtask", "setup.py", "pyproject.toml"))) as archive:
        archive.extractall(directory, filter="data")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600, check=False)
    if built.returncode:
        pytest.skip(f"the code of {commit[:9]} cannot be built here: {built.stderr[-200:]}")
    made = Earlier(commit, 0, os.pathsep.join(map(str, [directory, SUPPORT])))
    where = "import pgtask._postgres.migrate as found; print(found.__file__, found.SCHEMA_VERSION)"
    file, version = made.run("-c", where).split()
    assert Path(file).is_relative_to(directory)
    return made._replace(version=int(version))


def _last_before(version: int) -> str:
    """Return the last commit, on the way of this one, that lacks this version of the schema."""
    try:
        commits = _git("rev-list", "--first-parent", "HEAD").decode().split()
        return next(commit for commit in commits if f"/{version:03}_" not in _migrations(commit))
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        pytest.skip(f"the history is not here, with the code before version {version} of the schema: {error!r}")


def _migrations(commit: str) -> str:
    return _git("ls-tree", "--name-only", commit, f"{MIGRATIONS}/").decode()


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, check=True).stdout
