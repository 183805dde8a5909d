"""The image, built and stopped: where a Docker daemon runs and the images that it begins with can be had."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator

import pytest
from deploy_kit import DEPLOY
from fleet import Rows, put
from greeter import ReadName
from paths import REPOSITORY

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

GRACE = 5
MARGIN = 5


def docker(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def image_id() -> Iterator[str]:
    """The image of deploy/Dockerfile, which is removed at the end."""
    try:
        if docker("info", "--format", "{{.ServerVersion}}").returncode:
            pytest.skip("no Docker daemon runs")
    except FileNotFoundError:
        pytest.skip("there is no docker")
    text = (DEPLOY / "Dockerfile").read_text()
    version = re.findall(r"ARG PYTHON=(\S+)", text)[0]
    for base in set(re.findall(r"FROM (\S+:\S+)", text)):
        name = base.replace("${PYTHON}", version)
        if docker("image", "inspect", name).returncode and docker("pull", name, timeout=300).returncode:
            pytest.skip(f"{name} cannot be had")
    built = docker("build", "-q", "-f", str(DEPLOY / "Dockerfile"), str(REPOSITORY), timeout=800)
    assert built.returncode == 0, built.stderr
    yield built.stdout.strip()
    docker("rmi", "--force", built.stdout.strip())


def test_container_works_read_only_and_stops_in_its_grace(image_id: str, dsn: str, rows: Rows) -> None:
    put(dsn, ReadName("/etc/hostname"))
    arguments = ["--procs", "2", "--grace", str(GRACE)]
    sockets = re.findall(r"[?&]host=([^&]+)", dsn)
    mounts = [f"--volume={directory}:{directory}" for directory in sockets]
    started = docker(
        *("run", "--detach", "--read-only", "--cap-drop=ALL", "--network=host", *mounts),
        *("--env", f"DATABASE_URL={dsn}", image_id, *arguments),
    )
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    try:
        rows.until("SELECT count(*) FROM pg_task", holds=lambda left: left == 0)
        assert docker("exec", container, "sh", "-c", "touch /app/file").returncode != 0
        assert docker("exec", container, "id", "-u").stdout.strip() == "10001"
        began = time.monotonic()
        docker("stop", "--time", str(GRACE + MARGIN + 5), container)
        assert time.monotonic() - began < GRACE + MARGIN
        state = json.loads(docker("inspect", "--format", "{{json .State}}", container).stdout)
        assert state["ExitCode"] == 0
    finally:
        docker("rm", "--force", container)
