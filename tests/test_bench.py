"""The benchmarks run, say what they promise, and do not let a failed run into a number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.contender import Arena, Effort, RunFailed
from bench.meter import Work
from bench.ours import Ours
from bench.spread import percentile
from bench.summary import Run, run_of, summarise
from bench.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent

KEYS = {
    *("bench", "at", "command", "commit", "machine", "versions", "server", "settings", "session_settings"),
    *("terms", "steps_per_task", "contenders", "runs", "summary", "enqueue_many_per_second", "latency"),
}
SUMMARY_KEYS = {
    *("tasks_per_second", "steps_per_second", "ratio", "process_seconds", "transactions_per_task"),
    *("wal_bytes_per_task", "dead_rows_per_task", "hot_share", "client_cpu_us_per_task"),
    *("server_cpu_us_per_task", "peak_rss_mb"),
}


def bench(directory: Path, *arguments: str) -> tuple[str, Any]:
    """Run `python -m bench`; what it printed, and the report it wrote."""
    file = directory / "report.json"
    ended = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--json", str(file)],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout, json.loads(file.read_text())


def test_a_tiny_drain_has_all_that_is_promised(tmp_path: Path) -> None:
    printed, report = bench(
        tmp_path, "drain", "--tasks=2000", "--procs=2", "--rounds=1", "--batch=100", "--latency-seconds=0.5"
    )
    assert report.keys() >= KEYS
    assert set(report["summary"]) == set(report["contenders"]) == {"pgtask", "floor", "minimum"}
    for summary in report["summary"].values():
        assert summary.keys() >= SUMMARY_KEYS
        assert summary["failed"] == 0
        assert summary["tasks_per_second"]["min"] > 0
    assert report["settings"]["fsync"] == report["settings"]["synchronous_commit"] == "on"
    # Every task is claimed by one update and ended by one delete, in ours and in the floor alike.
    assert [run["work"]["updates"] for run in report["runs"]] == [2000, 2000, 0]
    assert [run["work"]["deletes"] for run in report["runs"]] == [2000, 2000, 2000]
    assert report["latency"]["samples"] == 25
    assert report["latency"]["start_p99"] >= report["latency"]["start_p50"] > 0
    assert report["command"].startswith("python -m bench drain --tasks 2000 --procs 2 --rounds 1 --workload noop")
    for words in ("pgtask / this", "WAL bytes", "CPU us", "peak RSS", "p99", "fsync on"):
        assert words in printed


def test_a_chain_of_steps_is_hot_in_ours_and_in_the_floor(tmp_path: Path) -> None:
    _, report = bench(
        tmp_path, "drain", "--tasks=500", "--procs=1", "--rounds=1", "--workload=chain3", "--latency-seconds=0"
    )
    assert report["steps_per_task"] == 3
    assert set(report["summary"]) == {"pgtask", "floor"}
    assert report["latency"] is None
    for run in report["runs"]:
        assert run["steps"] == 1500
        assert run["work"]["updates"] == 1500
        assert run["work"]["hot_updates"] > 0


def test_the_stages_are_compared(tmp_path: Path) -> None:
    printed, report = bench(tmp_path, "stages", "--tasks=1000", "--rounds=1")
    assert len(report["stages"]) == 2
    for name, stage in report["stages"].items():
        assert name in printed
        assert stage.keys() == {"compiled", "plain", "ratio"}
        assert stage["compiled"]["min"] > 0


def test_a_worker_that_cannot_work_is_a_failed_run(tmp_path: Path, empty_dsn: str) -> None:
    arena = Arena(empty_dsn, tmp_path, WORKLOADS["noop"], tasks=1, procs=1, batch=1)
    with pytest.raises(RunFailed, match=r"exit code 5: [\s\S]*pgtask migrate"):
        Ours().drain(arena)


def test_a_server_that_may_lose_commits_is_refused(tmp_path: Path, dsn: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "drain", "--tasks=1", "--dsn", dsn + "&synchronous_commit=off"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "synchronous_commit is off" in ended.stderr


def _run(number: int, contender: str, seconds: float) -> Run:
    work = Work(
        first_commit_at=10.0,
        last_commit_at=10.0 + seconds,
        transactions=8,
        wal_bytes=4000,
        full_page_images=0,
        updates=0,
        hot_updates=0,
        deletes=1000,
        autovacuums=0,
        server_cpu_seconds=None,
    )
    return run_of(number, contender, 1000, 2, Effort(began_at=9.0, seconds=seconds + 2, cpu_seconds=0.01), work)


def test_a_failed_run_and_its_pair_count_nowhere() -> None:
    runs = [
        _run(1, "ours", 1.0),
        _run(1, "floor", 0.5),
        Run(2, "ours", failed="it did not finish"),
        _run(2, "floor", 0.1),
        _run(3, "ours", 2.0),
        _run(3, "floor", 1.5),
        Run(1, "broken", failed="always"),
    ]
    found = summarise(runs, reference="ours")
    assert set(found) == {"ours", "floor"}
    assert (found["ours"].rounds, found["ours"].failed) == (2, 1)
    assert found["ours"].tasks_per_second.median == pytest.approx(750)
    assert found["ours"].steps_per_second.max == pytest.approx(2000)
    ratio = found["floor"].ratio
    assert ratio is not None
    assert ratio.min == pytest.approx(0.5)
    assert ratio.max == pytest.approx(0.75)
    assert found["ours"].before_seconds.median == pytest.approx(1)
    assert found["ours"].after_seconds.median == pytest.approx(1)
    assert found["ours"].server_cpu_us_per_task is None
    assert found["ours"].hot_share is None


def test_percentiles_are_numbers_that_were_measured() -> None:
    numbers = [float(number) for number in range(1, 101)]
    assert percentile(numbers, 50) == 50
    assert percentile(numbers, 99) == 99
    assert percentile(numbers[:3], 50) == 2
    assert percentile([7.0], 99) == 7
