"""Silent workers, limits and CPUs, under a supervisor with real forks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from fix_supervisor import Start, live

pytestmark = pytest.mark.timeout(120)


# --- silence ------------------------------------------------------------------------------------------------


def test_silent_worker_logs_stacks_and_is_replaced(start: Start) -> None:
    fleet = start("falls_silent", procs=1, stall=2.0)
    (silent,) = fleet.ready(1)
    fleet.ready(2)
    assert fleet.count(rf"log worker.silent worker=1 pid={silent} silent=\S+ limit=2$") == 1, "one warning"
    assert fleet.count(rf"log worker.stalled worker=1 pid={silent}") == 1
    assert fleet.count(f"log worker.stack worker=1 pid={silent}$") == 2
    assert fleet.count(f"log worker.exited worker=1 pid={silent} signal=SIGKILL restart_in") == 1
    stacks = fleet.stderr().split("worker.stack")[1:]
    assert len(stacks) == 2
    for stack in stacks:
        assert re.search(r'File ".*supervisor_program\.py", line \d+ in blocks_forever', stack)
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert not fleet.count("log worker.died")


def test_stop_ends_in_time_with_stalled_worker(start: Start) -> None:
    fleet = start("falls_silent", procs=1, stall=1.0, grace=600.0)
    fleet.wait_for("log worker.stalled")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert len(fleet.ready(1)) == 1


def test_suspended_supervisor_counts_no_silence(start: Start) -> None:
    fleet = start("falls_silent", procs=2, stall=2.0)
    fleet.ready(2)
    frozen = psutil.Process(fleet.pid)
    began = time.monotonic()
    frozen.suspend()
    with contextlib.suppress(psutil.TimeoutExpired):
        frozen.wait(5)
    suspended = time.monotonic() - began
    frozen.resume()
    fleet.wait_for("log worker.stalled")
    silent = [re.search(r"silent=(\S+)", what) for _, what in fleet.lines if what.startswith("log worker.stalled")]
    assert [float(found[1]) < suspended for found in silent if found] == [True]
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_stall_zero_sets_no_limit_and_usr2_logs_stacks(start: Start) -> None:
    fleet = start("falls_silent", procs=1, stall=0.0)
    (silent,) = fleet.wait_for("blocked")
    os.kill(silent, signal.SIGUSR2)
    fleet.wait_for("log worker.stack")
    fleet.signal(signal.SIGQUIT)
    assert fleet.end() == 0
    assert "in blocks_forever" in fleet.stderr()
    assert not fleet.count("log worker.(silent|stalled)")


# --- limits and the place to run ----------------------------------------------------------------------------


def test_burst_sums_up_replaced_workers(start: Start) -> None:
    fleet = start("does_tasks", procs=1, burst=True, max_tasks=10)
    assert fleet.end() == 0
    assert json.loads(fleet.output()[-1]) == {"done": 32, "steps": 96, "finished": True}
    assert fleet.count("log worker.replaced worker=1 .* cause=max-tasks tasks=10") == 2


def test_worker_over_max_rss_is_replaced(start: Start) -> None:
    fleet = start("obedient", procs=1, max_rss=1)
    fleet.ready(3)
    assert fleet.count(r"log worker.replaced worker=1 .* cause=max-rss rss_mb=\d+") >= 1
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0


def test_failed_replacement_pauses_before_retry(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("old")
    fleet = start("follows_a_file", procs=1, max_rss=1)
    before = fleet.ready(1)
    (tmp_path / "code").write_text("broken")
    fleet.wait_for("log worker.not_replaced worker=1 cause=max-rss error=.* again_in=30")
    assert live(fleet) == before
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert fleet.count("code broken") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has an affinity")
def test_pin_gives_replacement_the_cpu_of_its_worker(start: Start) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    fleet = start("shows_its_cpus", procs=3, pin=True)
    fleet.ready(3)
    expected = sorted(f"cpus [{allowed[number % len(allowed)]}]" for number in range(3))
    assert sorted(what for _, what in fleet.lines if what.startswith("cpus")) == expected
    fleet.signal(signal.SIGHUP)
    fleet.wait_for("log reload.done")
    fleet.signal(signal.SIGTERM)
    assert fleet.end() == 0
    assert sorted(what for _, what in fleet.lines if what.startswith("cpus")) == sorted(2 * expected)
