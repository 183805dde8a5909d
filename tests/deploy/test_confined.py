"""The image as far as it goes without an image: its entry point is process 1, no file system is writable, no root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from deploy_kit import entry_point, health_check, image_settings
from fix_database import run
from fleet import Rows, put
from greeter import ReadName
from paths import PYTHONPATH
from proxy import Line

UID = 10001
# A process 1 of its own, all mounts read-only. The first `touch` proves that.
SCRIPT = """
mount --make-rprivate / && mount -t proc proc /proc || exit 97
for place in $(awk '$2 !~ "^/proc" { print $2 }' /proc/mounts); do mount -o remount,bind,ro "$place" 2>/dev/null; done
touch "$WRITABLE" 2>/dev/null && exit 98
exec setpriv --reuid="$USER_ID" --regid="$USER_ID" --clear-groups \\
    --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


def user_id() -> int:
    """Return the user of the image, or root, without its powers, if that user cannot reach Python."""
    directories = [Path(sys.executable).parent, *Path(sys.executable).resolve().parents]
    return UID if all(directory.stat().st_mode & 0o001 for directory in directories) else 0


@contextlib.contextmanager
def confined(dsn: str, tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Yield the program that waits for the entry point of the image, which runs in namespaces of its own."""
    command = [str(Path(sys.executable).with_name(entry_point()[0])), *entry_point()[1:], *arguments]
    settings = {**image_settings(), "PGTASK_METRICS": "127.0.0.1:0", "PGTASK_APP": "greeter:app", "DATABASE_URL": dsn}
    environment = {**os.environ, **settings, "PYTHONPATH": PYTHONPATH, "WRITABLE": str(tmp_path / "file")}
    unshared = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SCRIPT, "sh", *command],
        env={**environment, "USER_ID": str(user_id())},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield unshared
    finally:
        unshared.kill()
        unshared.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")
def test_entry_point_works_as_process_1_and_stops_in_time(dsn: str, rows: Rows, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    put(dsn, *[ReadName(str(number)) for number in range(100)])

    async def main() -> None:
        async with Line(dsn) as line:  # over TCP: the user of the image may not open the socket of the server
            await asyncio.to_thread(work_and_stop, line.dsn, rows, tmp_path)

    run(main())


def work_and_stop(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with confined(dsn, tmp_path, "--procs", "2", "--grace", "10") as unshared:
        lines = wait_until_ready(unshared)
        rows.until("SELECT count(*) FROM pg_task", holds=lambda left: left == 0)
        (first,) = psutil.Process(unshared.pid).children()
        family = first.children()
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{first.pid}/status").read_text().splitlines())
        assert status["NSpid"].split()[-1] == "1"
        assert status["Uid"].split() == [str(user_id())] * 4
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        for line in lines:
            if "metrics.serving" in line:
                assert_healthy(json.loads(line)["fields"]["port"])
        first.send_signal(signal.SIGTERM)
        assert unshared.wait(10 + 5) == 0
        assert not any(process.is_running() for process in family)


def assert_healthy(port: int) -> None:
    """Check that the health check of the image succeeds at the port of the exporter, and fails at another one."""
    words = [word.replace(image_settings()["PGTASK_METRICS"], str(port)) for word in health_check()]
    assert subprocess.run([sys.executable, *words[1:]], check=False).returncode == 0
    others = [word.replace(str(port), "1") for word in words]
    assert subprocess.run([sys.executable, *others[1:]], stderr=subprocess.DEVNULL, check=False).returncode != 0


def wait_until_ready(unshared: subprocess.Popen[str]) -> list[str]:
    assert unshared.stderr is not None
    lines = []
    for line in unshared.stderr:
        lines.append(line)
        if '"worker.ready"' in line:
            return lines
    pytest.fail(f"exit code {unshared.wait()}: {''.join(lines)}")
