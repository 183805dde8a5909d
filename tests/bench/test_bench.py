"""The benchmarks: each scenario runs, its report is complete, and no number includes a failed run."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from paths import REPOSITORY

from bench.contenders.peer import Peer, find_peers, portable_dsn
from bench.contenders.pgtask import Pgtask
from bench.contenders.registry import choose_contenders, find_contenders
from bench.harness.contender import Arena, ContenderSkipped, Effort, RunFailed
from bench.harness.meter import Work, trim_fringe
from bench.harness.paths import PEERS
from bench.harness.server import BenchError, open_server
from bench.harness.spread import percentile
from bench.harness.summary import ContenderRun, contender_run, summarise
from bench.scenarios.crashes import rate_outside
from bench.scenarios.registry import SCENARIOS
from bench.workloads.workload import WORKLOADS

KEYS = {
    *("bench", "at", "command", "commit", "machine", "versions", "server", "settings", "session_settings"),
    *("terms", "steps_per_task", "contenders", "skipped", "runs", "summary", "enqueue_many_per_second", "latency"),
}
SUMMARY_KEYS = {
    *("tasks_per_second", "steps_per_second", "ratio", "process_seconds", "transactions_per_task"),
    *("wal_bytes_per_task", "dead_rows_per_task", "hot_share", "client_cpu_us_per_task"),
    *("tree_cpu_us_per_task", "server_cpu_us_per_task", "peak_rss_mb"),
}


@pytest.fixture(scope="module")
def bench_dsn() -> Iterator[str]:
    """Yield the DSN of a server for all tests of this file."""
    with open_server(None) as server:
        yield server.dsn


def bench(directory: Path, *arguments: str, code: int = 0) -> tuple[str, Any]:
    """Run `python -m bench`; return its output and its report."""
    file = directory / "report.json"
    ended = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--json", str(file)],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == code, ended.stderr + ended.stdout
    return ended.stdout, json.loads(file.read_text())


# --- scenarios


def test_drain_report_is_complete(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(
        tmp_path,
        *("drain", "--tasks=2000", "--procs=2", "--rounds=1", "--batch=100", "--latency-seconds=0.5"),
        *("--dsn", bench_dsn),
    )
    assert report.keys() >= KEYS
    assert set(report["summary"]) == set(report["contenders"]) == {"pgtask", "floor", "minimum"}
    assert set(report["skipped"]) == {"bare"}
    for summary in report["summary"].values():
        assert summary.keys() >= SUMMARY_KEYS
        assert summary["failed"] == 0
        assert summary["tasks_per_second"]["min"] > 0
    assert report["settings"]["fsync"] == report["settings"]["synchronous_commit"] == "on"
    # The floor claims each task by one update and ends it by one delete; pgtask claims so until it holds the rows.
    updates = [run["work"]["updates"] for run in report["runs"]]
    assert 0 < updates[0] <= 2000
    assert updates[1:] == [2000, 0]
    assert [run["work"]["deletes"] for run in report["runs"]] == [2000, 2000, 2000]
    assert set(report["latency"]) == {"pgtask"}
    assert report["latency"]["pgtask"]["samples"] == 25
    assert report["latency"]["pgtask"]["start_p99"] >= report["latency"]["pgtask"]["start_p50"] > 0
    assert report["command"].startswith("python -m bench drain --tasks 2000 --procs 2 --rounds 1 --workload noop")
    for words in ("pgtask / this", "WAL bytes", "CPU us", "peak RSS", "p99", "fsync on", "skipped: the steps of noop"):
        assert words in printed

    svg = tmp_path / "drain.svg"
    subprocess.run(
        [sys.executable, "-m", "bench", "plot", str(tmp_path / "report.json"), str(svg)],
        cwd=REPOSITORY,
        check=True,
        timeout=120,
    )
    drawn = ET.parse(svg).getroot()
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"pgtask", "floor", "minimum"} <= set(texts)


@pytest.mark.faults
def test_drain_of_chain5_updates_hot(tmp_path: Path, bench_dsn: str) -> None:
    _, report = bench(
        tmp_path,
        *("drain", "--tasks=500", "--procs=1", "--rounds=1", "--workload=chain5", "--latency-seconds=0"),
        *("--dsn", bench_dsn),
    )
    assert report["steps_per_task"] == 5
    assert set(report["summary"]) == {"pgtask", "floor"}
    assert set(report["skipped"]) == {"minimum", "bare"}
    assert report["latency"] == {}
    for run in report["runs"]:
        assert run["steps"] == 2500
        assert 2000 <= run["work"]["updates"] <= 2500, "the first step of a task may be held, and needs no claim"
        assert run["work"]["hot_updates"] > 0


@pytest.mark.parametrize("workload", ["sqlwrite", "dbquery"])
@pytest.mark.faults
def test_drain_with_queries_is_compared_with_bare(tmp_path: Path, bench_dsn: str, workload: str) -> None:
    _, report = bench(
        tmp_path,
        *("drain", "--tasks=40", "--procs=1", "--rounds=1", "--latency-seconds=0", "--contenders=pgtask,bare"),
        *(f"--workload={workload}", "--dsn", bench_dsn),
    )
    assert report["summary"].keys() == {"pgtask", "bare"}
    assert report["summary"]["bare"]["ratio"]["min"] > 0


@pytest.mark.faults
def test_doors_are_compared_with_bare_loops(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(tmp_path, "doors", "--tasks=50", "--rounds=1", "--dsn", bench_dsn)
    assert report["ratio"].keys() == {"Client", "SyncClient", "psycopg, conn=", "psycopg2, conn="}
    assert all(name in printed for name in report["rates"])


@pytest.mark.faults
def test_enqueue_is_compared_with_copy(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(tmp_path, "enqueue", "--tasks=3000", "--rounds=1", "--dsn", bench_dsn)
    assert report["rates"].keys() == {"enqueue_many", "psql copy", "asyncpg copy"}
    assert report["ratio"].keys() == {"psql copy", "asyncpg copy"}
    assert all(rate["min"] > 0 for rate in report["rates"].values())
    assert report["memory_mb"].keys() == {"1000", "3000"}
    assert "peak memory" in printed


@pytest.mark.faults
def test_producers_are_compared_with_no_trigger(tmp_path: Path, bench_dsn: str) -> None:
    run = ("producers", "--connections=3", "--seconds=0.2", "--rounds=1")
    printed, report = bench(tmp_path, *run, "--dsn", bench_dsn)
    assert report["rates"].keys() == {"no trigger", "none asleep", "asleep elsewhere", "asleep"}
    assert report["ratio"]["no trigger"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert "asleep elsewhere" in printed


def test_idle_reports_cost_beside_dead_weight(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(
        tmp_path,
        *(
            "idle",
            "--procs=1",
            "--seconds=0.5",
            "--settle=0.5",
            "--future=10",
            "--parked=10",
            "--leased=10",
            "--dsn",
            bench_dsn,
        ),
    )
    assert report["cpu_percent"] < 50
    assert report["worker_unique_mb"] > 1
    assert "10 future, 10 parked, 10 leased" in printed


@pytest.mark.faults
def test_depth_compares_cases_with_their_base(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(
        tmp_path,
        *("depth", "--scenarios=snapshot,cold", "--deep=3000", "--procs=1", "--rounds=1", "--claims=4"),
        *("--dsn", bench_dsn),
    )
    assert {name: flat["base"] for name, flat in report["flatness"].items()} == {"deep": None, "snapshot": "deep"}
    assert report["flatness"]["snapshot"]["ratio"]["min"] > 0
    assert all(flat["rate"]["min"] > 0 for flat in report["flatness"].values())
    assert report["cold"]["claims"] == 4
    assert report["cold"]["p99"] > 0
    assert "no ANALYZE" in printed


@pytest.mark.faults
def test_procs_compares_counts_with_the_best(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(tmp_path, "procs", "--counts=1,2", "--tasks=500", "--rounds=1", "--dsn", bench_dsn)
    assert report["counts"].keys() == {"1", "2"}
    assert max(at["of_best"]["max"] for at in report["counts"].values()) == 1
    assert "of the best" in printed


@pytest.mark.faults
def test_recover_times_the_restart_of_killed_steps(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(
        tmp_path,
        *("recover", "--procs=2", "--tasks=6", "--rounds=1", "--step-seconds=1.5", "--lease-timeout=1"),
        *("--dsn", bench_dsn),
    )
    assert report["died"][0] >= 1
    assert 0 < report["half_ms"]["median"] <= report["all_ms"]["median"] < 20_000, "they run alone"
    assert "died with the worker" in printed


@pytest.mark.faults
def test_share_compares_with_the_ideal(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(
        tmp_path, "share", "--counts=2", "--steps=4", "--step-seconds=0.05", "--rounds=1", "--dsn", bench_dsn
    )
    assert {one["kind"] for one in report["shared"]} == {
        "computes",
        "computes, in a thread",
        "awaits",
        "sleeps, in a thread",
    }
    assert all(0 < one["of_ideal"]["median"] <= 1.05 for one in report["shared"])
    assert "of the ideal" in printed


@pytest.mark.faults
def test_crashes_lose_no_task(tmp_path: Path, bench_dsn: str) -> None:
    printed, report = bench(
        tmp_path,
        *("crashes", "--tasks=5000", "--kills=2", "--procs=2", "--rounds=1", "--halves=kill,segfault"),
        *("--steps=16", "--step-seconds=1", "--dsn", bench_dsn),
    )
    assert (report["lost"], report["doubled"], report["parked"], report["kills"]) == (0, 0, 0, 2)
    assert 0 < report["release_ms"]["median"] < 5000
    assert report["outside_releases"]["seconds"] < report["with_kills"]["seconds"]
    assert 3 <= report["poison_deaths"] <= 10
    assert [(one["scenario"], one["parked"]) for one in report["halves"]] == [("kill", 0), ("segfault", 1)]
    assert report["halves"][1]["deaths"] <= 4 + 3
    assert report["poison"] == "worker process died 3 times while running Poison.Segfault: SIGSEGV"
    assert "all workers ready" in printed


def test_rate_outside_spans_excludes_their_commits() -> None:
    commits = [(float(second), 10 if 3 <= second < 6 else 100) for second in range(11)]
    assert rate_outside(commits, []).per_second == pytest.approx((8 * 100 + 30) / 10)
    rest = rate_outside(commits, [(3.0, 5.0), (4.0, 6.0), (-5.0, 0.0), (10.0, 99.0)], rate_outside(commits, []))
    assert rest.per_second == pytest.approx(800 / 7)
    assert rest.seconds == 7
    assert rest.share == pytest.approx(800 / 7 / 83)


def test_stages_compare_compiled_with_plain(tmp_path: Path) -> None:
    printed, report = bench(tmp_path, "stages", "--tasks=1000", "--rounds=1")
    assert len(report["stages"]) == 2
    for name, stage in report["stages"].items():
        assert name in printed
        assert stage.keys() == {"compiled", "plain", "ratio"}
        assert stage["compiled"]["min"] > 0


# --- peers

TOML = """
name = "{name}"
about = "a queue in a table"
install = [["{python}", "{{here}}/peer.py", "install", "{{home}}"]]
version = ["{python}", "-c", "print('1.2.3')"]
fill = ["{python}", "{{here}}/peer.py", "fill", "{{dsn}}", "{{tasks}}", "{{workload}}"]
drain = ["{python}", "{{here}}/peer.py", "drain", "{{dsn}}", "{{tasks}}", "{{procs}}"]
latency = ["{python}", "{{here}}/peer.py", "latency", "{{per_second}}", "{{seconds}}"]
left = "SELECT count(*) FROM queue"
settle = ["VACUUM (ANALYZE) queue"]
limits = {{ procs = 1, tasks = 100 }}
{more}
"""

PROGRAM = """
import asyncio, pathlib, sys
import asyncpg

async def main(verb, dsn, tasks, *rest):
    connection = await asyncpg.connect(dsn)
    if verb == "fill":
        await connection.execute("CREATE TABLE queue (number integer)")
        await connection.execute("INSERT INTO queue SELECT generate_series(1, $1::integer)", int(tasks))
    else:
        for number in range({drained}):
            await connection.execute("DELETE FROM queue WHERE number = $1", number + 1)
    await connection.close()

verb, *rest = sys.argv[1:]
if verb == "install":
    with pathlib.Path(rest[0], "installed").open("a") as file:
        file.write("once")
elif verb == "latency":
    print('hello\\n{{"start_p50":1,"start_p99":2,"enqueue_p50":0.5,"enqueue_p99":1.5,"samples":7}}')
else:
    asyncio.run(main(verb, *rest))
"""


def make_peer(directory: Path, name: str, *, drained: int = 100, more: str = "") -> None:
    home = directory / name
    home.mkdir(parents=True)
    (home / "peer.toml").write_text(TOML.format(name=name, python=sys.executable, more=more))
    (home / "peer.py").write_text(PROGRAM.format(drained=drained))


@pytest.mark.faults
def test_drain_measures_peers_and_names_skipped_ones(tmp_path: Path, bench_dsn: str) -> None:
    peers, homes = tmp_path / "peers", tmp_path / "homes"
    make_peer(peers, "good")
    make_peer(peers, "lazy", drained=99)
    make_peer(peers, "wrong", more='needs = ["no-such-program"]')
    make_peer(peers, "other", more='workloads = ["chain5"]')
    make_peer(peers, "broken")
    (peers / "broken" / "peer.py").write_text("raise SystemExit('there is no such package')")
    printed, report = bench(
        tmp_path,
        *("drain", "--tasks=500", "--procs=2", "--rounds=1", "--latency-seconds=0", "--dsn", bench_dsn),
        *("--contenders=pgtask,good,lazy,wrong,other,broken", f"--peers={peers}", f"--peers-home={homes}"),
        code=1,
    )
    assert report["skipped"] == {
        "wrong": "no-such-program is not on the PATH",
        "other": "it does not do noop",
        "broken": "install: there is no such package",
    }
    assert report["contenders"]["good"] == {
        "about": "a queue in a table",
        "version": "good 1.2.3",
        "tasks": 100,
        "procs": 1,
    }
    assert report["summary"].keys() == {"pgtask", "good"}
    good = report["summary"]["good"]
    assert (good["rounds"], good["failed"]) == (1, 0)
    assert good["ratio"]["min"] > 0
    assert good["transactions_per_task"]["min"] >= 1
    assert good["dead_rows_per_task"]["median"] == 1
    assert {run["failed"] for run in report["runs"] if run["contender"] == "lazy"} == {"1 of 100 tasks were left"}
    for line in ("100 tasks only", "1 processes only", "skipped: it does not do noop", "FAILED    round 1, lazy: 1 of"):
        assert line in printed
    assert (homes / "good" / "installed").read_text() == "once"


@pytest.mark.faults
def test_flows_measures_durable_peers(tmp_path: Path, bench_dsn: str) -> None:
    peers, homes = tmp_path / "peers", tmp_path / "homes"
    make_peer(peers, "durable", more='workloads = ["chain5"]')
    make_peer(peers, "lazy", drained=99, more='workloads = ["chain5"]')
    make_peer(peers, "fleeting")
    printed, report = bench(
        tmp_path,
        *("flows", "--runs=100", "--procs=2", "--rounds=2", "--samples=2", "--steps=10", "--dsn", bench_dsn),
        *("--contenders=durable,lazy,fleeting", "--peer-runs=300", f"--peers={peers}", f"--peers-home={homes}"),
        code=1,
    )
    assert report["skipped"] == {"fleeting": "it does not do chain5"}
    assert report["peers"].keys() == {"durable", "lazy"}
    durable = report["peers"]["durable"]
    assert (durable["entrant"]["tasks"], durable["failures"]) == (100, [])
    rates, ours = durable["runs_per_second"], report["steps_per_second"]
    assert ours["min"] / 5 / rates["max"] <= durable["ratio"]["median"] <= ours["max"] / 5 / rates["min"]
    assert report["peers"]["lazy"]["ratio"] is None
    for line in (
        "durable",
        "failed: round 2, lazy: 1 of 100 tasks were left",
        "skipped fleeting: it does not do chain5",
    ):
        assert line in printed


@pytest.mark.faults
def test_latency_measures_pgtask_and_a_peer(tmp_path: Path, bench_dsn: str) -> None:
    make_peer(tmp_path / "peers", "good")
    printed, report = bench(
        tmp_path,
        *("latency", "--per-second=200", "--procs=1", "--seconds=0.2", "--dsn", bench_dsn),
        *("--contenders=pgtask,floor,good", f"--peers={tmp_path / 'peers'}", f"--peers-home={tmp_path / 'homes'}"),
    )
    assert [(one["per_second"], one["samples"]) for one in report["latency"]["pgtask"]] == [(200, 40)]
    assert [(one["start_p99"], one["samples"]) for one in report["latency"]["good"]] == [(2, 7)]
    assert "start p50" in printed


def test_peer_is_reinstalled_only_after_a_change(tmp_path: Path) -> None:
    make_peer(tmp_path / "peers", "good")
    peer = Peer(tmp_path / "peers" / "good", tmp_path / "homes")
    noted = tmp_path / "homes" / "good" / "installed"
    assert peer.prepare(WORKLOADS["noop"]) == peer.prepare(WORKLOADS["noop"]) == "good 1.2.3"
    assert noted.read_text() == "once"
    noted.write_text("")
    with (tmp_path / "peers" / "good" / "peer.py").open("a") as program:
        program.write("# changed\n")
    peer.prepare(WORKLOADS["noop"])
    assert noted.read_text() == "once"
    with pytest.raises(ContenderSkipped, match="does not do payload1k"):
        peer.prepare(WORKLOADS["payload1k"])


def test_peer_program_that_fails_fails_the_run(tmp_path: Path, empty_dsn: str) -> None:
    make_peer(tmp_path, "bad")
    (tmp_path / "bad" / "peer.py").write_text("import sys\nsys.exit('it cannot connect')")
    arena = Arena(empty_dsn, tmp_path, WORKLOADS["noop"], tasks=1, procs=1, batch=1)
    peer = Peer(tmp_path / "bad", tmp_path / "homes")
    with pytest.raises(RunFailed, match="exit code 1: it cannot connect"):
        peer.fill(arena)


def test_peers_of_this_checkout_are_valid() -> None:
    for directory in PEERS.iterdir():
        if (directory / "peer.toml").exists():
            peer = Peer(directory, directory / "nowhere")
            assert peer.name
            assert peer.about
    assert {"graphile", "pg_task"} <= find_peers(PEERS, PEERS).keys()
    found = find_contenders()
    assert [contender.name for contender in choose_contenders("floor, graphile,floor", found)] == ["floor", "graphile"]
    assert len(choose_contenders("all", found)) == len(found)
    with pytest.raises(BenchError, match="unknown contenders: nobody; there are: pgtask"):
        choose_contenders("pgtask,nobody", found)


def test_peer_toml_with_unknown_key_is_refused(tmp_path: Path) -> None:
    make_peer(tmp_path, "typo", more='drian = ["x"]')
    with pytest.raises(BenchError, match=r"peer\.toml: .*drian"):
        find_peers(tmp_path, tmp_path)


def test_portable_dsn_moves_the_user_to_the_parameters() -> None:
    socket = "postgresql://postgres@/name?host=/run/x&port=5432"
    assert portable_dsn(socket) == "postgresql:///name?host=/run/x&port=5432&user=postgres"
    for same in ("postgresql://me@host:1/name?x=1", "postgresql:///name?host=/run/x"):
        assert portable_dsn(same) == same


# --- rooms


def test_rooms_import_downwards_only() -> None:
    rooms = ("workloads", "harness", "contenders", "scenarios")
    scenarios = {type(scenario).__module__ for scenario in SCENARIOS}
    assert len(scenarios) == 15
    for height, room in enumerate(rooms):
        for path in (REPOSITORY / "bench" / room).glob("*.py"):
            modules = {
                node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
            }
            higher = {f"bench.{name}." for name in rooms[height + 1 :]}
            assert not [module for module in modules if str(module).startswith(tuple(higher))], path
            assert path.name == "registry.py" or not modules & scenarios, path


# --- runs and numbers


def test_trim_fringe_leaves_out_separate_commits() -> None:
    assert trim_fringe([1.0, 1.01, 1.02]) == 1.0
    assert trim_fringe([0.0, 0.05, 1.0, 1.01]) == 1.0
    assert trim_fringe([9.0, 8.5, 8.49]) == 8.5


def test_pgtask_without_schema_fails_the_run(tmp_path: Path, empty_dsn: str) -> None:
    arena = Arena(empty_dsn, tmp_path, WORKLOADS["noop"], tasks=1, procs=1, batch=1)
    with pytest.raises(RunFailed, match=r"exit code 5: [\s\S]*pgtask migrate"):
        Pgtask().drain(arena)


def test_drain_refuses_a_server_that_may_lose_commits(tmp_path: Path, dsn: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "drain", "--tasks=1", "--dsn", dsn + "&synchronous_commit=off"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "synchronous_commit is off" in ended.stderr


def _run(number: int, contender: str, seconds: float) -> ContenderRun:
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
    return contender_run(
        number,
        contender,
        1000,
        2,
        Effort(began_at=9.0, seconds=seconds + 2, cpu_seconds=0.01, tree_cpu_seconds=0.02),
        work,
    )


def test_summary_excludes_failed_runs_and_their_pairs() -> None:
    runs = [
        _run(1, "ours", 1.0),
        _run(1, "floor", 0.5),
        ContenderRun(2, "ours", failed="it did not finish"),
        _run(2, "floor", 0.1),
        _run(3, "ours", 2.0),
        _run(3, "floor", 1.5),
        ContenderRun(1, "broken", failed="always"),
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


def test_percentile_is_one_of_the_numbers() -> None:
    numbers = [float(number) for number in range(1, 101)]
    assert percentile(numbers, 50) == 50
    assert percentile(numbers, 99) == 99
    assert percentile(numbers[:3], 50) == 2
    assert percentile([7.0], 99) == 7
